"""Modules are loaded without garbage collections, which are on again whatever came of it."""

import gc

import pytest

from warehouse.loading import loading


def test_collections_are_off_within_and_on_again_afterwards():
    assert gc.isenabled()
    with loading():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), loading():
        raise ImportError("no such module")
    assert gc.isenabled()


def test_who_had_them_off_has_them_off():
    gc.disable()
    try:
        with loading():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
