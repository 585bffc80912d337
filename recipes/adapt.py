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
from trimtab.policies.actor import NoiseActor
from trimtab.policies.artefact import is_artefact, save_artefact
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpace, NoiseSpaceConfig
from trimtab.policies.observe import ObserveConfig
from trimtab.policies.sources import prior_noise, steered_noise
from trimtab.recipes.console import new_output_dir, parse
from trimtab.recipes.presets import expand_preset, value_of
from trimtab.recipes.reporting import MetricsWriter, plot_curve, rate_text, table, write_json
from trimtab.recipes.session import (
    EvalConfig,
    MachineConfig,
    Session,
    describe,
    open_session,
    summaries,
)
from trimtab.rl.algorithms import AlgorithmConfig, DSRLSACConfig
from trimtab.rl.demonstration_data import DemosConfig, read_demonstrations
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.evaluation import Evaluation, evaluate
from trimtab.rl.golden_ticket import GoldenTicketConfig, TicketSearch
from trimtab.rl.train import MAX_SEED, TrainConfig, Trainer
from trimtab.rl.warm_start import begin_at, read_constant


@dataclass
class AdaptConfig:
    """``trimtab adapt``."""

    env: EnvConfig
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rl: AlgorithmConfig = field(default_factory=DSRLSACConfig)
    noise: NoiseSpaceConfig = field(default_factory=FullNoiseConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    demos: DemosConfig = field(default_factory=DemosConfig)
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
    config = parse(AdaptConfig, "adapt", with_default_noise(expand_preset(args)))
    if is_artefact(config.policy.path):
        raise UserError("--policy.path", f"{config.policy.path} is already steered; name its base policy")
    output = new_output_dir(config.output_dir, "adapt")
    session, folder = open_session(config.policy, config.env, config.eval, config.machine, config.observe)
    print(describe(session, folder))
    outcome = steer(session, folder, config, output)
    print(f"\n{table(summaries(outcome.evaluations))}\n")
    print(untrained_line(outcome.untrained.summary(), config.noise.type))
    print(f"{outcome.parameters:,} weights trained; artefact {outcome.artefact}; all in {output}")


def with_default_noise(args: list[str]) -> list[str]:
    """``args`` with the constant noise space that golden_ticket seeks in, unless they name one themselves."""
    algorithm = value_of(args, "rl.type")
    if algorithm != "golden_ticket" or value_of(args, "noise.type") is not None:
        return args
    print("golden_ticket seeks one noise for all observations: --noise.type=constant")
    return ["--noise.type=constant", *args]


def untrained_line(summary: dict[str, Any], noise: str) -> str:
    """One line about what the noise space alone does."""
    return f"untrained actor ({noise} noise): {rate_text(summary)}"


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
    check_inputs(session, config, space)
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
    with session.environments(config.num_envs) as vec:
        trainer = make_trainer(session, vec, accelerator, config)
        with MetricsWriter(output / "metrics.jsonl") as metrics:
            trainer.on_metrics = metrics
            learnt = trainer.run()
    actor = learnt.actor.eval()
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
            "env_steps": trainer.env_steps,
            "episodes": trainer.episodes,
            "deterministic": config.eval.deterministic,
            "success": {name: entry for name, entry in summaries(evaluations).items()},
            "algorithm": config.rl.type,
        },
        # What chose among candidates while learning can do so for the deployed policy.
        (learnt.critic, config.rl.critic) if learnt.selects else None,
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


def check_inputs(session: Session, config: AdaptConfig, space: NoiseSpace) -> None:
    """Refuse what does not fit together before any long work.

    Raises:
        UserError: the algorithm cannot learn in this noise space or from demonstrations, or the dataset or
            the warm start is not there or does not fit the policy.
    """
    config.rl.check(space)
    config.demos.check(config.rl)
    if config.demos.enabled:
        read_demonstrations(config.demos, session.adapter, config.train.reward, config.env.task or "")
    if config.train.warm_start:
        if isinstance(config.rl, GoldenTicketConfig):
            raise UserError("--train.warm_start", "golden_ticket draws all of its constants itself")
        noise = read_constant(config.train.warm_start, session.adapter.noise_spec)
        begin_at(NoiseActor(1, space, config.rl.actor), noise)


def make_trainer(
    session: Session, vec: ChunkVectorEnv, accelerator: Any, config: AdaptConfig
) -> Trainer | TicketSearch:
    """What runs ``config.rl``."""
    if isinstance(config.rl, GoldenTicketConfig):
        return TicketSearch(session.runner, vec, config.rl, config.noise, config.seed)
    return Trainer(
        session.runner,
        vec,
        accelerator,
        config.train,
        config.rl,
        config.noise,
        config.seed,
        demos=config.demos,
    )


def write_results(
    output: Path,
    outcome: Outcome,
    config: AdaptConfig,
    trainer: Trainer | TicketSearch,
    identity: dict[str, Any],
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
            "env_steps": trainer.env_steps,
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
