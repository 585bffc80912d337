"""One run of a comparison: a method learns a task, is evaluated on the way, and leaves a record."""

from __future__ import annotations

import contextlib
import resource
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import draccus
import psutil
import torch
from lerobot.configs.default import DatasetConfig
from lerobot.envs.configs import EnvConfig

from trimtab.policies.acting import ChunkPolicy
from trimtab.recipes.compare.config import CompareConfig
from trimtab.recipes.support.reporting import rate_text
from trimtab.recipes.support.session import Session
from trimtab.rl.algorithms.acting import LoadedBase
from trimtab.rl.envs.base import VectorEnv
from trimtab.rl.evaluation import evaluate
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.checkpoint import Checkpoint, Checkpoints
from trimtab.rl.runs.processes import ProcessGroup

Policies = dict[str, ChunkPolicy]
Summaries = dict[str, dict[str, Any]]
SAME_COMMAND = "the same command"  # goes on with a comparison that was stopped


class Meter:
    """Starts to measure when it is made.

    The peak is the largest resident memory of the main process (simulator workers come on top) since it
    began: the run's own where each run has a process of its own.
    """

    def __init__(self) -> None:
        self._wall, self._cpu, self._peak = time.perf_counter(), self.cpu(), 0.0

    def cpu(self) -> float:
        """CPU seconds so far, of this process, those that it started, and those of them that have ended."""
        here, total = psutil.Process(), 0.0
        for process in (here, *here.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has just ended
                total += sum(process.cpu_times()[:4])
        return total

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is not counted in ``spent``."""
        wall, cpu = time.perf_counter(), self.cpu()
        yield
        self._wall += time.perf_counter() - wall
        self._cpu += self.cpu() - cpu

    def go_on(self, wall_seconds: float, cpu_seconds: float, peak_mb: float) -> None:
        """Count on from what ``spent`` said in a process before."""
        self._wall, self._cpu, self._peak = self._wall - wall_seconds, self._cpu - cpu_seconds, peak_mb

    def spent(self) -> dict[str, float]:
        """``wall_seconds``, ``cpu_seconds`` and ``peak_mb``."""
        seconds = time.perf_counter() - self._wall, self.cpu() - self._cpu
        found = {name: round(value, 2) for name, value in zip(("wall_seconds", "cpu_seconds"), seconds)}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            1e6 if sys.platform == "darwin" else 1e6 / 1024
        )
        return found | {"peak_mb": round(max(self._peak, peak), 1)}


class Method(ABC):
    """One way to get a policy. Its settings are the fields of a dataclass.

    Attributes:
        uses: settings of the comparison that decide its outcome; empty where it learns nothing, so that one
            run serves all seeds.
        tunes: whether it changes the policy's weights.
    """

    uses: ClassVar[tuple[str, ...]] = ()
    tunes: ClassVar[bool] = False

    def settings(self) -> dict[str, Any]:
        """What of its own decides its outcome, as JSON values."""
        return {"kind": type(self).__name__, **draccus.encode(self)}

    @abstractmethod
    def learn(self, run: Run) -> dict[str, Any]:
        """Learn, and tell ``run`` what can be evaluated; returns what else the record is to hold."""

    def chunks_before_learning(self) -> int:
        """How many are collected before it begins to learn."""
        return 0

    def needs_success(self) -> bool:
        """Whether it has nothing to learn from where the environment reports no success."""
        return self.tunes


@dataclass
class Run:
    """A run in progress: what a method may use, and what it has shown so far.

    Attributes:
        config: of the comparison.
        session: the frozen policy in the environment of the task.
        base: the same policy, and how it was loaded.
        vec: evaluation environments; training has its own.
        label: on progress bars.
        seed: of training.
        dataset: demonstrations, if any.
        kept: where the run keeps its checkpoints, and the settings that they belong to, if it keeps any.
        runner: what ``policies`` act through; a method that changes the weights replaces it.
        policies: to evaluate, by name; a method sets them before it calls ``note``.
        trained: weights that training made and each of them needs.
        save: writes what is deployed into a folder, given facts about the run.
        points, episodes: for the record.
    """

    config: CompareConfig
    session: Session
    base: LoadedBase
    vec: VectorEnv
    label: str
    seed: int
    dataset: DatasetConfig | None = None
    kept: tuple[Path, dict[str, Any]] | None = None
    runner: PolicyRunner = field(init=False)
    policies: Policies = field(init=False, default_factory=dict)
    trained: dict[str, int] = field(init=False, default_factory=dict)
    save: Callable[[Path, dict[str, Any]], Any] | None = field(init=False, default=None)
    points: list[dict[str, Any]] = field(init=False, default_factory=list)
    episodes: list[list[int]] = field(init=False, default_factory=list)
    _meter: Meter = field(init=False, default_factory=Meter)

    def __post_init__(self) -> None:
        self.runner = self.session.runner

    def checkpoints(
        self, world: ProcessGroup, metrics: list[Any]
    ) -> tuple[Checkpoints | None, Checkpoint | None]:
        """Where a trainer is to keep what it takes to go on; and the newest of an earlier attempt, if any.

        What the run had shown until then, and the lines of ``metrics``, lie beside it and are taken up here.
        """
        if self.kept is None or not self.config.checkpoint.every:
            return None, None
        folder, settings = self.kept
        shown: tuple[list[Any], ...] = self.points, self.episodes, metrics
        checkpoints = Checkpoints(
            *(folder, self.config.checkpoint, settings, world),
            beside=lambda: {"shown": shown, "spent": self._meter.spent()},
            resumed_by=SAME_COMMAND,
        )
        found, _ = checkpoints.newest()
        if found is not None and found.belongs != settings:
            shutil.rmtree(folder)
            return self.checkpoints(world, metrics)
        if found is not None:
            print(f"{self.label}: going on from {found.env_steps:,} environment steps", flush=True)
            for now, then in zip(shown, found.beside["shown"], strict=True):
                now[:] = then
            self._meter.go_on(**found.beside["spent"])
        return checkpoints, found

    def note(self, env_steps: int, ended: Iterable[tuple[bool, bool]]) -> None:
        """Tell the steps so far, and (success, steered) of the episodes that ended since the last call.

        Whenever the run passes a point of the grid, its policies are evaluated.
        """
        self.episodes += [[env_steps, int(success), int(steered)] for success, steered in ended]
        passed = env_steps // self.config.grid * self.config.grid
        if passed > (self.points[-1]["grid"] if self.points else 0):
            self.add_point(passed, env_steps)

    def add_point(self, grid: int, env_steps: int) -> None:
        """Evaluate now."""
        point = self.evaluate(self.session.eval.seeds, f"{self.label} at {env_steps}")
        self.points.append({"grid": grid, "env_steps": env_steps} | point)

    def evaluate(self, seeds: list[int], label: str) -> Summaries:
        """Summaries of the policies on ``seeds``, by name; the time for it does not count as training."""
        with self._meter.paused():
            found = measure(self.runner, self.vec, self.policies, seeds, label)
            print(f"{label}: {'; '.join(f'{n} {rate_text(one)}' for n, one in found.items())}", flush=True)
        return found

    def record(self, method: Method, others: dict[str, EnvConfig], path: Path, video: bool) -> dict[str, Any]:
        """Let ``method`` learn, and return all that is to be known of it.

        Args:
            others: environments of the policy's other tasks, by name.
            path: where to save what is deployed, a folder; a ``video`` gets its name.

        Returns:
            ``points``: at each point of the grid the summary of each policy, with each episode's outcome:
            ``actor`` (what is deployed), of some algorithms also ``acting`` (best of K), of what learns
            nothing ``policy``. ``final``: as a point, on the final seeds. ``episodes``: [environment step at
            its end, success, steered] of each training episode. ``others``, ``base_elsewhere``: the other
            tasks by policy, and by the base after training. ``cost``; and what the method adds.
        """
        session = self.session
        identity = session.adapter.identity(self.base.folder)
        found = method.learn(self)
        spent = self._meter.spent()
        found |= {"points": self.points, "episodes": self.episodes}
        found["final"] = self.evaluate(self.config.final_seeds, f"{self.label}, final")
        if self.save:
            env = draccus.encode(session.env, EnvConfig)
            facts = {"env": env, "seed": self.seed, "env_steps": self.config.env_steps}
            self.save(path, facts | {"deterministic": True})
        found["cost"] = {
            **spent,
            "peak_mb": self._meter.spent()["peak_mb"],  # of evaluations, too
            "trainable_parameters": self.trained or dict.fromkeys(self.policies, 0),
            "artefact_bytes": folder_bytes(path),
        }
        found["others"] = self._elsewhere(others, self.policies)
        if method.uses and not method.tunes:  # the base's weights are as they were
            found["base_elsewhere"] = self._elsewhere(others, {"policy": session.own_noise})
        if video:
            if method.tunes:
                session = Session(self.runner.adapter, session.env, session.eval, session.machine)
            policy = list(self.policies.values())[-1]
            session.record({path.with_suffix(".mp4"): policy})
        self.base.adapter.check_identity(identity, self.base.folder)
        return found

    def _elsewhere(self, others: dict[str, EnvConfig], policies: Policies) -> dict[str, Summaries]:
        """Evaluate ``policies`` on the other tasks: task -> policy -> summary with outcomes."""
        found = {}
        for task, env in others.items():
            episodes = replace(self.session.eval, n_episodes=self.config.other_episodes)
            other = Session(self.session.adapter, env, episodes, self.session.machine)
            with other.evaluation_environments() as vec:
                found[task] = measure(self.runner, vec, policies, episodes.seeds, f"{self.label}, {task}")
        return found


def measure(
    runner: PolicyRunner, vec: VectorEnv, policies: Policies, seeds: list[int], label: str
) -> Summaries:
    """Evaluate each policy; whatever draws it makes, training goes on with its own.

    Returns:
        by name, the summary with each episode's outcome in the order of the seeds: ``won`` (1 or 0, where
        success is reported) and ``returns``.
    """
    found = {}
    for name, policy in policies.items():
        with torch.random.fork_rng(devices=[]):
            outcome = evaluate(runner, vec, policy, seeds, f"{label}, {name}")
        won = "".join(str(int(won)) for won in outcome.successes) if outcome.reported else ""
        found[name] = outcome.summary() | {"won": won, "returns": outcome.returns.tolist()}
    return found


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
