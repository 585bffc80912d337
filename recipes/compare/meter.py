"""What a run costs: seconds, CPU seconds of this process and its simulator workers, and its peak memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator
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
        self._wall, self._cpu = time.perf_counter(), self.cpu()

    def cpu(self) -> float:
        """CPU seconds so far, of all threads and of the simulator workers that have been seen."""
        for worker in multiprocessing.active_children():
            with contextlib.suppress(psutil.Error):  # it has just ended
                times = psutil.Process(worker.pid).cpu_times()
                self._workers[worker.pid] = times.user + times.system
        return time.process_time() + sum(self._workers.values())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is not counted in ``spent``."""
        wall, cpu = time.perf_counter(), self.cpu()
        yield
        self._wall += time.perf_counter() - wall
        self._cpu += self.cpu() - cpu

    def spent(self) -> dict[str, float]:
        """``wall_seconds`` and ``cpu_seconds``."""
        seconds = time.perf_counter() - self._wall, self.cpu() - self._cpu
        return dict(zip(("wall_seconds", "cpu_seconds"), (round(value, 2) for value in seconds)))

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
