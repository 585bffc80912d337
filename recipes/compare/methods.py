"""The methods that `trimtab compare` knows, and one run of one of them: a record and its artefact."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import draccus
import torch
from draccus.utils import DecodingError
from lerobot.configs.default import DatasetConfig
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import PolicyAdapter, PolicyConfig, UserError, load_adapter
from trimtab.policies.acting import ChunkPolicy
from trimtab.policies.noise_samplers import zero_noise
from trimtab.policies.noise_space import ConstantNoiseConfig, NoiseSpaceConfig
from trimtab.recipes.bench.methods import METHODS as BENCH
from trimtab.recipes.bench.methods import Method, Policies, Recorder, Setup, run_method
from trimtab.recipes.cli.lora import DATASET_STEPS
from trimtab.recipes.compare.meter import Meter
from trimtab.recipes.finetune.training import FineTuner, TuningConfig
from trimtab.recipes.support.session import Session
from trimtab.rl.algorithms import AlgorithmConfig, BestOfNConfig, GoldenTicketConfig
from trimtab.rl.algorithms.acting import Learnt, LoadedBase
from trimtab.rl.budget import TrainConfig
from trimtab.rl.data.demonstration_data import DemosConfig, read_demonstrations
from trimtab.rl.evaluation import Evaluation, evaluate, require_success
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.trainer import Trainer

# These learn nothing: one run of them serves all seeds.
FIXED = ("base", "zero_noise")
DEMONSTRATIONS = "lora"

METHODS: dict[str, Method | None] = {
    "base": None,
    "zero_noise": None,
    "golden_ticket": Method(GoldenTicketConfig(candidates=16, budget=100), ConstantNoiseConfig()),
    "best_of_k": Method(BestOfNConfig()),
    "steered": Method(BestOfNConfig()),  # the defaults of `trimtab adapt`
    DEMONSTRATIONS: Method(None, tuning=TuningConfig()),
    "lora_rollouts": Method(None, tuning=TuningConfig()),
    **BENCH,
}


def customised(name: str, changes: dict[str, Any] | None) -> Method | None:
    """The method ``name`` with ``changes`` to its ``rl``, ``noise``, ``train``, ``tuning`` or ``num_envs``.

    Raises:
        UserError: no such setting, or a value that it cannot have.
    """
    method, option = METHODS[name], f"--settings.{name}"
    if not changes:
        return method
    parts = {"rl": AlgorithmConfig, "noise": NoiseSpaceConfig, "train": TrainConfig, "tuning": TuningConfig}
    have = [] if method is None else [part for part in parts if getattr(method, part) is not None]
    found: dict[str, Any] = {}
    for part, fields in changes.items():
        if part == "num_envs" and "rl" in have:
            found[part] = fields
            continue
        if part not in have or not isinstance(fields, dict):
            raise UserError(
                option, f"'{part}' is none of {', '.join(have) or 'anything: it has no settings'}"
            )
        old = draccus.encode(getattr(method, part), parts[part])
        kind = fields.get("type", old.get("type"))
        start = old if kind == old.get("type") else {"type": kind}
        try:
            found[part] = draccus.decode(parts[part], _merged(start, fields))
        except DecodingError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise UserError(f"{option}.{part}", str(getattr(error, "message", error))) from None
    return replace(method, **found)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new`` over ``old``, table by table."""
    both = {
        k: _merged(old[k], v) for k, v in new.items() if isinstance(v, dict) and isinstance(old.get(k), dict)
    }
    return old | new | both


def check_budget(name: str, method: Method | None, env_steps: int, chunk_steps: int) -> None:
    """Refuse a budget within which a method would not begin to learn."""
    if method is None or method.rl is None or not method.rl.replays:
        return
    train = method.train.at_pace_of(method.rl)
    needed = max(train.first_update, train.warmup_transitions)
    if needed * chunk_steps >= env_steps:
        raise UserError(
            "--env_steps",
            f"{name} begins to learn after {needed} chunks of {chunk_steps} steps; more than "
            f"{needed * chunk_steps} are needed, or leave it out of --methods",
        )


def with_outcomes(outcome: Evaluation) -> dict[str, Any]:
    """The summary with each episode's outcome, 1 or 0, in the order of the seeds; and the longest one."""
    require_success(outcome)
    won = "".join(str(int(success)) for success in outcome.successes)
    return outcome.summary() | {"won": won, "longest": int(outcome.steps.max())}


class PairedSetup(Setup):
    """A setup whose measurements keep the outcome of each episode."""

    def measure(self, runner: PolicyRunner, policy: ChunkPolicy, seeds: list[int], label: str) -> dict:
        """As ``Setup.measure``, with outcomes."""
        with torch.random.fork_rng(devices=[]):
            outcome = evaluate(runner, self.vec, policy, seeds, label, progress=sys.stderr.isatty())
        return with_outcomes(outcome)


