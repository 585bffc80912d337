"""A policy as if it ran on CUDA, where there is none: what a CUDA graph could not hold of it is found.

Its tensors are PyTorch's fake ones: they have shapes and say that they are on a device, and have no values.
Tensors that a policy keeps on the host have values as ever.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.benchmarks.weightless import _modules
from trimtab.adapters import PolicyAdapter

CUDA = torch.device("cuda", 0)
SOURCES = ("lerobot", "transformers", "diffusers")


class AsIfCuda(TorchDispatchMode):
    """While it is entered, ``waits`` gets a line for each operation for which the host waits for the device.

    These are copies between the two, values of the device that Python reads, and results whose shape depends
    on values; at the last two the function ends with an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake, self.waits = FakeTensorMode(allow_non_fake_inputs=True), list[str]()

    def __enter__(self) -> AsIfCuda:
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.fake.__exit__(*error)

    def tensor(self, like: Tensor) -> Tensor:
        """A tensor on the device like this one."""
        with self.fake:
            value = torch.empty(like.shape, dtype=like.dtype, device=CUDA)
        return torch.nn.Parameter(value, False) if isinstance(like, torch.nn.Parameter) else value

    def move(self, adapter: PolicyAdapter) -> None:
        """All tensors of a policy, and what its adapter keeps, to the device."""
        made: dict[int, tuple[Tensor, Tensor]] = {}  # tied weights stay tied
        for module in _modules(adapter.policy):
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = made.setdefault(id(tensor), (self.tensor(tensor), tensor))[0]
        for kept in vars(adapter).values():
            if isinstance(kept, dict):
                kept.update({k: self.tensor(v) for k, v in kept.items() if isinstance(v, Tensor)})
        adapter.device = CUDA

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        hosts = [tensor for tensor in given if tensor.device.type == "cpu"]
        device = kwargs.get("device")
        if len(hosts) == len(given) and (device is None or torch.device(device).type == "cpu"):
            with unset_fake_temporarily():
                return args[0] if func is torch.ops.aten.lift_fresh.default else func(*args, **kwargs)
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            self._wait(func, type(error).__name__)
            raise
        copies = len(hosts) == len(given) or any(part in str(func) for part in ("copy", "index", "where"))
        if any(tensor.ndim or copies for tensor in hosts):  # of one number, the kernel's argument
            self._wait(func, "from the host")
        if any(leaf.device.type == "cpu" for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            self._wait(func, "to the host")
        return out

    def _wait(self, func: Any, what: str) -> None:
        names = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()]
        inside = [name for name in names if any(f"/{part}/" in name for part in SOURCES)]
        inside = inside or names
        self.waits.append(f"{inside[-1].rpartition('/')[2]}: {func} {what}")
