"""CUDA graphs of functions of tensors: recorded once, then replayed with all kernels launched at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

COPIES = (torch.tensor, torch.as_tensor, Tensor.to, Tensor.cuda)

Tensors = dict[str, Tensor]
Run = Callable[[], Tensors]


class Recorder:
    """Records functions as CUDA graphs.

    They share one pool of memory: none is replayed while another's results are still to be read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Run) -> Run:
        current, constants = torch.cuda.current_stream(self._device), Constants()
        self._stream.wait_stream(current)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            with constants:  # libraries choose their kernels
                function()
            # A failed recording may leave the allocator and the generators in its middle. So it is rehearsed.
            with constants, _no_waiting():
                function()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile.
            with constants, torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
                results = function()
        finally:
            torch.cuda.set_stream(current)  # a failed recording leaves its own

        def replay(keep: Any = constants) -> Tensors:
            graph.replay()
            return results

        return replay


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise ``RuntimeError`` where the host waits for the device, which cannot be recorded."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Constants(TorchFunctionMode):
    """Keeps what a function copies from the host to the device, and hands it out when entered again.

    A function of tensors on the device that does not wait for the device copies the same at each call, such
    as the times of its steps. Such copies cannot be recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[Callable, Tensor | None]] = []
        self._left: Iterator[tuple[Callable, Tensor | None]] | None = None

    def __enter__(self) -> Constants:
        self._left = iter(self._kept) if self._kept else None
        return super().__enter__()

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args else None
        if func not in COPIES or (isinstance(source, Tensor) and source.device.type != "cpu"):
            return func(*args, **kwargs)
        if self._left is None:
            out = func(*args, **kwargs)
            self._kept.append((func, None if out.device.type == "cpu" else out.clone()))
            return out
        noted, kept = next(self._left, (None, None))
        if noted is not func:
            raise RuntimeError("what it copies to the device differs from call to call")
        return func(*args, **kwargs) if kept is None else kept.clone()  # it may be written into
