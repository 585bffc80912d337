"""One run of a comparison: a method learns a task, is evaluated on the way, and leaves a record."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import draccus
import torch
from lerobot.configs.default import DatasetConfig
from lerobot.envs.configs import EnvConfig

from trimtab.policies.acting import ChunkPolicy
from trimtab.recipes.compare.config import CompareConfig
from trimtab.recipes.compare.meter import Meter
from trimtab.recipes.support.session import Session
from trimtab.rl.algorithms.acting import LoadedBase
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.evaluation import evaluate, require_success
from trimtab.rl.runner import PolicyRunner

Policies = dict[str, ChunkPolicy]


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


@dataclass
class Task:
    """One task of a comparison: the frozen policy, its episodes, and where the runs go.

    Attributes:
        config: of the comparison.
        session: the policy in the environment, with the task.
        base: the same policy, and how it was loaded.
        others: environments of the policy's other tasks, by name.
        dataset: demonstrations, if any.
        folder: of the task's records, videos and artefacts.
    """

    config: CompareConfig
    session: Session
    base: LoadedBase
    others: dict[str, EnvConfig]
    dataset: DatasetConfig | None
    folder: Path

    @contextmanager
    def begin(self, label: str, seed: int) -> Iterator[Run]:
        """A run, with its evaluation environments."""
        meter = Meter()
        with self.session.evaluation_environments() as vec:
            yield Run(self, vec, meter, label, seed, self.session.runner)

    def record(self, name: str, method: Method, seed: int | None) -> dict[str, Any]:
        """Run ``method`` and return its record.

        Returns:
            ``points``: at each point of the grid the summary of each policy, with each episode's outcome:
            ``actor`` (what is deployed), of some algorithms also ``acting`` (best of K), of what learns
            nothing ``policy``. ``final``: as a point, on the final seeds. ``episodes``: [environment step at
            its end, success, steered] of each training episode. ``others``, ``base_elsewhere``: the other
            tasks by policy, and by the base after training. ``cost``; and what the method adds.
        """
        label = f"{name}, {self.session.env.task}" + ("" if seed is None else f", seed {seed}")
        path = self.folder / (name if seed is None else f"{name}-seed{seed}")
        adapter = self.session.adapter
        identity = adapter.identity(self.base.folder)
        with self.begin(label, seed or 0) as run:
            found = method.learn(run)
            spent = run.spent()
            found |= {"points": run.points, "episodes": run.episodes}
            found["final"] = run.evaluate(self.config.final_seeds, f"{label}, final")
            saved = run.save(path, self._facts(run.seed))
            found["cost"] = {
                **run.meter.peak(),
                **(spent if method.uses else dict.fromkeys(spent, 0.0)),
                "trainable_parameters": run.trained or dict.fromkeys(run.policies, 0),
                "artefact_bytes": folder_bytes(saved) if saved else 0,
            }
            if method.uses or name == "base":
                found["others"] = self._elsewhere(run.runner, run.policies, label)
            if method.uses and run.runner.adapter is adapter:  # the base's weights are as they were
                own = {"policy": self.session.own_noise}
                found["base_elsewhere"] = self._elsewhere(run.runner, own, f"{label}, base")
            if seed in (None, self.config.seed_list()[0]):
                policy = list(run.policies.values())[-1]
                session, acting = self.session, run.runner.adapter
                if acting is not adapter:
                    session = Session(acting, session.env, session.eval, session.machine)
                session.record(policy, path.with_suffix(".mp4"), f"video: {label}")
        adapter.check_identity(identity, self.base.folder)
        return found

    def _facts(self, seed: int) -> dict[str, Any]:
        """What an artefact says of the run that made it."""
        env = draccus.encode(self.session.env, EnvConfig)
        return {"env": env, "seed": seed, "env_steps": self.config.env_steps, "deterministic": True}

    def _elsewhere(
        self, runner: PolicyRunner, policies: Policies, label: str
    ) -> dict[str, dict[str, dict[str, Any]]]:
        """Evaluate ``policies`` on the other tasks: task -> policy -> summary with outcomes."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for task, env in self.others.items():
            other = Session(self.session.adapter, env, self.session.eval, self.session.machine)
            count = min(len(self.config.other_seeds), self.session.eval.batch_size)
            with other.environments(count, other.evaluation_workers) as vec:
                found[task] = {
                    name: measure(runner, vec, policy, self.config.other_seeds, f"{label}, {task}")
                    for name, policy in policies.items()
                }
        return found


