"""Chunk rewards, discounts and n-step returns over chunks.

A chunk that executed k steps has the reward ``sum_i gamma^i r_i`` and hands on ``gamma^k`` of what
follows; 0 of it after a terminal state, ``gamma^k`` after a time limit. (With a discount per chunk: the sum
of its rewards, and ``gamma``.) Over n chunks these compose:
``R = R_0 + D_0 R_1 + D_0 D_1 R_2 + ...`` and ``D = D_0 D_1 ... D_{n-1}``.

Where each step costs 1, ending early would pay, however it ends. So an episode that fails (a terminal state,
and no success before or in it) returns what it would if success never came: the lowest return there is.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from trimtab.rl.envs.chunk import ChunkResult

REWARDS = ("sparse", "env")
DISCOUNT_PER = ("step", "chunk")


def step_rewards(result: ChunkResult, kind: str) -> np.ndarray:
    """The learner's reward (k,) of each executed step.

    Args:
        result: an executed chunk.
        kind: ``sparse`` (-1 at each step, 0 at a step that succeeds) or ``env`` (the environment's own).
    """
    if kind == "sparse":
        return result.successes.astype(np.float64) - 1.0
    return result.rewards.astype(np.float64)


def chunk_return(
    rewards: np.ndarray, gamma: float, terminated: bool, per: str = "step"
) -> tuple[float, float]:
    """Discounted reward of one chunk and the weight of what follows it.

    Args:
        rewards: (k,) of the steps really executed.
        gamma: discount per environment step, or per chunk.
        terminated: the chunk ended in a terminal state (a time limit is none).
        per: ``step``, or ``chunk`` for the convention of DSRL's code (arXiv 2506.15799): rewards within a
            chunk are summed, and ``gamma`` holds once per chunk, however many steps were executed.

    Returns:
        (sum of gamma^i r_i, gamma^k or 0), with ``chunk`` (sum of r_i, gamma or 0)
    """
    if per == "chunk":
        return float(np.sum(rewards)), 0.0 if terminated else gamma
    steps = len(rewards)
    total = float(np.dot(gamma ** np.arange(steps), rewards))
    return total, 0.0 if terminated else float(gamma**steps)


def value_bounds(
    kind: str, gamma: float, per: str = "step", chunk_steps: int = 1
) -> tuple[float, float] | None:
    """Smallest and largest possible return, or ``None`` where it is not known.

    Args:
        kind: of reward.
        gamma, per: as for ``chunk_return``.
        chunk_steps: most steps in a chunk, which a discount per chunk leaves undiscounted.
    """
    each = chunk_steps if per == "chunk" else 1
    return (-each / (1.0 - gamma), 0.0) if kind == "sparse" else None


@dataclass(frozen=True)
class Returns:
    """What an executed chunk counts in a run: the one place that says what an episode's end is worth.

    Attributes:
        reward: ``sparse`` or ``env`` (see ``step_rewards``).
        gamma, per: as for ``chunk_return``.
        chunk_steps: most steps in a chunk.
        bootstrap_at_time_limit: whether what follows a time limit has a value.
    """

    reward: str
    gamma: float
    per: str = "step"
    chunk_steps: int = 1
    bootstrap_at_time_limit: bool = True

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Smallest and largest possible return, or ``None`` where it is not known."""
        return value_bounds(self.reward, self.gamma, self.per, self.chunk_steps)

    def reward_and_discount(self, result: ChunkResult, succeeded: bool) -> tuple[float, float]:
        """Reward of a chunk, and the weight of what follows it.

        With the sparse reward a chunk in which the episode fails is worth the lowest return, and nothing
        follows: had it gone on, it could not have got less. The environment's own reward is left alone.

        Args:
            result: the executed chunk. If it ends both terminated and truncated, it is not known which: a
                time limit as long as these bootstrap, else terminal.
            succeeded: whether the episode has ever reported success, up to the end of this chunk. As
                LeRobot counts it a success, its end is none to be avoided.
        """
        bootstraps = result.truncated and self.bootstrap_at_time_limit
        if self.bounds and result.terminated and not bootstraps and not succeeded:
            return self.bounds[0], 0.0
        final = result.ended and not bootstraps
        return chunk_return(step_rewards(result, self.reward), self.gamma, final, self.per)


@dataclass
class Transition:
    """n chunks as one step of learning.

    Attributes:
        features: (d,) at the start.
        u: (dim,) the first chunk's noise, in the noise space.
        reward: discounted reward over the n chunks.
        discount: weight of the value at ``next_features``.
        next_features: (d,) after the n chunks, or at the episode's true last observation.
        extra: what an algorithm keeps beside that, by name; of the state after the n chunks ``next_...``.
    """

    features: np.ndarray
    u: np.ndarray
    reward: float
    discount: float
    next_features: np.ndarray
    extra: dict[str, np.ndarray] = field(default_factory=dict)


class NStepAccumulator:
    """Composes one environment's consecutive chunks into n-step transitions.

    At an episode's end the pending ones are completed with as many chunks as they have, so that no
    transition crosses it.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._pending: deque[tuple[np.ndarray, np.ndarray, float, float, dict]] = deque()

    def clear(self) -> None:
        """Forget what is pending."""
        self._pending.clear()

    def state_dict(self) -> list[tuple]:
        """What is pending."""
        return list(self._pending)

    def load_state_dict(self, state: list) -> None:
        self._pending = deque(tuple(item) for item in state)

    def add(
        self,
        features: np.ndarray,
        u: np.ndarray,
        reward: float,
        discount: float,
        next_features: np.ndarray,
        ended: bool,
        extra: dict[str, np.ndarray] | None = None,
        next_extra: dict[str, np.ndarray] | None = None,
    ) -> list[Transition]:
        """Add an executed chunk and return the transitions that it completes, oldest first.

        Args:
            features, u, reward, discount: of the chunk.
            next_features: after it.
            ended: whether the episode ended with it.
            extra: what to keep of the chunk and the state it was chosen in.
            next_extra: what to keep of the state after it.
        """
        self._pending.append((features, u, reward, discount, extra or {}))
        done: list[Transition] = []
        while self._pending and (ended or len(self._pending) == self.n):
            total, weight = 0.0, 1.0
            for _, _, chunk_reward, chunk_discount, _ in self._pending:
                total += weight * chunk_reward
                weight *= chunk_discount
            first_features, first_u, _, _, kept = self._pending.popleft()
            kept = kept | {f"next_{name}": value for name, value in (next_extra or {}).items()}
            done.append(Transition(first_features, first_u, total, weight, next_features, kept))
        return done
