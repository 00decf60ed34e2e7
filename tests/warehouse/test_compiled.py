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
    assert "no folder for its machine code can be written" in caplog.text


def test_arrays_that_cannot_be_written_are_taken():
    values_N = np.arange(3)
    values_N.flags.writeable = False
    assert compiled(types.int64[::1](only_read(types.int64)))(_doubled)(values_N).tolist() == [0, 2, 4]


def test_a_loop_that_cannot_be_compiled_is_an_error():
    with pytest.raises(Exception, match="nothing_of_this_name"):
        compiled(types.int64(types.int64))(lambda value: nothing_of_this_name)  # noqa: F821