@dataclass
class Run:
    """A run in progress: what a method may use, and what it has shown so far.

    Attributes:
        task: what is learnt.
        vec: evaluation environments; training has its own.
        meter: what the run costs.
        label: on progress bars.
        seed: of training.
        runner: what ``policies`` act through; a method that changes the weights replaces it.
        policies: to evaluate, by name; a method sets them before it calls ``note``.
        trained: weights that training made and each of them needs.
        save: writes what is deployed under a folder, given facts about the run; returns where.
        points, episodes: for the record.
    """

    task: Task
    vec: ChunkVectorEnv
    meter: Meter
    label: str
    seed: int
    runner: PolicyRunner
    policies: Policies = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)
    save: Callable[[Path, dict[str, Any]], Path | None] = lambda folder, facts: None
    points: list[dict[str, Any]] = field(default_factory=list)
    episodes: list[list[int]] = field(default_factory=list)
    _wall: float = field(default_factory=time.perf_counter)
    _cpu: float = 0.0

    def __post_init__(self) -> None:
        self._cpu = self.meter.cpu()

    def training_environments(self, count: int | None = None, keep_seen: bool = False) -> ChunkVectorEnv:
        """``count`` environments (default: as many as the task says); ``keep_seen`` as there."""
        session, count = self.task.session, count or self.task.config.num_envs
        history = session.adapter.n_obs_steps
        return ChunkVectorEnv(session.env, count, session.machine.workers, history, keep_seen=keep_seen)

    def note(self, env_steps: int, ended: Iterable[tuple[bool, bool]]) -> None:
        """Tell the steps so far, and (success, steered) of the episodes that ended since the last call.

        Whenever the run passes a point of the grid, its policies are evaluated.
        """
        self.episodes += [[env_steps, int(success), int(steered)] for success, steered in ended]
        grid = self.task.config.grid
        passed = env_steps // grid * grid
        if passed > (self.points[-1]["grid"] if self.points else 0):
            self.add_point(passed, env_steps)

    def add_point(self, grid: int, env_steps: int) -> None:
        """Evaluate now."""
        point = self.evaluate(self.task.session.eval.seeds, f"{self.label} at {env_steps}")
        self.points.append({"grid": grid, "env_steps": env_steps} | point)

    def evaluate(self, seeds: list[int], label: str) -> dict[str, dict[str, Any]]:
        """Summaries of the policies on ``seeds``, by name; the time for it does not count as training."""
        wall, cpu = time.perf_counter(), self.meter.cpu()
        found = {
            name: measure(self.runner, self.vec, policy, seeds, f"{label}, {name}")
            for name, policy in self.policies.items()
        }
        rates = (f"{name} {entry['successes']}/{entry['episodes']}" for name, entry in found.items())
        print(f"{label}: {', '.join(rates)}", flush=True)
        self._wall += time.perf_counter() - wall
        self._cpu += self.meter.cpu() - cpu
        return found

    def spent(self) -> dict[str, float]:
        """``wall_seconds`` and ``cpu_seconds`` of training so far."""
        return {
            "wall_seconds": round(time.perf_counter() - self._wall, 2),
            "cpu_seconds": round(self.meter.cpu() - self._cpu, 2),
        }


def measure(
    runner: PolicyRunner, vec: ChunkVectorEnv, policy: ChunkPolicy, seeds: list[int], label: str
) -> dict[str, Any]:
    """Evaluate; whatever draws it makes, training goes on with its own.

    Returns:
        the summary with each episode's outcome, 1 or 0, in the order of the seeds; and the longest one.
    """
    with torch.random.fork_rng(devices=[]):
        outcome = evaluate(runner, vec, policy, seeds, label, progress=sys.stderr.isatty())
    require_success(outcome)
    won = "".join(str(int(success)) for success in outcome.successes)
    return outcome.summary() | {"won": won, "longest": int(outcome.steps.max())}


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
