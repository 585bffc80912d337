"""What the bench compares: named settings, and one run of them on one task and seed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import draccus
import torch
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import PolicyAdapter, PolicyConfig, load_adapter
from trimtab.policies.acting import ChunkPolicy
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_samplers import base_noise
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpaceConfig, RepeatNoiseConfig
from trimtab.recipes.finetune.data import Recorder as SuccessRecorder
from trimtab.recipes.finetune.filtered_bc import rounds
from trimtab.recipes.finetune.rollouts import Rollouts
from trimtab.recipes.finetune.training import FineTuner, TuningConfig
from trimtab.rl.algorithms import AlgorithmConfig, BestOfNConfig, DSRLNAConfig, DSRLSACConfig, ResidualConfig
from trimtab.rl.algorithms.presets import PAPER
from trimtab.rl.budget import TrainConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.evaluation import evaluate, require_success
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.seeds import training_seed
from trimtab.rl.takeover import GateConfig
from trimtab.rl.trainer import Trainer


@dataclass(frozen=True)
class Method:
    """Settings of ``trimtab adapt``; without ``rl``, of ``trimtab lora --from_rollouts`` (``tuning``), or
    else a run of its own (``train_alone``, of which ``other`` are the settings).
    """

    rl: AlgorithmConfig | None
    noise: NoiseSpaceConfig = field(default_factory=FullNoiseConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tuning: TuningConfig | None = None
    # Training environments, where the method's source says how many.
    num_envs: int | None = None
    train_alone: Callable[..., Ran] | None = None
    other: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """All of it, for JSON."""
        if self.tuning is not None:
            return {"engine": "filtered behaviour cloning", "tuning": draccus.encode(self.tuning)}
        noise = {"type": self.noise.type, **asdict(self.noise)}
        if self.rl is None:
            return self.other | {"noise": noise}
        rl, train = {"type": self.rl.type, **asdict(self.rl)}, asdict(self.train.at_pace_of(self.rl))
        for name in ("env_steps", "log_every"):  # the bench's own
            train.pop(name)
        settings = {"engine": "trimtab", "rl": rl, "noise": noise, "train": train}
        return settings if self.num_envs is None else settings | {"num_envs": self.num_envs}


def _paper(algorithm: str, **train: Any) -> Method:
    """``--rl.preset=paper``."""
    settings = PAPER[algorithm]
    rl = draccus.decode(AlgorithmConfig, {"type": algorithm, **settings["rl"]})
    noise = draccus.decode(NoiseSpaceConfig, settings["noise"])
    train = TrainConfig(**(settings["train"] | train))
    return Method(rl, noise, train, num_envs=settings["num_envs"])


def _as_sb3() -> Method:
    """Our DSRL-SAC with all settings of ``SB3SACConfig``, to be compared with ``sb3_sac``."""
    network = {"hidden": 128, "layers": 3}
    rl = DSRLSACConfig(
        n_step=1,
        actor=ActorConfig(**network, log_std_min=-20.0, log_std_max=2.0, mean_limit=1.0),
        critic=CriticConfig(**network, layer_norm=False),
        actor_every=1,
        initial_temperature=0.01,
        backup_entropy=True,
        clip_targets=False,
    )
    return Method(rl, train=TrainConfig(first_update=800, catch_up=False, updates_per_transition=1.0))


METHODS: dict[str, Method] = {
    "best_of_n": Method(BestOfNConfig()),
    # The actor climbs at draws alone, not at its mean too.
    "best_of_n_draws": Method(BestOfNConfig(mean_share=0.0)),
    # Every member in a target instead of two of them.
    "best_of_n_all_members": Method(BestOfNConfig(target_members=5)),
    # What it was with two critics; it made up for them by more updates.
    "best_of_n_two_critics": Method(
        BestOfNConfig(critic=CriticConfig(members=2), distilled_pairs=8, mean_share=0.0),
        train=TrainConfig(updates_per_transition=3.0),
    ),
    # What its defaults change, one by one: proposals of the actor, cross-entropy, ten-chunk returns, ...
    "best_of_n_prior": Method(BestOfNConfig(actor_candidates=0)),
    "best_of_n_squared": Method(BestOfNConfig(critic_loss="squared")),
    "best_of_n_short": Method(BestOfNConfig(n_step=3)),
    "best_of_n_regression": Method(BestOfNConfig(distillation="regression")),
    "best_of_n_repeat": Method(BestOfNConfig(), RepeatNoiseConfig()),
    "best_of_n_gate": Method(BestOfNConfig(), train=TrainConfig(gate=GateConfig(enabled=True))),
    "best_of_n_bf16": Method(BestOfNConfig(precision="bfloat16")),
    "dsrl_sac": Method(DSRLSACConfig(), RepeatNoiseConfig()),
    "dsrl_sac_bf16": Method(DSRLSACConfig(precision="bfloat16"), RepeatNoiseConfig()),
    "dsrl_sac_full_bf16": Method(DSRLSACConfig(precision="bfloat16")),
    "dsrl_sac_full": Method(DSRLSACConfig()),
    "dsrl_sac_logistic": Method(DSRLSACConfig(critic_loss="logistic"), RepeatNoiseConfig()),
    "dsrl_sac_paper": _paper("dsrl_sac"),
    # The same without its 24,000 environment steps of warm-up, to show that they are not what decides.
    "dsrl_sac_paper_short": _paper("dsrl_sac", warmup_transitions=800, first_update=800),
    "dsrl_sac_as_sb3": _as_sb3(),
    "dsrl_na": Method(DSRLNAConfig(), RepeatNoiseConfig()),
    "dsrl_na_exact": Method(DSRLNAConfig(mode="exact"), RepeatNoiseConfig()),
    "dsrl_na_logistic": Method(DSRLNAConfig(critic_loss="logistic"), RepeatNoiseConfig()),
    "dsrl_na_full": Method(DSRLNAConfig()),
    "residual": Method(ResidualConfig()),
    "filtered_bc": Method(None, tuning=TuningConfig(method="full", learning_rate=5e-4)),
}


@dataclass
class Setup:
    """What all runs of a bench share, and one task's environments.

    Attributes:
        adapter: the frozen policy.
        folder: where it was loaded from; the address of a policy server.
        env: the task.
        vec: evaluation environments; training has its own.
        env_steps: training steps of a run.
        grid: steps between two evaluations.
        seeds: evaluation episodes of each grid point.
        final_seeds: of the evaluation at the end; none leaves it out.
        num_envs, workers: of training.
        policy: how the base was loaded; default: from ``folder``, on the CPU.
        cpu: CPU seconds so far of what runs here.
    """

    adapter: PolicyAdapter
    folder: Path | str
    env: EnvConfig
    vec: ChunkVectorEnv
    env_steps: int
    grid: int
    seeds: list[int]
    final_seeds: list[int]
    num_envs: int = 8
    workers: int = 1
    policy: PolicyConfig | None = None
    cpu: Callable[[], float] = time.process_time

    def training_environments(self, count: int | None = None, keep_seen: bool = False) -> ChunkVectorEnv:
        """``count`` environments (default: ``num_envs``); ``keep_seen`` as in ``ChunkVectorEnv``."""
        history = self.adapter.n_obs_steps
        return ChunkVectorEnv(self.env, count or self.num_envs, self.workers, history, keep_seen=keep_seen)

    def measure(self, runner: PolicyRunner, policy: ChunkPolicy, seeds: list[int], label: str) -> dict:
        """Evaluate; whatever draws it makes, training goes on with its own."""
        with torch.random.fork_rng(devices=[]):
            outcome = evaluate(runner, self.vec, policy, seeds, label, progress=sys.stderr.isatty())
        require_success(outcome)
        return outcome.summary()


Policies = dict[str, tuple[PolicyRunner, ChunkPolicy]]
Ran = tuple["Recorder", dict[str, Any], Any]  # ..., more of the record, and what has learnt


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
        self.seconds = self.cpu_seconds = 0.0
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
        started, cpu = time.perf_counter(), self.setup.cpu()
        found = {
            name: self.setup.measure(runner, source, seeds, f"{label}, {name}")
            for name, (runner, source) in self.policies().items()
        }
        rates = (f"{name} {entry['successes']}/{entry['episodes']}" for name, entry in found.items())
        print(f"{label}: {', '.join(rates)}", flush=True)
        self.seconds += time.perf_counter() - started
        self.cpu_seconds += self.setup.cpu() - cpu
        return found


def run_base(setup: Setup, seeds: list[int]) -> dict[str, Any]:
    """The base under its own noise."""
    runner = PolicyRunner(setup.adapter, setup.env)
    return setup.measure(runner, base_noise, seeds, f"base, {setup.env.task}")


def run_method(
    method: Method,
    setup: Setup,
    seed: int,
    label: str,
    after: Callable[[Recorder, Any], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train ``method`` on the setup's task and evaluate it on the grid.

    Args:
        method, setup, seed: what is run.
        label: on progress bars.
        after: called at the end with the recorder and what has learnt; adds to what is returned.

    Returns:
        ``points``: at each grid point the summary of each policy: ``actor`` (its mean; what is deployed) and,
        of an algorithm that selects, ``acting`` (best of its candidates). ``episodes``: [environment step at
        its end, success, steered] of each training episode. ``final``: as a point, on the final seeds.
        ``updates``, ``metrics`` (of our trainer) and ``seconds``.
    """
    started = time.perf_counter()
    cpu, all_cpu = time.process_time(), setup.cpu()
    train = _run_trainer if method.rl is None or method.rl.replays else _run_search
    if method.rl is None:
        train = method.train_alone or _run_filtered_bc
    recorder, found, learner = train(method, setup, seed, label)
    training = time.perf_counter() - started - recorder.seconds
    training_cpu = setup.cpu() - all_cpu - recorder.cpu_seconds
    if setup.final_seeds:
        found["final"] = recorder.evaluate(setup.final_seeds, f"{label}, final")
    seconds = {
        "training": round(training, 2),
        "evaluation": round(recorder.seconds, 2),
        "process_cpu": round(time.process_time() - cpu, 2),
        "training_cpu": round(training_cpu, 2),
    }
    if after is not None:
        found |= after(recorder, learner)
    return {"points": recorder.points, "episodes": recorder.episodes, **found, "seconds": seconds}


