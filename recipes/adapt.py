"""`trimtab adapt`: steer a LeRobot policy in an environment by noise-space RL."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import draccus
from lerobot.envs.configs import EnvConfig

import trimtab.rl.envs.metaworld  # noqa: F401 - registers metaworld_state
from trimtab.adapters import PolicyConfig, UserError
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpaceConfig
from trimtab.policies.sources import prior_noise, steered_noise
from trimtab.recipes.console import new_output_dir, parse
from trimtab.recipes.reporting import MetricsWriter, plot_curve, table, write_json
from trimtab.recipes.session import (
    EvalConfig,
    MachineConfig,
    Session,
    describe,
    open_session,
    summaries,
)
from trimtab.rl.algorithms import AlgorithmConfig, DSRLSACConfig
from trimtab.rl.artefact import is_artefact, save_artefact
from trimtab.rl.evaluation import Evaluation, evaluate
from trimtab.rl.train import MAX_SEED, TrainConfig, Trainer


@dataclass
class AdaptConfig:
    """``trimtab adapt``."""

    env: EnvConfig
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rl: AlgorithmConfig = field(default_factory=DSRLSACConfig)
    noise: NoiseSpaceConfig = field(default_factory=FullNoiseConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    # Environments that collect experience at the same time.
    num_envs: int = 8
    seed: int = 0
    # Default: outputs/adapt/<date>/<time>.
    output_dir: Path | None = None

    def __post_init__(self) -> None:
        check_run(self.seed, self.num_envs)


def check_run(seed: int, num_envs: int) -> None:
    """Refuse a number of environments or a seed that a run cannot have."""
    if num_envs < 1:
        raise UserError("--num_envs", f"must be at least 1, got {num_envs}")
    if not 0 <= seed <= MAX_SEED:
        raise UserError("--seed", f"must be between 0 and {MAX_SEED}, got {seed}")


@dataclass
class Outcome:
    """What a steering run found."""

    evaluations: dict[str, Evaluation]
    untrained: Evaluation
    details: dict[str, Any]
    artefact: Path
    lines: list[dict[str, Any]]
    parameters: int
    seconds: dict[str, float]


def main(args: list[str]) -> None:
    config = parse(AdaptConfig, "adapt", args)
    if is_artefact(config.policy.path):
        raise UserError("--policy.path", f"{config.policy.path} is already steered; name its base policy")
    output = new_output_dir(config.output_dir, "adapt")
    session, folder = open_session(config.policy, config.env, config.eval, config.machine)
    print(describe(session, folder))
    outcome = steer(session, folder, config, output)
    print(f"\n{table(summaries(outcome.evaluations))}\n")
    print(untrained_line(outcome.untrained.summary(), config.noise.type))
    print(f"{outcome.parameters:,} weights trained; artefact {outcome.artefact}; all in {output}")


def untrained_line(summary: dict[str, Any], noise: str) -> str:
    """One line about what the noise space alone does."""
    low, high = summary["ci95"]
    return (
        f"untrained actor ({noise} noise): {100 * summary['success_rate']:.1f} % "
        f"[{100 * low:.1f}, {100 * high:.1f}] ({summary['successes']}/{summary['episodes']})"
    )


def steer(session: Session, folder: Path | str, config: AdaptConfig, output: Path) -> Outcome:
    """Evaluate the baselines, train the noise actor, evaluate it, and write everything under ``output``.

    Raises:
        UserError: from the policy or the environment; nothing is written before training starts.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=session.adapter.device.type == "cpu")
    if accelerator.num_processes > 1:
        raise UserError(
            "accelerate", "steering runs in one process for now; launch it with --num_processes=1"
        )
    space = config.noise.build(session.adapter.noise_spec)
    config.rl.check(space)
    identity = session.adapter.identity(folder)
    clock = time.perf_counter
    seconds: dict[str, float] = {}
    started = clock()
    with session.evaluation_environments() as vec:
        evaluations, details = session.baselines(vec, config.seed)
        # What the noise space itself does to the policy, before any learning.
        untrained = evaluate(
            session.runner,
            vec,
            prior_noise(space),
            config.eval.seeds,
            "untrained actor",
        )
    seconds["baselines"] = clock() - started
    started = clock()
    metrics: MetricsWriter | None = None
    with session.environments(config.num_envs) as vec:
        trainer = Trainer(
            session.runner, vec, accelerator, config.train, config.rl, config.noise, config.seed
        )
        metrics = trainer.on_metrics = MetricsWriter(output / "metrics.jsonl")
        try:
            actor = trainer.run().actor.eval()
        finally:
            metrics.close()
    seconds["steering"] = clock() - started
    started = clock()
    steered = steered_noise(actor, config.eval.deterministic)
    with session.evaluation_environments() as vec:
        evaluations["steered"] = evaluate(session.runner, vec, steered, config.eval.seeds, "steered")
    seconds["steered_evaluation"] = clock() - started
    session.adapter.check_identity(identity, folder)
    artefact = save_artefact(
        output / "artefact",
        actor,
        config.noise,
        session.adapter,
        config.policy,
        folder,
        {
            "env": draccus.encode(config.env, EnvConfig),
            "seed": config.seed,
            "env_steps": trainer.collector.env_steps,
            "episodes": trainer.episodes,
            "deterministic": config.eval.deterministic,
            "success": {name: entry for name, entry in summaries(evaluations).items()},
        },
    )
    parameters = sum(parameter.numel() for parameter in actor.parameters())
    outcome = Outcome(evaluations, untrained, details, artefact, metrics.lines, parameters, seconds)
    write_results(output, outcome, config, trainer, identity)
    started = clock()
    title = f"{config.rl.type} on {config.env.task or config.env.type}, {config.noise.type} noise"
    plot_curve(output / "curve.png", metrics.lines, summaries(evaluations), title)
    session.record(session.own_noise, output / "before.mp4", "video: base policy")
    session.record(steered, output / "after.mp4", "video: steered")
    seconds["pictures"] = clock() - started
    write_results(output, outcome, config, trainer, identity)  # once more, with the last time in it
    return outcome


def write_results(
    output: Path, outcome: Outcome, config: AdaptConfig, trainer: Trainer, identity: dict[str, Any]
) -> None:
    """Write results.json (the table and how it came about) and config.json (to run it again)."""
    write_json(
        output / "results.json",
        {
            "policies": summaries(outcome.evaluations),
            "untrained_actor": outcome.untrained.summary(),
            "constant_noise_search": outcome.details,
            "env": {"type": config.env.type, "task": config.env.task},
            "seed": config.seed,
            "evaluation_seeds": [config.eval.seeds[0], config.eval.seeds[-1]],
            "env_steps": trainer.collector.env_steps,
            "training_episodes": trainer.episodes,
            "updates": trainer.updates,
            "actor_parameters": outcome.parameters,
            "base_sha256": identity.get("sha256"),  # a policy server shows no weights
            "seconds": {name: round(value, 2) for name, value in outcome.seconds.items()},
            "train": asdict(config.train),
        },
    )
    again = draccus.encode(config)
    again.pop("output_dir", None)
    write_json(output / "config.json", again)
