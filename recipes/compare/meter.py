"""What a run costs: CPU seconds of this process and its simulator workers, and its peak memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import psutil
import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Starts to measure when it is made.

    The peak is the main process': on Linux its largest resident memory since then (simulator workers come on
    top), elsewhere the largest since the process began. A GPU's is the most that PyTorch held there.
    """

    def __init__(self) -> None:
        self._workers: dict[int, float] = {}
        with contextlib.suppress(OSError):
            CLEAR.write_text("5")  # resets the kernel's high-water mark
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def cpu(self) -> float:
        """CPU seconds so far, of all threads and of the simulator workers that have been seen."""
        for worker in multiprocessing.active_children():
            try:
                times = psutil.Process(worker.pid).cpu_times()
            except psutil.Error:  # it has just ended
                continue
            self._workers[worker.pid] = times.user + times.system
        return time.process_time() + sum(self._workers.values())

    def peak(self) -> dict[str, float]:
        """``peak_mb``, and ``peak_gpu_mb`` on a GPU."""
        found = {"peak_mb": round(_peak() / 1e6, 1)}
        if torch.cuda.is_available():
            found["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
        return found


def _peak() -> float:
    """Largest resident memory of this process, in bytes."""
    with contextlib.suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024.0 * float(line.split()[1])
    unit = 1.0 if sys.platform == "darwin" else 1024.0
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
