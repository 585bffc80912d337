"""Count a model's operations without its weights, though it looks at values on its way.

On the meta device no tensor has values, and a model that computes token positions or picks out the image
tokens fails. Here only the large weights, and what is computed from them, have no values (PyTorch's fake
tensors, which say that they are on the CPU). All else, such as token ids and masks, is computed as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

LARGE = 2**16  # entries of a tensor that gets no memory
INDEXING = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)


class WithoutMemory(TorchDispatchMode):
    """While it is entered, large floating-point tensors are made on the meta device, whatever was asked."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = _tensors(args, kwargs)
        if any(tensor.is_meta for tensor in tensors):
            if _writes(func, args) and not args[0].is_meta:
                return args[0]  # its values are lost, its shape is what it was
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
            if kwargs.get("device") is not None:
                kwargs["device"] = torch.device("meta")
        elif not tensors and args and isinstance(args[0], list | tuple):
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            if dtype.is_floating_point and torch.Size(args[0]).numel() >= LARGE:
                kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


class Counting(TorchDispatchMode):
    """While it is entered, tensors with values and those of ``to_fake`` can meet in one operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(tensor, FakeTensor) for tensor in _tensors(args, kwargs)):
            if _writes(func, args) and not isinstance(args[0], FakeTensor):
                return args[0]
            if func in INDEXING:
                args = (args[0], _as_integers(args[1]), *args[2:])
        return func(*args, **kwargs)


def to_fake(model: nn.Module) -> None:
    """Let the tensors that ``model`` has on the meta device say that they are on the CPU."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Tensor] = {}  # tied weights stay tied

    def convert(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                value = torch.empty(tensor.shape, dtype=tensor.dtype)
            made[id(tensor)] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
        return made[id(tensor)]

    for module in _modules(model):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = convert(tensor)


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules within, also those that LeRobot hides from ``modules()`` for they are not trained."""
    found: dict[int, nn.Module] = {}
    left = [model]
    while left:
        module = left.pop()
        if id(module) not in found:
            found[id(module)] = module
            values = [*module._modules.values(), *vars(module).values()]
            for value in [*values, *(entry for d in values if isinstance(d, dict) for entry in d.values())]:
                if isinstance(value, nn.Module):
                    left.append(value)
    return list(found.values())


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _writes(func: Any, args: Any) -> bool:
    return func._schema.is_mutable and isinstance(args[0], Tensor)


def _as_integers(indices: Any) -> list[Any]:
    """Masks with values as positions: how many there are decides the shape of the result."""
    positions: list[Any] = []
    for index in indices:
        known = isinstance(index, Tensor) and not isinstance(index, FakeTensor)
        if known and index.dtype == torch.bool:
            positions += index.nonzero().unbind(1)
        else:
            positions.append(index)
    return positions
