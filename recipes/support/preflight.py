"""What a steering run does before it trains: checks, and the policies that it will be compared with."""

from __future__ import annotations

from typing import Any

from trimtab.adapters import UserError
from trimtab.policies.actor import NoiseActor
from trimtab.policies.noise_space import NoiseSpace
from trimtab.recipes.support.console import say
from trimtab.recipes.support.session import Session
from trimtab.rl.algorithms import AlgorithmConfig
from trimtab.rl.algorithms.acting import RunRequest
from trimtab.rl.data.decoder import ConditioningSpec
from trimtab.rl.data.demonstration_data import read_demonstrations
from trimtab.rl.data.memory import check_replay, replay_layout
from trimtab.rl.evaluation import Evaluation, unreported
from trimtab.rl.warm_start import begin_at, read_constant

# Evaluations by task and policy.
Measured = dict[str, dict[str, Evaluation]]


def check_inputs(session: Session, config: Any, space: NoiseSpace) -> None:
    """Refuse what does not fit together before any long work; ``config`` is an ``AdaptConfig``."""
    tasks, demos, warm_start = len(session.tasks), config.demos, config.train.warm_start
    processes = session.world.size if session.world else 1
    config.rl.check(space, RunRequest(tasks, processes, config.resume, bool(warm_start)))
    demos.check(config.rl)
    if tasks > 1 and demos.enabled:
        raise UserError("--env.task", "demonstrations are of one task; name one")
    if config.num_envs < tasks:
        raise UserError("--num_envs", f"{tasks} tasks need as many environments or more")
    if demos.enabled:
        read_demonstrations(demos, session.adapter, config.train.reward, config.env.task or "")
    if warm_start:
        noise = read_constant(warm_start, session.adapter.noise_spec)
        begin_at(NoiseActor(1, space, config.rl.actor), noise)


def measure(session: Session, config: Any, space: NoiseSpace) -> tuple[Measured, dict[str, Any]]:
    """Evaluate the baselines, and what the noise space itself does to the policy before any learning.

    Returns the evaluations, and details of the search for a constant.
    """
    found: Measured = {}
    details: dict[str, Any] = {}
    for task, vec in session.evaluations_by_task():
        if not found and config.rl.replays and (first := session.first) is not None:
            spec = (
                ConditioningSpec.of(session.adapter, first) if "conditioning" in config.rl.replayed else None
            )
            width = session.runner.features(first).shape[1]
            layout = replay_layout(config.rl, session.adapter, space, width, spec)
            say(check_replay(config.train.replay_capacity, **layout))  # refuses what does not fit
        found[task], details[task], _ = session.baselines(vec, config.seed)
        untrained = config.rl.untrained(space)
        found[task]["untrained"] = (
            session.evaluate(vec, untrained, label="untrained actor") if untrained else found[task]["base"]
        )
    return found, next(iter(details.values())) if len(details) == 1 else details


def check_reward(rl: AlgorithmConfig, reward: str, measured: Measured) -> None:
    """Refuse to learn from success where the environment reports none."""
    problem = rl.without_success(reward)
    for found in measured.values() if problem else ():
        if not found["base"].reported:
            option, mend = problem
            raise UserError(option, f"{unreported(found['base'])}, so there is nothing to learn from; {mend}")
