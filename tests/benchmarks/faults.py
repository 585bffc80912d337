"""The fault campaign: `python -m tests.benchmarks.faults`. Runs are killed at random instants, and resumed.

Every child is a fork of this warm process, so that a kill costs a fraction of a second. It trains on the
small problem of `tests/helpers/point.py` with the real trainer, checkpoints and metrics. It gets SIGKILL at a
random instant (while it acts, learns, writes a checkpoint, or returns to one), and the next child goes on. At
the end metrics, weights and replay are compared with those of a run that nobody disturbed: they must be
identical.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from tests.helpers.faulty import FaultyConfig
from tests.helpers.point import PointAdapter
from trimtab.adapters import UserError
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.recipes.support.reporting import MetricsWriter
from trimtab.recipes.support.run_folder import run_errors
from trimtab.rl.algorithms import AlgorithmConfig, BestOfNConfig, DSRLNAConfig, DSRLSACConfig
from trimtab.rl.budget import TrainConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.checkpoint import CheckpointConfig, Checkpoints
from trimtab.rl.runs.faults import FaultsConfig
from trimtab.rl.runs.processes import ProcessGroup
from trimtab.rl.trainer import Trainer

SIZE = {
    "batch_size": 16,
    "actor": ActorConfig(hidden=16, layers=1),
    "critic": CriticConfig(hidden=16, layers=1),
}
ALGORITHMS: dict[str, AlgorithmConfig] = {
    "dsrl_sac": DSRLSACConfig(**SIZE),
    "dsrl_na": DSRLNAConfig(num_candidates=4, **SIZE),
    "best_of_n": BestOfNConfig(num_candidates=4, target_candidates=2, **SIZE),
}


@dataclass
class Run:
    """One run of the campaign, as often as it is started.

    Attributes:
        folder: holds its checkpoints, metrics and, at its end, ``result.json``.
        algorithm, env_steps, every: what is run, how far, with checkpoints how far apart.
        fault, workers, timeout, limit: of the environments.
    """

    folder: Path
    algorithm: str = "dsrl_sac"
    env_steps: int = 3000
    every: int = 60
    fault: str = "none"
    workers: int = 0
    timeout: float = 0.0
    limit: int = 1000

    def trainer(self) -> tuple[Trainer, list[str]]:
        """A trainer that has gone on from the newest checkpoint, and the lines about that."""
        config, accelerator = FaultyConfig(fault=self.fault), Accelerator(cpu=True)
        vec = ChunkVectorEnv(config, 3, self.workers, tolerant=True, timeout=self.timeout)
        checkpoints = Checkpoints(
            self.folder / "checkpoints", CheckpointConfig(self.every), {}, ProcessGroup(accelerator)
        )
        train = TrainConfig(
            env_steps=self.env_steps,
            first_update=40,
            warmup_transitions=60,
            log_every=50,
            replay_capacity=400,
            updates_per_transition=0.3,
        )
        trainer = Trainer(
            *(PolicyRunner(PointAdapter(), config), vec, accelerator, train, ALGORITHMS[self.algorithm]),
            *(FullNoiseConfig(), 5),
            progress=False,
            checkpoints=checkpoints,
            faults_config=FaultsConfig(self.limit),
        )
        found, notes = checkpoints.newest()
        if found:
            notes += trainer.resume(found)
        metrics = MetricsWriter(self.folder / "metrics.jsonl", found.beside["metrics"] if found else 0)
        checkpoints.beside = lambda: {"metrics": metrics.offset()}
        trainer.on_metrics = metrics
        return trainer, notes

    def __call__(self) -> None:
        """Go on to the end, and leave ``result.json``."""
        trainer, notes = self.trainer()
        with trainer.vec, run_errors(self.folder):
            trainer.run()
        state = trainer.state_dict()
        replay = trainer.replay.rows(trainer.replay.added - len(trainer.replay), trainer.replay.added)
        result = {
            "weights": state["weights"],
            "replay": {name: float(value.double().sum()) for name, value in replay.items()},
            "rng": state["rng"].sum().item(),
            "counters": {k: v for k, v in state.items() if isinstance(v, int | float) and "seconds" not in k},
            "faults": state["faults"],
            "notes": notes,
        }
        (self.folder / "result.json").write_text(json.dumps(result))

    @property
    def result(self) -> dict:
        return json.loads((self.folder / "result.json").read_text())

    @property
    def metrics(self) -> list[dict]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]

    def fork(self) -> int:
        """Start it in a child; returns the child's id."""
        child = os.fork()
        if child:
            return child
        try:
            with open(self.folder / "stderr.txt", "a") as log:
                os.dup2(log.fileno(), 2)
                self()
            os._exit(0)
        except BaseException as error:
            with contextlib.suppress(Exception), open(self.folder / "stderr.txt", "a") as log:
                log.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)


