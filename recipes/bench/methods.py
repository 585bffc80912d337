"""What the bench compares: named settings, and one run of them on one task and seed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import PolicyAdapter
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpaceConfig, RepeatNoiseConfig
from trimtab.policies.sources import NoiseSource, base_noise, steered_noise
from trimtab.rl.algorithms import AlgorithmConfig, BestOfNConfig, DSRLSACConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.evaluation import evaluate
from trimtab.rl.gate import GateConfig
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.selection import SelectingRunner
from trimtab.rl.train import TrainConfig, Trainer, training_seed


@dataclass(frozen=True)
class Method:
    """Settings of ``trimtab adapt``; without ``rl``, stable-baselines3's SAC (``wrapper.py``)."""

    rl: AlgorithmConfig | None
    noise: NoiseSpaceConfig = field(default_factory=FullNoiseConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def settings(self) -> dict[str, Any]:
        """All of it, for JSON."""
        noise = {"type": self.noise.type, **asdict(self.noise)}
        if self.rl is None:
            from trimtab.recipes.bench.wrapper import SB3SACConfig

            return {"engine": "stable-baselines3", "sac": asdict(SB3SACConfig()), "noise": noise}
        rl, train = {"type": self.rl.type, **asdict(self.rl)}, asdict(self.train)
        for name in ("env_steps", "log_every"):  # the bench's own
            train.pop(name)
        return {"engine": "trimtab", "rl": rl, "noise": noise, "train": train}


def _early(**fields: Any) -> TrainConfig:
    """Learn from the first transitions on, one update per transition; no warm-up."""
    defaults = {"first_update": 64, "warmup_transitions": 0, "updates_per_transition": 1.0}
    return TrainConfig(**(defaults | fields))


METHODS: dict[str, Method] = {
    "best_of_n": Method(BestOfNConfig(), train=_early()),
    "best_of_n_regression": Method(BestOfNConfig(distillation="regression"), train=_early()),
    "best_of_n_repeat": Method(BestOfNConfig(), RepeatNoiseConfig(), _early()),
    "best_of_n_gate": Method(BestOfNConfig(), train=_early(gate=GateConfig(enabled=True))),
    "best_of_n_bf16": Method(BestOfNConfig(precision="bfloat16"), train=_early()),
    "dsrl_sac": Method(DSRLSACConfig(), RepeatNoiseConfig()),  # as `trimtab demo`
    "dsrl_sac_bf16": Method(DSRLSACConfig(precision="bfloat16"), RepeatNoiseConfig()),
    "dsrl_sac_full": Method(DSRLSACConfig()),
    "dsrl_sac_full_bf16": Method(DSRLSACConfig(precision="bfloat16")),
    "sb3_sac": Method(None),
}


@dataclass
class Setup:
    """What all runs of a bench share, and one task's environments.

    Attributes:
        adapter: the frozen policy.
        env: the task.
        vec: evaluation environments; training has its own.
        env_steps: training steps of a run.
        grid: steps between two evaluations.
        seeds: evaluation episodes of each grid point.
        final_seeds: of the evaluation at the end; none leaves it out.
        num_envs, workers: of training.
    """

    adapter: PolicyAdapter
    env: EnvConfig
    vec: ChunkVectorEnv
    env_steps: int
    grid: int
    seeds: list[int]
    final_seeds: list[int]
    num_envs: int = 8
    workers: int = 1

    def training_environments(self) -> ChunkVectorEnv:
        return ChunkVectorEnv(self.env, self.num_envs, self.workers, self.adapter.n_obs_steps)

    def measure(self, runner: PolicyRunner, source: NoiseSource, seeds: list[int], label: str) -> dict:
        """Evaluate; whatever draws it makes, training goes on with its own."""
        with torch.random.fork_rng(devices=[]):
            return evaluate(runner, self.vec, source, seeds, label, progress=sys.stderr.isatty()).summary()


Policies = dict[str, tuple[PolicyRunner, NoiseSource]]


class Recorder:
    """Notes each training episode, and evaluates whenever the run passes a point of the grid.

    Args:
        setup: what to evaluate on.
        label: of the run, on progress bars.
        policies: to evaluate, by name; asked for at each point.
    """

    def __init__(self, setup: Setup, label: str, policies: Callable[[], Policies]) -> None:
        self.setup, self.label, self.policies = setup, label, policies
        self.points: list[dict[str, Any]] = []
        self.episodes: list[list[int]] = []  # [environment step of the end, success, steered]
        self.seconds = 0.0
        self._passed = 0

    def __call__(self, env_steps: int, ended: list[tuple[bool, bool]]) -> None:
        """Tell the steps so far, and (success, steered) of the episodes that ended since the last call."""
        self.episodes += [[env_steps, int(success), int(steered)] for success, steered in ended]
        passed = env_steps // self.setup.grid
        if passed > self._passed:
            self._passed = passed
            point: dict[str, Any] = {"grid": passed * self.setup.grid, "env_steps": env_steps}
            self.points.append(point | self.evaluate(self.setup.seeds, f"{self.label} at {env_steps}"))

    def evaluate(self, seeds: list[int], label: str) -> dict[str, Any]:
        """Summaries of the policies on ``seeds``, by name."""
        started = time.perf_counter()
        found = {
            name: self.setup.measure(runner, source, seeds, f"{label}, {name}")
            for name, (runner, source) in self.policies().items()
        }
        rates = (f"{name} {entry['successes']}/{entry['episodes']}" for name, entry in found.items())
        print(f"{label}: {', '.join(rates)}", flush=True)
        self.seconds += time.perf_counter() - started
        return found


def run_base(setup: Setup, seeds: list[int]) -> dict[str, Any]:
    """The base under its own noise."""
    runner = PolicyRunner(setup.adapter, setup.env)
    return setup.measure(runner, base_noise, seeds, f"base, {setup.env.task}")


def run_method(method: Method, setup: Setup, seed: int, label: str) -> dict[str, Any]:
    """Train ``method`` on the setup's task and evaluate it on the grid.

    Returns:
        ``points``: at each grid point the summary of each policy: ``actor`` (its mean; what is deployed) and,
        of an algorithm that selects, ``acting`` (best of its candidates). ``episodes``: [environment step at
        its end, success, steered] of each training episode. ``final``: as a point, on the final seeds.
        ``updates``, ``metrics`` (of our trainer) and ``seconds``.
    """
    started = time.perf_counter()
    cpu = time.process_time()
    train = _run_sb3 if method.rl is None else _run_trainer
    recorder, found = train(method, setup, seed, label)
    training = time.perf_counter() - started - recorder.seconds
    if setup.final_seeds:
        found["final"] = recorder.evaluate(setup.final_seeds, f"{label}, final")
    seconds = {
        "training": round(training, 2),
        "evaluation": round(recorder.seconds, 2),
        "process_cpu": round(time.process_time() - cpu, 2),
    }
    return {"points": recorder.points, "episodes": recorder.episodes, **found, "seconds": seconds}


def _run_trainer(method: Method, setup: Setup, seed: int, label: str) -> tuple[Recorder, dict[str, Any]]:
    from accelerate import Accelerator

    adapter, lines = setup.adapter, []
    runner = PolicyRunner(adapter, setup.env)
    with setup.training_environments() as vec:
        trainer = Trainer(
            PolicyRunner(adapter, setup.env),
            vec,
            Accelerator(cpu=adapter.device.type == "cpu"),
            replace(method.train, env_steps=setup.env_steps, log_every=setup.grid),
            method.rl,
            method.noise,
            seed,
            on_metrics=lines.append,
            progress=False,
        )
        algorithm = trainer.algorithm
        policies: Policies = {"actor": (runner, steered_noise(algorithm.actor, deterministic=True))}
        if algorithm.selects:
            best = SelectingRunner(adapter, setup.env, trainer.space, algorithm.select, algorithm.candidates)
            policies["acting"] = (best, base_noise)
        recorder = Recorder(setup, label, lambda: policies)
        trainer.on_step = lambda ended: recorder(
            trainer.env_steps, [(episode.success, episode.steered) for episode in ended]
        )
        trainer.run()
    return recorder, {"updates": trainer.updates, "metrics": lines}


def _run_sb3(method: Method, setup: Setup, seed: int, label: str) -> tuple[Recorder, dict[str, Any]]:
    from trimtab.recipes.bench.wrapper import NoiseVecEnv, SB3SACConfig, learn, make_sac, sb3_noise

    config, adapter = SB3SACConfig(), setup.adapter
    space = method.noise.build(adapter.noise_spec)
    runner = PolicyRunner(adapter, setup.env)
    with setup.training_environments() as vec:
        train_runner = PolicyRunner(adapter, setup.env)
        env = NoiseVecEnv(train_runner, vec, space, config.gamma, config.reward, training_seed(seed))
        model = make_sac(config, env, adapter.chunk_shape[0], seed)
        policies: Policies = {"actor": (runner, sb3_noise(model, space))}
        recorder = Recorder(setup, label, lambda: policies)
        learn(model, env, setup.env_steps, lambda step, ended: recorder(step, [(won, True) for won in ended]))
    return recorder, {"updates": model._n_updates}
