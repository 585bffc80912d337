"""Paired, vectorised evaluation of policies on the same frozen base and seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.adapters import UserError
from trimtab.policies.acting import ChunkPolicy
from trimtab.policies.noise_samplers import constant_noise
from trimtab.rl.envs.base import VectorEnv
from trimtab.rl.envs.chunk import Fault
from trimtab.rl.rollout import Rollout
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.processes import ProcessGroup
from trimtab.rl.runs.progress import Progress
from trimtab.rl.statistics import bootstrap_interval, wilson_interval


@dataclass
class Evaluation:
    """The outcome of each evaluated episode.

    Attributes:
        seeds, successes, steps: of N episodes, in the order asked for: seeds, (N,) bool, (N,) environment
            steps.
        frames: rendered frames by seed, for the seeds that were recorded.
        returns: (N,) undiscounted sum of the environment's own rewards; ``None`` where it was not kept.
        reported: whether the environment has reported success or failure at all.
        info_keys: what else its ``info`` held.
        reward_range: smallest and largest of the environment's rewards, each the mean of a chunk's steps.
    """

    seeds: list[int]
    successes: np.ndarray
    steps: np.ndarray
    frames: dict[int, list[np.ndarray]] = field(default_factory=dict)
    returns: np.ndarray | None = None
    reported: bool = True
    info_keys: tuple[str, ...] = ()
    reward_range: tuple[float, float] | None = None

    @property
    def success_rate(self) -> float:
        return float(self.successes.mean())

    def summary(self) -> dict[str, Any]:
        """``{"successes", "episodes", "success_rate", "ci95": [low, high], "mean_steps", "return_mean",
        "return_ci95": [low, high]}``; of success ``None`` where it was never reported, which is not 0 %.
        """
        count, total = int(self.successes.sum()), len(self.successes)
        found: dict[str, Any] = {
            "successes": count if self.reported else None,
            "episodes": total,
            "success_rate": count / total if self.reported else None,
            "ci95": list(wilson_interval(count, total)) if self.reported else None,
            "mean_steps": float(self.steps.mean()),
        }
        if self.returns is not None:
            found["return_mean"] = float(self.returns.mean())
            found["return_ci95"] = list(bootstrap_interval(self.returns))
        return found


def evaluate(
    runner: PolicyRunner,
    vec: VectorEnv,
    policy: ChunkPolicy | Tensor,
    seeds: Sequence[int],
    label: str = "evaluation",
    record: Sequence[int] = (),
    progress: bool = True,
    world: ProcessGroup | None = None,
) -> Evaluation:
    """Run one episode for each seed.

    The prior noise of an episode comes from its own generator, seeded by the episode's seed: what
    happens in it depends neither on the number of environments nor on their order, and two policies meet
    the same start and the same draws.

    Args:
        runner, vec: the frozen policy and its environments; each takes the next seed as it finishes.
        policy: acts; or a constant noise for each seed (N, *noise_shape), to compare many in one sweep.
        seeds: episode seeds.
        label: shown on the progress bar with the running success rate.
        record: seeds whose episodes are rendered (each must run first in its environment).
        progress: show the bar.
        world: several processes that share the episodes; all of them get the whole outcome.

    Raises:
        UserError: a fault has lost an episode, in environments that go on after one.
    """
    if world is not None and world.size > 1:
        mine = list(range(world.rank, len(seeds), world.size))
        part = policy[mine] if isinstance(policy, Tensor) else policy
        here = evaluate(runner, vec, part, [seeds[k] for k in mine], label, (), progress and world.main)
        numbers, parts = zip(*world.gather((mine, here)), strict=True)
        return pooled(parts, np.argsort(np.concatenate(numbers)))
    total = len(seeds)
    found = Evaluation(
        [int(seed) for seed in seeds],
        np.zeros(total, dtype=bool),
        np.zeros(total, dtype=np.int64),
        returns=np.zeros(total),
        reported=False,
    )
    queue, info_keys = iter(range(total)), set()
    rollout = Rollout(
        runner, vec, lambda i, k: next(queue, None), lambda k: found.seeds[k], render=[int(s) for s in record]
    )
    bar = Progress(total=total, desc=label, unit="ep", disable=not progress, leave=False)
    _refuse(vec.not_begun)
    while rollout.episode:
        rollout.encode_observations()
        running = dict(rollout.episode)
        acting: Any = policy
        if isinstance(policy, Tensor):
            acting = constant_noise(policy[[running[i] for i in rollout.envs]])
        rollout.begin(acting)
        results = rollout.receive()
        _refuse([*(result.lost for result in results.values() if result.lost), *vec.not_begun])
        for i, result in results.items():
            k = running[i]
            found.successes[k] |= bool(result.successes.any())
            found.steps[k] += result.steps
            found.returns[k] += result.rewards.sum()
            low, high = found.reward_range or (math.inf, -math.inf)
            mean = float(result.rewards.mean())
            found.reward_range = min(low, mean), max(high, mean)
            found.reported |= result.success_key is not None
            info_keys |= set(result.info_keys)
            if seeds[k] in record:
                found.frames.setdefault(found.seeds[k], []).extend(result.frames)
            if result.ended:
                bar.update()
                if found.reported and bar.n:
                    bar.set_postfix_str(f"success {found.successes.sum() / bar.n:.2f}")
        rollout.start_next_episodes()
    bar.close()
    found.reported |= bool(found.successes.any())
    found.info_keys = tuple(sorted(info_keys))
    return found


def _refuse(faults: Sequence[Fault]) -> None:
    """Nobody knows how an episode would have ended that a fault has lost."""
    for _, message in faults:
        option, _, said = message.partition(": ")
        raise UserError(option, said)


def pooled(evaluations: Sequence[Evaluation], order: np.ndarray | None = None) -> Evaluation:
    """The episodes of several evaluations as one, one after another or in another ``order``."""

    def joined(name: str) -> np.ndarray:
        values = np.concatenate([getattr(one, name) for one in evaluations])
        return values if order is None else values[order]

    ranges = [one.reward_range for one in evaluations if one.reward_range]
    return Evaluation(
        joined("seeds").tolist(),
        joined("successes"),
        joined("steps"),
        evaluations[0].frames if len(evaluations) == 1 else {},
        None if any(one.returns is None for one in evaluations) else joined("returns"),
        any(one.reported for one in evaluations),
        tuple(sorted({key for one in evaluations for key in one.info_keys})),
        (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None,
    )


def unreported(evaluation: Evaluation) -> str:
    """Of an environment that does not tell whether an episode succeeds: what its ``info`` held."""
    held = ", ".join(evaluation.info_keys) or "nothing"
    return (
        f"the environment never reported success in {len(evaluation.seeds)} episodes (its info held: {held}; "
        "with --env.type=gym, --env.success=info.NAME, reward>=NUMBER or terminated says what it is)"
    )


def require_success(evaluation: Evaluation) -> None:
    """Raise a UserError where the environment reports no success and only that counts."""
    if not evaluation.reported:
        raise UserError("--env.type", f"{unreported(evaluation)}; this counts successes alone")


def best_constant(
    runner: PolicyRunner,
    vec: VectorEnv,
    candidates: int,
    seeds: Sequence[int],
    seed: int,
    progress: bool = True,
    world: ProcessGroup | None = None,
) -> tuple[Tensor, list[float]]:
    """The best of ``candidates`` random constant noises on ``seeds``; ``seed`` is that of their draw.

    The winner's rate is biased upwards: evaluate it on other seeds.

    Returns:
        (the winning noise, success rate of every candidate; where the environment reports no success, its
        mean return, which then decides)
    """
    noises = runner.prior(candidates, torch.Generator().manual_seed(seed))
    outcome = evaluate(
        runner,
        vec,
        noises.repeat_interleave(len(seeds), 0),
        list(seeds) * candidates,
        f"searching {candidates} constant noises",
        progress=progress,
        world=world,
    )
    counted = outcome.successes if outcome.reported else outcome.returns
    rates = counted.reshape(candidates, len(seeds)).mean(1)
    return noises[int(rates.argmax())], [float(rate) for rate in rates]
