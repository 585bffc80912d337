"""Policies on a robot, judged blind: in random order, and the person is not told which acts."""

import numpy as np

from trimtab.adapters.errors import UserError
from trimtab.policies.acting import ChunkPolicy
from trimtab.rl.envs.robot.outcomes import robot_outcomes
from trimtab.rl.envs.robot.vector import RobotVectorEnv
from trimtab.rl.evaluation import Evaluation
from trimtab.rl.rollout import Rollout
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.statistics import p_below

FAILURES = 5  # of the robot, in a row, that end a judging
RESET_S = 30.0  # that a person takes to put a scene right, as a guess


def plan(names: list[str], episodes: int, seed: int) -> list[str]:
    """Who acts in which episode: each of ``names`` in ``episodes``, in an order drawn by ``seed``."""
    order = np.repeat(names, episodes)
    np.random.default_rng(seed).shuffle(order)
    return order.tolist()


def announcement(order: list[str], vec: RobotVectorEnv) -> str:
    """What the person lets themselves in for."""
    longest = vec.hello["options"]["episode_time_s"]
    minutes = len(order) * (longest + RESET_S) / 60
    return (
        f"{len(order)} episodes in random order, blind: at most {longest:.0f} s each and about "
        f"{RESET_S:.0f} s to put the scene right, {minutes:.0f} minutes in all; a dropped one is run again"
    )


def judge(
    runner: PolicyRunner, vec: RobotVectorEnv, policies: dict[str, ChunkPolicy], order: list[str], seed: int
) -> dict[str, Evaluation]:
    """Run an episode for each name in ``order``, or as many as the person lets it.

    Their files, below ``vec.root``, say who acted.

    Raises:
        UserError: the robot fails again and again.
    """
    left, failed = list(order), 0
    rollout = Rollout(runner, vec, lambda i, k: seed if k is None else k + 1)
    while left and not vec.stopping() and rollout.start():
        while not rollout.waiting:
            rollout.encode_observations()
            rollout.begin(policies[left[0]])
            vec.note(steered=np.array(left[0] == "steered"))
            for result in rollout.receive().values():
                failed = failed + 1 if result.lost and result.lost[0] == "crash" else 0
                if failed == FAILURES:
                    raise UserError("--robot.type", f"failed {failed} times in a row: {result.lost[1]}")
                if result.ended:
                    left.pop(0)
            rollout.start_next_episodes()
    assert vec.root is not None
    return robot_outcomes(vec.root, last=None)


def verdict(found: dict[str, Evaluation]) -> str:
    """Fisher's exact test between the base and what was steered."""
    if set(found) != {"base", "steered"}:
        return ""
    counts = [(int(one.successes.sum()), len(one.successes)) for one in (found["base"], found["steered"])]
    p = p_below(*counts[0], *counts[1])
    return f"that the base does as well: p = {p:.2g} (Fisher's exact test, one-sided)"
