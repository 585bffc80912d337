"""Sums over processes of one machine through memory that they share.

A learner of this size sends little and often: some 100,000 numbers at every step of an optimiser, a few
hundred times a second. Gloo's loopback connection takes 0.4 ms for the smallest message and 1.3 ms for such
a one, most of it threads that wake each other; here each process writes its numbers, says so, and adds up.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LINE = 64  # bytes; no two processes write to one cache line
ALIGNED = 4096
SPIN_SECONDS = 0.002  # about a learner's step; whoever waits for longer leaves the core to others
NAP_SECONDS = 1e-4
LOOK_SECONDS = 1.0
LIMIT_SECONDS = 7200.0  # as long as the messages' own: a checkpoint or an evaluation may take a while
MOST = 8  # each reads the parts of all: beyond, a ring of messages is the better way


class SharedSum:
    """An all-reduce among processes that all live on this machine. All make the same calls in the same order.

    Two buffers take turns: whoever writes its part of round r + 2 has seen all others begin round r + 1, so
    none of them still reads round r, and one wait per sum is enough. The parts are added in the order of the
    ranks by every process, so that all hold the same bits.

    Args:
        rank, size: of this process, and how many there are.
        gather: collects a value of each process, in their order.
        folder: where the memory's file is made; default: the machine's shared memory.
    """

    def __init__(
        self, rank: int, size: int, gather: Callable[[object], list], folder: str | None = None
    ) -> None:
        self.rank, self.size, self._gather, self._folder = rank, size, gather, folder
        self._pids: list[int] = gather(os.getpid())
        self._round = 0
        self._capacity = 0

    @classmethod
    def try_among(cls, rank: int, size: int, gather: Callable[[object], list]) -> SharedSum | None:
        """One that all processes can use, or ``None`` on all of them: on several machines, say.

        Only x86 keeps the order in which another core sees plain writes, on which the counters rely.
        """
        able = sys.platform == "linux" and platform.machine() == "x86_64"
        here = (platform.node(), _process_space(), able)
        if any(other != here or not other[-1] for other in gather(here)) or size > MOST:
            return None
        found = cls(rank, size, gather)
        return found if found._map(ALIGNED) else None

    def __call__(self, flat: Tensor) -> bool:
        """Replace a contiguous CPU tensor by its sum over the processes.

        Returns:
            whether it was done; if not, on no process: there is no memory for it.

        Raises:
            RuntimeError: another process has ended, or does not come.
        """
        size = flat.numel() * flat.element_size()
        if size > self._capacity and not self._map(size):
            return False
        turn = self._round % 2
        parts = self._parts[turn][:, :size].view(flat.dtype)
        parts[self.rank].copy_(flat)
        self._round += 1
        self._counters[self.rank] = self._round
        self._wait()
        torch.add(parts[0], parts[1], out=flat)
        for part in parts[2:]:
            flat += part
        return True

    def _wait(self) -> None:
        """Until every process has written its part of this round."""
        started = looked = time.perf_counter()
        while self._counters.min() < self._round:
            os.sched_yield()
            now = time.perf_counter()
            if now - started > SPIN_SECONDS:
                time.sleep(NAP_SECONDS)
            if now - looked > LOOK_SECONDS:
                looked = now
                ended = [rank for rank, pid in enumerate(self._pids) if not _alive(pid)]
                # Looked at after that: who has written and then ended is not missed.
                late = [rank for rank in range(self.size) if self._counters[rank] < self._round]
                for rank in late:
                    if rank in ended:
                        raise RuntimeError(f"process {rank} of {self.size} of this run has ended")
                    if now - started > LIMIT_SECONDS:
                        raise RuntimeError(f"process {rank} of {self.size} has not come for 2 hours")

    def _map(self, size: int) -> bool:
        """Map room for parts of ``size`` bytes; the file is without a name once all have it.

        Growing is as safe as starting: a process comes here only after the last round, which all have
        written, and the old memory lives as long as someone reads it.
        """
        room = -(-size // ALIGNED) * ALIGNED
        head = -(-self.size * LINE // ALIGNED) * ALIGNED
        total = head + 2 * self.size * room
        path, memory = None, None
        if self.rank == 0:
            with suppress(OSError):
                path = _reserve(total, self._folder)
        mine = path
        try:
            path = self._gather(path)[0]
            if path is not None and Path(path).is_file():
                with suppress(RuntimeError):
                    memory = torch.from_file(path, shared=True, size=total, dtype=torch.uint8)
            everyone = all(self._gather(memory is not None))
        finally:
            if mine is not None:
                Path(mine).unlink(missing_ok=True)
        if not everyone:
            return False
        counters = memory[: self.size * LINE].numpy().view(np.int64)
        self._counters = counters[:: LINE // 8]
        self._parts = memory[head:].view(2, self.size, room)
        self._capacity, self._round = room, 0
        return True


def _reserve(size: int, folder: str | None) -> str:
    """A file of ``size`` zero bytes that the machine has room for."""
    shared = "/dev/shm"
    place = folder or (shared if os.access(shared, os.W_OK) else tempfile.gettempdir())
    handle, path = tempfile.mkstemp(prefix="trimtab-", dir=place)
    try:
        os.posix_fallocate(handle, 0, size)  # a hole would end the process at its first write
    except OSError:
        Path(path).unlink()
        raise
    finally:
        os.close(handle)
    return path


def _process_space() -> str:
    """What the numbers of processes are relative to, where there can be several."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked after yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] not in ("Z", "X")
