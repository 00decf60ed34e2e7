import logging

import numpy as np
import pytest
from numba import types
from numba.core import caching

from warehouse.compiled import compiled, only_read


def _doubled(values_N: np.ndarray) -> np.ndarray:
    return values_N * 2


def test_where_no_folder_can_be_written_it_is_compiled_all_the_same(monkeypatch, caplog):
    class Nowhere(caching._CacheLocator):
        @classmethod
        def from_function(cls, function, path):
            return None

    monkeypatch.setattr(caching.FunctionCache._impl_class, "_locator_classes", [Nowhere])
    with caplog.at_level(logging.INFO):
        doubled = compiled(types.int64[::1](only_read(types.int64)))(_doubled)
    assert doubled(np.arange(3)).tolist() == [0, 2, 4]
    assert "its machine code cannot be kept" in caplog.text


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("no module named gone"), AttributeError("no class Gone"), OSError(28, "full")]
)
def test_machine_code_that_cannot_be_read_or_written_costs_the_time_to_compile(monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(caching.IndexDataCacheFile, "load", fail)
    assert compiled(types.int64[::1](only_read(types.int64)))(_doubled)(np.arange(3)).tolist() == [0, 2, 4]


def test_arrays_that_cannot_be_written_are_taken():
    values_N = np.arange(3)
    values_N.flags.writeable = False
    assert compiled(types.int64[::1](only_read(types.int64)))(_doubled)(values_N).tolist() == [0, 2, 4]


def test_a_loop_that_cannot_be_compiled_is_an_error():
    with pytest.raises(Exception, match="nothing_of_this_name"):
        compiled(types.int64(types.int64))(lambda value: nothing_of_this_name)  # noqa: F821
