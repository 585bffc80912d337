"""A learner's update as CUDA graphs: recorded once, then replayed by one call instead of many launches.

Small networks on a large GPU spend their time in launching kernels. A graph replays the same kernels on the
same memory. What an update does depends on its number (the actor learns in every second one, some metrics are
taken in every tenth), so there is one graph for each ``Algorithm.turn``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.adapters.errors import reason
from trimtab.policies import passes
from trimtab.rl.data.replay import Batch

if TYPE_CHECKING:
    from trimtab.rl.algorithms.base import Algorithm

Update = Callable[[Any, Batch], dict[str, Tensor]]
# Updates of a kind before it is recorded: optimisers make their state in the first, gather it in the second.
WARM_UP = 3


def why_not_captured(accelerator: Any, obstacle: str) -> str:
    """Why updates are not recorded here; empty where they are.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        obstacle: what the algorithm knows of.
    """
    if accelerator.device.type != "cuda":
        return f"the learner runs on {accelerator.device.type}, not on CUDA"
    if accelerator.num_processes > 1:
        return "gradients are averaged over several processes"
    if accelerator.scaler is not None:
        return "gradients are scaled"
    return obstacle


@dataclass
class _Recorded:
    graph: Any
    batch: Batch
    metrics: dict[str, Tensor]

    def replay(self, batch: Batch) -> dict[str, Tensor]:
        for name, value in batch.items():
            self.batch[name].copy_(value, non_blocking=True)
        self.graph.replay()
        return {
            name: value.clone() for name, value in self.metrics.items()
        }  # the next replay overwrites them


class CapturedUpdate:
    """Calls an update, records it after a few calls, and replays it from then on.

    Draws come from the device's default generator, which a graph advances as the update itself does. Where
    recording fails, one line on stderr says so and updates go on as they are: what was being recorded has not
    been executed.

    Args:
        option: named in that line.
        device: the learner's.
    """

    def __init__(self, option: str, device: torch.device) -> None:
        self.option, self.works = option, True
        self._stream = torch.cuda.Stream(device)
        self._seen: Counter[tuple] = Counter()
        self._recorded: dict[tuple, _Recorded] = {}

    def __call__(self, algorithm: Algorithm, update: Update, batch: Batch) -> dict[str, Tensor]:
        kind = algorithm.turn(), tuple((name, value.shape) for name, value in batch.items())
        if self.works and kind not in self._recorded and self._seen[kind] >= WARM_UP:
            self._record(kind, algorithm, update, batch)
        if self.works and kind in self._recorded:
            metrics = self._recorded[kind].replay(batch)
            algorithm.updates += 1
            return metrics
        self._seen[kind] += 1
        return self._aside(algorithm, update, batch)

    def _aside(self, algorithm: Algorithm, update: Update, batch: Batch) -> dict[str, Tensor]:
        """On the stream on which graphs are recorded: autograd's nodes remember theirs."""
        passes.forget_copies(
            algorithm
        )  # a replay changes weights unnoticed by the versions that copies go by
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            metrics = update(algorithm, batch)
        current.wait_stream(self._stream)
        return metrics

    def _record(self, kind: tuple, algorithm: Algorithm, update: Update, batch: Batch) -> None:
        passes.forget_copies(algorithm)  # so that making them is part of the graph
        batch = {name: value.clone() for name, value in batch.items()}
        graph, updates = torch.cuda.CUDAGraph(), algorithm.updates
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                metrics = update(algorithm, batch)
            self._recorded[kind] = _Recorded(graph, batch, metrics)
        except RuntimeError as error:
            self.works = False
            self._recorded.clear()
            print(f"{self.option}: cannot be captured ({reason(error)}); it runs as it is", file=sys.stderr)
        finally:
            algorithm.updates = updates  # nothing has been executed yet
