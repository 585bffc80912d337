"""`trimtab eval`: compare noise sources on one frozen policy, on paired seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lerobot.envs.configs import EnvConfig

import trimtab.rl.envs.metaworld  # noqa: F401 - registers metaworld_state
from trimtab.adapters import PolicyConfig
from trimtab.policies.artefact import is_artefact, load_artefact
from trimtab.policies.sources import steered_noise
from trimtab.recipes.console import new_output_dir, parse
from trimtab.recipes.metaworld.base import check_task
from trimtab.recipes.reporting import table, write_json
from trimtab.recipes.session import (
    EvalConfig,
    MachineConfig,
    Session,
    describe,
    open_session,
    summaries,
)
from trimtab.rl.evaluation import evaluate


@dataclass
class EvaluateConfig:
    """``trimtab eval``."""

    env: EnvConfig
    # A base policy, or the artefact of a steering run.
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    # Seeds the draw of constant noises.
    seed: int = 0
    # Default: outputs/eval/<date>/<time>.
    output_dir: Path | None = None


def main(args: list[str]) -> None:
    config = parse(EvaluateConfig, "eval", args)
    output = new_output_dir(config.output_dir, "eval")
    source = None
    if is_artefact(config.policy.path):
        config.machine.apply()
        steered = load_artefact(config.policy)
        if config.env.type == "metaworld_state":
            check_task(steered.base_folder, config.env.task)
        session = Session(steered.adapter, config.env, config.eval, config.machine)
        folder = steered.base_folder
        source = steered_noise(steered.actor, config.eval.deterministic)
    else:
        session, folder = open_session(config.policy, config.env, config.eval, config.machine)
    print(describe(session, folder))
    with session.evaluation_environments() as vec:
        evaluations, details = session.baselines(vec, config.seed)
        if source is not None:
            evaluations["steered"] = evaluate(session.runner, vec, source, config.eval.seeds, "steered")
    session.record(source or session.own_noise, output / "rollouts.mp4", "video")
    write_json(
        output / "results.json",
        {
            "policies": summaries(evaluations),
            "constant_noise_search": details,
            "env": {"type": config.env.type, "task": config.env.task},
            "evaluation_seeds": [config.eval.seeds[0], config.eval.seeds[-1]],
        },
    )
    print(f"\n{table(summaries(evaluations))}\n\nall in {output}")