def differences(run: Run, whole: Run) -> list[str]:
    """What differs between the results of two runs; nothing should."""
    first, second = run.result, whole.result
    odd = [name for name in ("weights", "replay", "rng", "counters", "faults") if first[name] != second[name]]
    return odd + ["metrics"] * (run.metrics != whole.metrics)


def warm_up(root: Path) -> None:
    """Import here what a trainer imports when it is built, so that a fork need not."""
    run = Run(root / "warm-up")
    run.folder.mkdir(parents=True)
    run.trainer()[0].vec.close()


def kill(run: Run, kills: int, seed: int) -> Counter:
    """Start ``run`` and kill it ``kills`` times, or until it is through.

    A child is killed up to 0.25 s after it has written none, one or two more checkpoints, whatever the pace
    of the machine: some never get to one, most have gone on from one and got further.

    Returns:
        how many kills there were; how many of them hit a child that had gone on from a checkpoint, one before
        the first checkpoint, one that was writing a checkpoint, one that had got further.
    """
    rng, counts = random.Random(seed), Counter()
    run.folder.mkdir(parents=True, exist_ok=True)
    while True:
        before = newest(run)
        child = run.fork()
        done = 0
        if counts["kills"] < kills:
            goal, seen, last, deadline = rng.choice((0, 1, 1, 2)), 0, before, None
            while not done and (deadline is None or time.monotonic() < deadline):
                now = newest(run)
                seen, last = seen + (now != last), now
                if deadline is None and seen >= goal:
                    deadline = time.monotonic() + rng.uniform(0.0, 0.25)
                done, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.001)
        if not done and counts["kills"] < kills:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                counts["kills"] += 1
                counts["of a run that had gone on"] += before is not None
                counts["before the first checkpoint"] += newest(run) is None
                counts["while a checkpoint was written"] += any((run.folder / "checkpoints").glob(".*.tmp"))
                counts["with progress"] += newest(run) != before
                continue
        elif not done:
            _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"a child failed: {(run.folder / 'stderr.txt').read_text()[-2000:]}")
        return counts


def newest(run: Run) -> str | None:
    found = sorted(p.name for p in (run.folder / "checkpoints").glob("[0-9]*"))
    return found[-1] if found else None


def campaign_kills(root: Path, kills: int, seed: int) -> tuple[Counter, list[str]]:
    """Kill runs of all algorithms in turn, ``kills`` times in all; returns counts and what differed."""
    warm_up(root)
    total, odd = Counter(), []
    share = -(-kills // len(ALGORITHMS))
    for number, algorithm in enumerate(ALGORITHMS):
        whole = Run(root / f"{algorithm}-whole", algorithm, env_steps=max(1200, 60 * share))
        whole.folder.mkdir(parents=True)
        child = whole.fork()
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"a child failed: {(whole.folder / 'stderr.txt').read_text()[-2000:]}")
        left, attempt = share, 0
        while left > 0:  # a run that got through before all its kills is begun anew
            run = replace(whole, folder=root / f"{algorithm}-killed-{attempt}")
            counts = kill(run, left, seed + 100 * number + attempt)
            odd += [f"{run.folder.name}: {name}" for name in differences(run, whole)]
            total += counts
            total["runs compared"] += 1
            left, attempt = left - counts["kills"], attempt + 1
    return total, odd


