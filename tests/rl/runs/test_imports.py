"""What the first imports of LeRobot leave out, and that they leave Python as it was."""

import gc
import importlib.metadata
import sys

import pytest

from trimtab.rl.runs.imports import quick_imports


def test_packages_are_listed_once_and_nothing_is_collected(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers")  # as in a new process
    listed, module = importlib.metadata.packages_distributions, [object()]
    frozen = gc.get_freeze_count()
    with pytest.raises(ImportError), quick_imports():
        assert not gc.isenabled()
        packages = importlib.metadata.packages_distributions
        assert packages()["torch"] == ["torch"] and packages() is packages()
        raise ImportError
    assert gc.isenabled() and importlib.metadata.packages_distributions is listed
    assert gc.get_freeze_count() > frozen and not any(one is module for one in gc.get_objects())


def test_where_transformers_is_there_nothing_changes():
    listed, frozen = importlib.metadata.packages_distributions, gc.get_freeze_count()
    assert frozen > 100_000, "the tests' own imports"
    with quick_imports():
        assert gc.isenabled() and importlib.metadata.packages_distributions is listed
    assert gc.get_freeze_count() <= frozen
