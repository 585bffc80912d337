"""`trimtab eval`: compare noise sources on one frozen policy, on paired seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lerobot.envs.configs import EnvConfig
from torch import Tensor

from trimtab.adapters import PolicyConfig, UserError
from trimtab.policies.artefact import Steered, is_artefact, load_artefact
from trimtab.policies.critic import best_candidate
from trimtab.policies.noise_samplers import NoiseSource, candidate_noise, steered_noise
from trimtab.recipes.support.console import new_output_dir
from trimtab.recipes.support.reporting import table, write_json
from trimtab.recipes.support.session import (
    EpisodesConfig,
    MachineConfig,
    Session,
    describe,
    open_session,
    outcomes,
    summaries,
)
from trimtab.rl.envs.hooks import check_base
from trimtab.rl.evaluation import evaluate
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.threads import machine_record
from trimtab.rl.selection import SelectingRunner


@dataclass
class SteeredEvalConfig(EpisodesConfig):
    """How policies are evaluated; what is not said of a steered one is as its artefact says."""

    # Take the mean of the actor instead of a sample.
    deterministic: bool | None = None
    # More than 1: decode the actor's noise and so many less one of the base's, run the best by the critic.
    num_candidates: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_candidates is not None and self.num_candidates < 1:
            raise UserError("--eval.num_candidates", f"must be at least 1, got {self.num_candidates}")

    def complete(self, steered: Steered | None) -> None:
        """Fill in what was not said.

        Raises:
            UserError: there is nothing to choose among candidates by.
        """
        config = steered.config if steered else None
        if self.deterministic is None:
            self.deterministic = config.deterministic if config else True
        if self.num_candidates is None:
            self.num_candidates = config.num_candidates if config else 1
        if self.num_candidates > 1 and (steered is None or steered.critic is None):
            raise UserError(
                "--eval.num_candidates",
                "needs the artefact of a best_of_n run, which holds the critic that chooses; leave it at 1",
            )


@dataclass
class EvaluateConfig:
    """``trimtab eval``."""

    env: EnvConfig
    # A base policy, or the artefact of a steering run.
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    eval: SteeredEvalConfig = field(default_factory=SteeredEvalConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    # Seeds the draw of constant noises.
    seed: int = 0
    # Default: outputs/eval/<date>/<time>.
    output_dir: Path | None = None


def main(config: EvaluateConfig) -> None:
    output = new_output_dir(config.output_dir, "eval")
    steered = None
    if is_artefact(config.policy.path):
        config.machine.apply()
        steered = load_artefact(config.policy)
        check_base(config.env, steered.base_folder)
        session = Session(steered.adapter, config.env, config.eval, config.machine)
        folder = steered.base_folder
    else:
        session, folder = open_session(config.policy, config.env, config.eval, config.machine)
    config.eval.complete(steered)
    runner, source = acting(session, steered)
    print(describe(session, folder))
    with session.evaluation_environments() as vec:
        evaluations, details = session.baselines(vec, config.seed)
        if steered is not None:
            evaluations["steered"] = evaluate(runner, vec, source, config.eval.seeds, "steered")
    session.record(source, output / "rollouts.mp4", "video", runner)
    write_json(
        output / "results.json",
        {
            "policies": summaries(evaluations),
            "outcomes": outcomes(evaluations),
            "base_sha256": session.adapter.identity(folder).get("sha256"),
            "constant_noise_search": details,
            "env": {"type": config.env.type, "task": config.env.task},
            "evaluation_seeds": [config.eval.seeds[0], config.eval.seeds[-1]],
            "machine": machine_record(),
            "steered_by": steered
            and {name: getattr(config.eval, name) for name in ("deterministic", "num_candidates")},
        },
    )
    print(f"\n{table(summaries(evaluations))}\n\nall in {output}")


def acting(session: Session, steered: Steered | None) -> tuple[PolicyRunner, NoiseSource]:
    """What acts, as `lerobot-eval` of the same policy lets it act; the base where nothing steers it.

    Args:
        session: its ``eval`` is a complete ``SteeredEvalConfig``.
        steered: the artefact.
    """
    config = session.eval
    if steered is None:
        return session.runner, session.own_noise
    if config.num_candidates == 1:
        return session.runner, steered_noise(steered.actor, config.deterministic)

    def select(features: Tensor, chunks: Tensor) -> Tensor:
        seen = steered.actor.encoder(features.to(steered.critic.normalizer.mean.device))
        return best_candidate(steered.critic, seen, chunks)

    runner = SelectingRunner(session.adapter, session.env, select, config.num_candidates)
    return runner, candidate_noise(steered.actor.space, steered.actor, config.deterministic)