def campaign_workers(root: Path) -> Counter:
    """Runs whose simulator workers die and hang."""
    found = Counter()
    for fault, timeout in (("die", 60.0), ("hang", 1.0)):
        run = Run(root / f"workers-{fault}", fault=fault, workers=2, timeout=timeout, env_steps=500)
        run.folder.mkdir()
        run()
        result = run.result
        found += Counter({kind: n for kind, n in result["faults"].items() if n})
        assert result["counters"]["env_steps"] >= 500
    return found


def campaign_damage(root: Path) -> tuple[int, list[str]]:
    """Truncate each file of the newest checkpoint in turn; go on, and compare with the undisturbed run.

    Returns:
        (files, names of those after which something differed)
    """
    whole = Run(root / "damage-whole", "dsrl_na", env_steps=400, every=100)
    whole.folder.mkdir()
    whole()
    checkpoints = whole.folder / "checkpoints"
    _, new = sorted(p.name for p in checkpoints.glob("[0-9]*"))
    files = sorted(p.relative_to(checkpoints / new) for p in (checkpoints / new).rglob("*") if p.is_file())
    odd = []
    for file in files:
        run = replace(whole, folder=root / "damaged")
        shutil.copytree(whole.folder, run.folder, symlinks=True)
        path = run.folder / "checkpoints" / new / file
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        run()
        said = [note for note in run.result["notes"] if f"checkpoint {new} is not whole" in note]
        named = len(said) == 1 and (str(file) in said[0] or file.name == "manifest.json")
        if not named or differences(run, whole):
            odd.append(str(file))
        shutil.rmtree(run.folder)
    return len(files), odd


def campaign_full_disk(root: Path) -> str:
    """A run on a disk of 1 MB: it stops in one line; with the disk of another size it goes on to the end."""
    disk = root / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return "not permitted to mount a tmpfs: left out"
    try:
        whole = Run(root / "disk-whole", "dsrl_na", every=100, env_steps=1500)
        whole.folder.mkdir()
        whole()
        run = replace(whole, folder=disk / "run")
        run.folder.mkdir()
        hog = disk / "hog"
        hog.write_bytes(bytes(700_000))
        try:
            run()
            raise SystemExit("the disk was not full")
        except UserError as error:
            message = str(error)
        whole_one = run.trainer()[0].checkpoints.newest()[0]
        hog.unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        run()
        odd = differences(run, whole)
        kept = whole_one.folder.name if whole_one else "none"
        end = f"DIFFERENT: {odd}" if odd else "identical"
        return f"{message[:150]}...; kept {kept}; with room, to the end, {end}"
    finally:
        subprocess.run(["umount", "-l", str(disk)], capture_output=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.faults")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    np.seterr(all="raise")
    with tempfile.TemporaryDirectory() as folder:
        root, started = Path(folder), time.monotonic()
        counts, odd = campaign_kills(root, options.kills, options.seed)
        print(f"SIGKILL: {dict(counts)}; different from the undisturbed run: {odd or 'nothing'}", flush=True)
        workers = campaign_workers(root)
        print(f"simulator workers: {dict(workers)}, all restarted, runs went to their end", flush=True)
        files, damaged = campaign_damage(root)
        print(f"truncated files: {files}; not detected, or different after: {damaged or 'none'}", flush=True)
        full = campaign_full_disk(root)
        print(f"full disk: {full}")
        print(f"{time.monotonic() - started:.0f} s")
    # Kills that no run had to go on after would show nothing.
    idle = 2 * counts["of a run that had gone on"] < options.kills
    return 1 if odd or damaged or idle or "DIFFERENT" in full else 0


if __name__ == "__main__":
    sys.exit(main())