def _run_trainer(method: Method, setup: Setup, seed: int, label: str) -> Ran:
    from accelerate import Accelerator

    adapter, lines = setup.adapter, []
    runner = PolicyRunner(adapter, setup.env)
    with setup.training_environments(method.num_envs) as vec:
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
        policies = {name: (runner, policy) for name, policy in trainer.algorithm.policies().items()}
        recorder = Recorder(setup, label, lambda: policies)
        trainer.on_step = lambda ended: recorder(
            trainer.env_steps, [(episode.success, episode.steered) for episode in ended]
        )
        trainer.run()
    return recorder, {"updates": trainer.updates, "metrics": lines}, trainer


def _run_search(method: Method, setup: Setup, seed: int, label: str) -> Ran:
    lines: list[dict[str, Any]] = []
    runner = PolicyRunner(setup.adapter, setup.env)
    with setup.training_environments(method.num_envs) as vec:
        own = PolicyRunner(setup.adapter, setup.env)
        search = method.rl.own_run(own, vec, method.noise, seed, on_metrics=lines.append, progress=False)
        learnt = search.run()
    policies = {name: (runner, policy) for name, policy in learnt.policies().items()}
    recorder = Recorder(setup, label, lambda: policies)
    point = {"grid": search.env_steps, "env_steps": search.env_steps}
    recorder.points.append(point | recorder.evaluate(setup.seeds, f"{label} at {search.env_steps}"))
    return recorder, {"updates": 0, "search_episodes": search.episodes, "metrics": lines}, learnt


def _run_filtered_bc(method: Method, setup: Setup, seed: int, label: str) -> Ran:
    options = setup.policy or PolicyConfig(path=str(setup.folder), device="cpu")
    tuner = FineTuner(load_adapter(options), setup.folder, options, method.tuning)  # changes it in memory
    runner = PolicyRunner(tuner.adapter, setup.env)
    recorder = Recorder(setup, label, lambda: {"actor": (runner, base_noise)})
    count = setup.env_steps // setup.grid
    with setup.training_environments(keep_seen=True) as vec, TemporaryDirectory() as work:
        rollouts = Rollouts(PolicyRunner(tuner.adapter, setup.env), vec, base_noise, training_seed(seed))
        successes = SuccessRecorder(Path(work) / "successes", setup.env.fps)
        progress = sys.stderr.isatty()
        for done in rounds(tuner, rollouts, successes, count * setup.grid, count, seed, progress):
            recorder(rollouts.env_steps, [(episode.success, True) for episode in done.episodes])
    return recorder, {"updates": tuner.updates, "trained_parameters": tuner.trained_parameters}, tuner
