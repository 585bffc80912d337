"""Sums through shared memory: two real processes are in `test_processes.py`; here, what could go wrong."""

import os
import platform
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from trimtab.rl.runs import shared_sum
from trimtab.rl.runs.shared_sum import MOST, SharedSum


class Ranks:
    """So many ranks as threads, whose ``gather`` meets as all_gather_object does."""

    def __init__(self, size):
        self.size, self.slots, self.barrier = size, [None] * size, threading.Barrier(size, timeout=60)

    def gather(self, rank):
        def collect(value):
            self.slots[rank] = value
            self.barrier.wait()
            found = list(self.slots)
            self.barrier.wait()
            return found

        return collect

    def run(self, work):
        found = [None] * self.size

        def one(rank):
            try:
                found[rank] = work(rank, self.gather(rank))
            except BaseException as error:
                self.barrier.abort()
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        failed = [error for error in found if isinstance(error, BaseException)]
        if failed:
            raise failed[0]
        return found


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_holds_the_sum_whatever_its_pace_and_the_size(size, tmp_path):
    rounds, sizes = 200, (1, 7, 4096, 5000, 20_000)
    seeded = [torch.Generator().manual_seed(rank) for rank in range(size)]
    parts = [[torch.randn(sizes[r % 5], generator=draw) for r in range(rounds)] for draw in seeded]

    def work(rank, gather):
        add, pace, found = SharedSum(rank, size, gather, str(tmp_path)), random.Random(rank), []
        for part in parts[rank]:
            if pace.random() < 0.1:
                time.sleep(pace.random() * 0.005)
            flat = part.clone() if len(found) % 2 else part.double()
            assert add(flat)
            found.append(flat)
        return found

    found = Ranks(size).run(work)
    for index in range(rounds):
        wanted = parts[0][index] if index % 2 else parts[0][index].double()
        for rank in range(1, size):
            wanted = wanted + parts[rank][index].to(wanted.dtype)
        assert all(torch.equal(mine[index], wanted) for mine in found)
    assert not list(tmp_path.iterdir())  # nothing is left, even by a process that is killed


@pytest.mark.parametrize("reaped", [True, False])
def test_who_has_ended_is_not_waited_for(reaped, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    ended.stdout.read()  # until it has ended, though nobody has asked after it
    if reaped:
        ended.wait()

    def gather(value):
        """Rank 1 has said what it had to, and is no more."""
        return [value, ended.pid if value == os.getpid() else value]

    add = SharedSum(0, 2, gather, str(tmp_path))
    with pytest.raises(RuntimeError, match="process 1 of 2 of this run has ended"):
        add(torch.ones(3))
    ended.wait()


def test_who_does_not_come_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_sum, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(shared_sum, "LIMIT_SECONDS", 0.05)
    add = SharedSum(0, 2, lambda value: [value, value], str(tmp_path))
    with pytest.raises(RuntimeError, match="process 1 of 2 has not come"):
        add(torch.ones(3))


def test_without_room_nobody_uses_it(tmp_path):
    missing = str(tmp_path / "missing")

    def work(rank, gather):
        flat = torch.full((3,), float(rank))
        return SharedSum(rank, 2, gather, missing)(flat), flat.tolist()

    assert Ranks(2).run(work) == [(False, [0.0] * 3), (False, [1.0] * 3)]


def test_several_machines_and_many_processes_use_messages():
    for size, node in ((2, "elsewhere"), (MOST + 1, None)):

        def gather(value, size=size, node=node):
            others = [value] * (size - 1)
            return [value, *others] if node is None else [value, (node, *value[1:])]

        assert SharedSum.try_among(0, size, gather) is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="relies on x86's order of writes")
def test_one_machine_shares(monkeypatch):
    made, reserve = [], shared_sum._reserve
    monkeypatch.setattr(shared_sum, "_reserve", lambda *size: made.append(reserve(*size)) or made[-1])
    found = Ranks(2).run(lambda rank, gather: SharedSum.try_among(rank, 2, gather) is not None)
    assert found == [True, True]
    assert len(made) == 1 and not Path(made[0]).exists()
