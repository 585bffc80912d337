"""`trimtab eval`: compare noise sources on one frozen policy, on paired seeds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lerobot.envs.configs import EnvConfig

from trimtab.adapters import PolicyConfig, UserError
from trimtab.adapters.errors import at_least
from trimtab.policies.acting import ChunkPolicy
from trimtab.policies.artefact import Steered, is_artefact, load_artefact
from trimtab.policies.steered.configuration_trimtab import TrimtabConfig
from trimtab.recipes.support.console import new_output_dir
from trimtab.recipes.support.reporting import doubt, results_of, table, write_json
from trimtab.recipes.support.session import Session, describe, open_session
from trimtab.recipes.support.shared_configs import EpisodesConfig, MachineConfig
from trimtab.rl.envs.hooks import check_base, is_attended
from trimtab.rl.envs.robot.episodes import EPISODES
from trimtab.rl.runs.faults import StopSignals

ACTING = "deterministic", "num_candidates", "use_edit"  # how a steered policy acted


@dataclass
class SteeredEvalConfig(EpisodesConfig):
    """How policies are evaluated. A steered one acts as its artefact says, unless set here."""

    # Take the mean of the actor instead of a sample.
    deterministic: bool | None = None
    # N > 1: decode the actor's noise and N - 1 of the base's, and run the best by the critic.
    num_candidates: int | None = None
    # False: chunks as the base makes them of the actor's noise, without the edits of --rl.edit.scale.
    use_edit: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "--eval.", "num_candidates")

    def complete(self, steered: Steered | None) -> None:
        """Fill in what was not set."""
        said = steered.config if steered else TrimtabConfig()
        if self.deterministic is None:
            self.deterministic = said.deterministic
        if self.num_candidates is None:
            self.num_candidates = said.num_candidates
        if self.use_edit is None:
            self.use_edit = said.use_edit and said.edit_scale > 0
        if self.use_edit and not said.edit_scale:
            raise UserError(
                "--eval.use_edit", "needs the artefact of a run with --rl.edit.scale; leave it out"
            )
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
        check_robot(config.env, steered.config.training)
        session = Session(steered.adapter, config.env, config.eval, config.machine)
        folder = steered.base_folder
    else:
        session, folder = open_session(config.policy, config.env, config.eval, config.machine)
    config.eval.complete(steered)
    policy = acting(session, steered)
    print(describe(session, folder))
    if is_attended(config.env):
        return judged(session, folder, policy if steered else None, config, output)
    with session.evaluation_environments() as vec:
        evaluations, details, _ = session.baselines(vec, config.seed)
        if steered is not None:
            evaluations["steered"] = session.evaluate(vec, policy, label="steered")
    session.record({output / "rollouts.mp4": policy})
    used = {name: getattr(config.eval, name) for name in ACTING}
    results = results_of(
        config,
        evaluations,
        base_sha256=session.adapter.identity(folder).get("sha256"),
        constant_noise_search=details,
        steered_by=steered and used,
    )
    write_json(output / "results.json", results)
    print(f"\n{table(results['policies'])}\n{doubt(results['policies'])}\nall in {output}")


def judged(
    session: Session, folder: Path | str, steered: ChunkPolicy | None, config: EvaluateConfig, output: Path
) -> None:
    """On a robot: base and steered in random order, blind to the person who says how each episode ended."""
    from trimtab.rl.envs.robot.judging import announcement, judge, plan, verdict

    policies: dict[str, ChunkPolicy] = {"base": session.own_noise}
    policies |= {"steered": steered} if steered else {}
    with StopSignals().installed() as signals, session.environments(1) as vec:
        order = plan([*policies], config.eval.n_episodes, config.seed)
        vec.keep(output / EPISODES)
        vec.stopping, signals.deferred = signals, True
        print(announcement(order, vec))
        found = judge(session.runner, vec, policies, order, config.seed)
        signals.deferred = False
    if signals() and not found:
        raise KeyboardInterrupt
    used = {name: getattr(config.eval, name) for name in ACTING}
    results = results_of(
        config,
        found,
        base_sha256=session.adapter.identity(folder).get("sha256"),
        steered_by=steered and used,
    )
    write_json(output / "results.json", results)
    print(f"\n{table(results['policies'])}\n\n{verdict(found)}\nall in {output}")


def check_robot(env: EnvConfig, training: dict[str, Any]) -> None:
    """Refuse to judge an artefact of a robot at another rate or task than that of its ``training``."""
    steered = training.get("env") or {}
    for name in ("fps", "task") if is_attended(env) and training.get("attended") else ():
        if steered.get(name) != (now := getattr(env, name)):
            raise UserError(
                f"--robot.{name}",
                f"the artefact was steered with {steered.get(name)}, not {now}; name the same",
            )


def acting(session: Session, steered: Steered | None) -> ChunkPolicy:
    """What acts, as `lerobot-eval` lets it act: the artefact by the session's ``eval``, or the plain base."""
    if steered is None:
        return session.own_noise
    return steered.policy(*(getattr(session.eval, name) for name in ACTING))
