"""The clock that a bench goes by."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

CPU = torch.device("cpu")


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds of what has been done on ``device`` so far, from an arbitrary point on.

    On the CPU those of this process's own time, so that what else runs disturbs it less; on a GPU wall-clock,
    once everything that was asked of it is done.
    """
    if device.type != "cuda":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def unit_of(device: torch.device) -> str:
    """What ``clock_of`` counts, in words."""
    return "wall-clock" if device.type == "cuda" else "CPU time"
