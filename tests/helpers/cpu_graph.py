"""What stands for CUDA's graphs on a CPU, so that what records with them runs there as it is.

The graph keeps the operations of a function and replays them, on the same tensors, without its Python.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CpuGraph(TorchDispatchMode):
    """In the place of ``torch.cuda.CUDAGraph``; entered, it records."""

    recorded = 0  # graphs

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        CpuGraph.recorded += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self._calls:
            for kept, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(kept, Tensor) and not _of_one_storage(
                    kept, new
                ):  # else a view, or changed in place
                    kept.copy_(new)


def _of_one_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class Stream:
    """In the place of ``torch.cuda.Stream``."""

    def __init__(self, device: Any = None) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


def graphs_on_the_cpu(monkeypatch: Any) -> None:
    """Let ``torch.cuda``'s graphs and streams be these, for one test."""
    CpuGraph.recorded = 0
    standing: dict[str, Any] = {"CUDAGraph": CpuGraph, "Stream": Stream, "current_stream": Stream}
    standing |= {name: nullcontext for name in ("device", "stream", "set_stream", "graph_pool_handle")}
    standing |= {"get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": lambda mode: None}
    for name, value in standing.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, *args: graph)