@dataclass
class Bout:
    """One task of a comparison: the frozen policy, its episodes and where the runs go.

    Attributes:
        session: the policy in the environment, with the task.
        policy, folder: how the base was loaded, and from where.
        env_steps, grid, num_envs: of each run.
        seeds, final_seeds: episodes of each point of the grid, and of the end.
        others: environments of the policy's other tasks, by name, and
        other_seeds: their episodes.
        dataset: demonstrations for ``lora``, if any.
        where: folder of the task's records, videos and artefacts.
        filmed: the seed whose runs leave videos.
    """

    session: Session
    policy: PolicyConfig
    folder: Path | str
    env_steps: int
    grid: int
    num_envs: int
    seeds: list[int]
    final_seeds: list[int]
    others: dict[str, EnvConfig]
    other_seeds: list[int]
    dataset: DatasetConfig | None
    where: Path
    filmed: int = 0

    @property
    def adapter(self) -> PolicyAdapter:
        return self.session.adapter

    @contextmanager
    def setup(self, meter: Meter) -> Iterator[PairedSetup]:
        """Evaluation environments, and all that a run of the bench needs."""
        session = self.session
        with session.evaluation_environments() as vec:
            yield PairedSetup(
                adapter=self.adapter,
                folder=self.folder,
                env=session.env,
                vec=vec,
                env_steps=self.env_steps,
                grid=self.grid,
                seeds=self.seeds,
                final_seeds=self.final_seeds,
                num_envs=self.num_envs,
                workers=session.machine.workers,
                policy=self.policy,
                cpu=meter.cpu,
            )

    def elsewhere(self, policies: Policies, label: str) -> dict[str, dict[str, Any]]:
        """Evaluate ``policies`` on the other tasks: task -> policy -> summary with outcomes."""
        found: dict[str, dict[str, Any]] = {}
        for task, env in self.others.items():
            other = Session(self.adapter, env, self.session.eval, self.session.machine)
            count = min(len(self.other_seeds), self.session.eval.batch_size)
            with other.environments(count, other.evaluation_workers) as vec:
                found[task] = {}
                for name, (runner, source) in policies.items():
                    outcome = evaluate(
                        runner,
                        vec,
                        source,
                        self.other_seeds,
                        f"{label}, {task}",
                        progress=sys.stderr.isatty(),
                    )
                    found[task][name] = with_outcomes(outcome)
        return found

    def own(self) -> Policies:
        """The base as it is."""
        return {"policy": (self.session.runner, self.session.own_noise)}

    def fixed(self, name: str) -> dict[str, Any]:
        """The record of a policy that learns nothing; the base's holds its other tasks, too."""
        meter, label = Meter(), f"{name}, {self.session.env.task}"
        source = self.session.own_noise if name == "base" else zero_noise
        policies: Policies = {"policy": (self.session.runner, source)}
        with self.setup(meter) as setup:
            record = self._no_learning(Recorder(setup, label, lambda: policies), label)
        cost = meter.read() | {"trainable_parameters": {"policy": 0}, "artefact_bytes": 0}
        found = record | {"cost": cost | {"wall_seconds": 0.0, "cpu_seconds": 0.0}}
        if name == "base":
            found["others"] = self.elsewhere(policies, label)
        self.session.record(source, self.where / f"{name}.mp4", f"video: {label}")
        return found

    def _no_learning(self, recorder: Recorder, label: str) -> dict[str, Any]:
        """Both evaluations of what does not change with environment steps."""
        point = {"grid": 0, "env_steps": 0, **recorder.evaluate(self.seeds, label)}
        record: dict[str, Any] = {"points": [point], "episodes": []}
        return record | {"final": recorder.evaluate(self.final_seeds, f"{label}, final")}

    def run(self, name: str, method: Method, seed: int) -> dict[str, Any]:
        """The record of one run of a method that learns."""
        meter, label = Meter(), f"{name}, {self.session.env.task}, seed {seed}"
        place = self.where / f"{name}-seed{seed}"

        def after(recorder: Recorder, learner: Any) -> dict[str, Any]:
            policies = recorder.policies()
            before = meter.read()["peak_mb"]
            cost = {"artefact_bytes": self.save(learner, method, seed, place), "peak_mb": before}
            found = {"cost": cost | {"trainable_parameters": trained(learner, policies)}}
            found["others"] = self.elsewhere(policies, label)
            if self.frozen(learner):
                found["base_elsewhere"] = self.elsewhere(self.own(), f"{label}, base")
            if seed == self.filmed:
                _, policy = policies.get("acting") or policies["actor"]
                self.session.record(policy, place.with_suffix(".mp4"), f"video: {label}")
            return found

        identity = self.adapter.identity(self.folder)
        with self.setup(meter) as setup:
            if name == DEMONSTRATIONS:
                record = self._demonstrations(method, setup, seed, label, after)
            else:
                if method.rl is not None:
                    rl = method.rl.within(self.env_steps, lambda: self.longest(setup))
                    method = replace(method, rl=rl)
                record = run_method(method, setup, seed, label, after)
        self.adapter.check_identity(identity, self.folder)
        seconds = record["seconds"]
        record["cost"] |= {"wall_seconds": seconds["training"], "cpu_seconds": seconds["training_cpu"]}
        return record

    def frozen(self, learner: Any) -> bool:
        """Whether the base's weights stayed as they were in what is deployed."""
        return not isinstance(learner, FineTuner)

    def longest(self, setup: Setup) -> int:
        """Steps of the base's longest episode, of a few."""
        seeds = setup.seeds[:8]
        outcome = evaluate(self.session.runner, setup.vec, self.session.own_noise, seeds, progress=False)
        return int(outcome.steps.max())

    def save(self, learner: Any, method: Method, seed: int, place: Path) -> int:
        """Write what is deployed under ``place``; its bytes."""
        if isinstance(learner, FineTuner):
            learner.save(place / "policy")
            return folder_bytes(place / "policy")
        learnt = learner.algorithm if isinstance(learner, Trainer) else learner
        if not isinstance(learnt, Learnt):  # an engine of another library
            return 0
        training = {
            "env": draccus.encode(self.session.env, EnvConfig),
            "seed": seed,
            "env_steps": self.env_steps,
            "deterministic": True,
            "algorithm": method.rl.type,
        }
        base = LoadedBase(self.adapter, self.policy, self.folder)
        return folder_bytes(learnt.save(place, base, method.noise, training))

    def _demonstrations(
        self,
        method: Method,
        setup: Setup,
        seed: int,
        label: str,
        after: Callable[[Recorder, Any], dict[str, Any]],
    ) -> dict[str, Any]:
        """Fine-tune on the demonstrations of the task that succeed."""
        started, cpu = time.perf_counter(), setup.cpu()
        dataset, count = self.good_demonstrations()
        tuner = FineTuner(load_adapter(self.policy), self.folder, self.policy, method.tuning)
        losses = tuner.fit(dataset, method.tuning.steps or DATASET_STEPS, seed, label)
        seconds = {
            "training": round(time.perf_counter() - started, 2),
            "training_cpu": round(setup.cpu() - cpu, 2),
        }
        runner = PolicyRunner(tuner.adapter, setup.env)
        recorder = Recorder(setup, label, lambda: {"actor": (runner, self.session.own_noise)})
        record = self._no_learning(recorder, label)
        record |= {"demonstrations": count, "updates": len(losses), "loss": losses[-1], "seconds": seconds}
        return record | after(recorder, tuner)

    def good_demonstrations(self) -> tuple[DatasetConfig, int]:
        """The demonstrations of this task that succeed, and how many they are.

        Raises:
            UserError: there are none.
        """
        if self.dataset is None:
            raise UserError(
                "--dataset.repo_id", f"'{DEMONSTRATIONS}' learns from demonstrations; name a LeRobotDataset"
            )
        chosen = DemosConfig(
            repo_id=self.dataset.repo_id, root=self.dataset.root, revision=self.dataset.revision
        )
        with self.session.environments(1, 0) as vec:
            task = vec.task_descriptions[0]
        data = read_demonstrations(chosen, self.adapter, "sparse", task)
        index = data.dataset.hf_dataset.with_format("numpy")["episode_index"][:]
        good = [int(index[episode.first]) for episode in data.episodes if episode.succeeded]
        if self.dataset.episodes is not None:
            good = [number for number in good if number in self.dataset.episodes]
        if not good:
            raise UserError("--dataset.repo_id", f"no demonstration of '{task}' succeeds: nothing to clone")
        return replace(self.dataset, episodes=sorted(good)), len(good)


def trained(learner: Any, policies: Policies) -> dict[str, int]:
    """Weights that training made and each policy needs, by its name."""
    if isinstance(learner, FineTuner):
        return dict.fromkeys(policies, learner.trained_parameters)
    learnt = learner.algorithm if isinstance(learner, Trainer) else learner
    if isinstance(learnt, Learnt):
        return learnt.trained_parameters()
    return {name: sum(p.numel() for p in learnt.actor.parameters()) for name in policies}


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
