"""Rows of a conditioning: what an index picks."""

import numpy as np
import pytest
import torch

from trimtab.adapters import Conditioning

REPEATS = 3


@pytest.fixture
def conditioning():
    tensors = {"x": torch.arange(8.0).reshape(4, 2), "cache": torch.randn(4, 5, 6)}
    return Conditioning(tensors, {"task": list("abcd")}).repeat_interleave(REPEATS)


INDICES = {
    "integer": 4,
    "numpy integer": np.int64(4),
    "tensor integer": torch.tensor(4),
    "last": -1,
    "slice": slice(2, 9),
    "whole observations": slice(3, 9),
    "one observation": slice(4, 6),
    "step": slice(None, None, 2),
    "backwards": [5, 4, 3],
    "list": [11, 0, 4],
    "tensor": torch.tensor([1, 1, 7]),
    "mask": torch.tensor([True, False] * 6),
    "numpy mask": np.array([False, True, True] * 4),
    "nothing": slice(5, 5),
}


@pytest.mark.parametrize("name", INDICES)
def test_index(conditioning, name):
    index = INDICES[name]
    expected = np.atleast_1d(np.arange(12)[index.numpy() if isinstance(index, torch.Tensor) else index])
    picked = conditioning[index]
    assert picked.batch_size == len(expected)
    for key in ("x", "cache"):
        assert torch.equal(picked.rows(key), conditioning.rows(key)[torch.as_tensor(expected)])
    assert picked.rows("task") == ["abcd"[i // REPEATS] for i in expected]


@pytest.mark.parametrize("index", [12, 99, -13, [0, 12]])
def test_out_of_range(conditioning, index):
    with pytest.raises(IndexError):
        conditioning[index]


def test_iteration_ends(conditioning):
    assert len(list(conditioning)) == 12


def test_lists_alone_have_a_length():
    assert Conditioning({}, {"task": ["a", "b"]}).repeat_interleave(2).batch_size == 4
