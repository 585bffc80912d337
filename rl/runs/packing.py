"""Nested state as JSON and tensors: what a checkpoint is made of."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

STORED = "$stored"


def pack(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """The JSON form of nested dicts and lists; tensors and arrays in it go to ``tensors``, by their path.

    Raises:
        TypeError: a value that has no such form, so that nothing is left out unnoticed.
    """
    if isinstance(tree, Tensor | np.ndarray):
        value = torch.as_tensor(tree).detach().cpu()
        tensors[path] = value.clone(memory_format=torch.contiguous_format)
        return {STORED: "tensor" if isinstance(tree, Tensor) else "array"}
    if isinstance(tree, Mapping):
        return {str(key): pack(value, tensors, f"{path}.{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple | deque):
        return [pack(value, tensors, f"{path}.{index}") for index, value in enumerate(tree)]
    if isinstance(tree, np.generic):
        return tree.item()
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{path}: a {type(tree).__name__} has no place in a checkpoint")


def unpack(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """The inverse of ``pack``; tuples and deques come back as lists."""
    if isinstance(tree, dict):
        if STORED in tree:
            return tensors[path] if tree[STORED] == "tensor" else tensors[path].numpy()
        return {key: unpack(value, tensors, f"{path}.{key}") for key, value in tree.items()}
    if isinstance(tree, list):
        return [unpack(value, tensors, f"{path}.{index}") for index, value in enumerate(tree)]
    return tree
