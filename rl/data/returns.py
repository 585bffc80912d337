"""Chunk rewards, discounts and n-step returns over chunks.

A chunk that executed k steps has the reward ``sum_i gamma^i r_i`` and hands on ``gamma^k`` of what
follows; 0 of it after a terminal state, ``gamma^k`` after a time limit. (With a discount per chunk: the sum
of its rewards, and ``gamma``.) Over n chunks these compose:
``R = R_0 + D_0 R_1 + D_0 D_1 R_2 + ...`` and ``D = D_0 D_1 ... D_{n-1}``.

Where each step costs 1, ending early would pay, however it ends. So an episode that fails (a terminal state,
and no success before or in it) returns what it would if success never came: the lowest return there is.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.rl.envs.chunk import ChunkResult

REWARDS = ("sparse", "env")
DISCOUNT_PER = ("step", "chunk")


@dataclass(frozen=True)
class Returns:
    """What an executed chunk counts in a run: the one place that says what an episode's end is worth."""

    # sparse: -1 at each step, 0 at a step that succeeds; env: the environment's own.
    reward: str
    gamma: float
    # step; or chunk, as in DSRL's code (arXiv 2506.15799): rewards within a chunk are summed, and gamma holds
    # once per chunk, however many steps were executed.
    per: str = "step"
    # Most steps in a chunk.
    chunk_steps: int = 1
    # Whether what follows a time limit has a value.
    bootstrap_at_time_limit: bool = True
    # Of reward=env: the smallest and the largest reward of a step that are expected. They are what bounds the
    # value, and a step counts in units of the larger one, so that values are of the sparse reward's size.
    reward_range: tuple[float, float] | None = None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Smallest and largest possible return, or ``None`` where it is not known."""
        longest = (self.chunk_steps if self.per == "chunk" else 1) / (1.0 - self.gamma)
        if self.reward == "sparse":
            return -longest, 0.0
        if self.reward_range is None:
            return None
        low, high = (value / self.unit for value in self.reward_range)
        return longest * min(low, 0.0), longest * max(high, 0.0)  # an episode that ends gets 0 from there on

    @property
    def unit(self) -> float:
        """What a reward of 1 means, in the environment's own rewards."""
        return max(map(abs, self.reward_range)) if self.reward_range else 1.0

    def reward_and_discount(self, result: ChunkResult, succeeded: bool) -> tuple[float, float]:
        """Reward of a chunk, and the weight of what follows it.

        Args:
            result: the executed chunk. If it ends both terminated and truncated, it is not known which: a
                time limit as long as these bootstrap, else terminal.
            succeeded: whether the episode has ever reported success, up to the end of this chunk. As
                LeRobot counts it a success, its end is none to be avoided.
        """
        bootstraps = result.truncated and self.bootstrap_at_time_limit
        if self.reward == "sparse" and result.terminated and not bootstraps and not succeeded:
            # The sparse reward's: had the episode gone on, it could not have got less.
            return self.bounds[0], 0.0
        rewards = result.successes - 1.0 if self.reward == "sparse" else result.rewards / self.unit
        if self.per == "chunk":
            total, discount = np.sum(rewards), self.gamma
        else:
            total = np.dot(self.gamma ** np.arange(result.steps), rewards)
            discount = self.gamma**result.steps
        return float(total), 0.0 if result.ended and not bootstraps else float(discount)


@dataclass
class Transition:
    """One chunk, or n chunks, as one step of learning."""

    features: np.ndarray  # (d,) at the start
    u: np.ndarray  # (dim,) the first chunk's noise, in the noise space
    reward: float  # discounted, over the n chunks
    discount: float  # weight of the value at next_features
    next_features: np.ndarray  # (d,) after the n chunks, or at the episode's true last observation
    # What an algorithm keeps beside that, by name; of the state after the n chunks `next_...`.
    extra: dict[str, np.ndarray] = field(default_factory=dict)


class NStepAccumulator:
    """Composes one environment's consecutive chunks into n-step transitions.

    At an episode's end the pending ones are completed with as many chunks as they have, so that no
    transition crosses it.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._pending: deque[Transition] = deque()
        self._following: tuple[np.ndarray, dict[str, np.ndarray]] = np.zeros(0), {}  # of the last chunk

    def clear(self) -> None:
        self._pending.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        return [dict(vars(chunk)) for chunk in self._pending]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self._pending = deque(Transition(**chunk) for chunk in state)

    def add(
        self, chunk: Transition, ended: bool, next_extra: dict[str, np.ndarray] | None = None
    ) -> list[Transition]:
        """The transitions that an executed chunk completes, oldest first.

        Args:
            chunk: on its own; if it ``ended`` the episode, it completes all that are pending.
            next_extra: what to keep of the state after it.
        """
        self._pending.append(chunk)
        self._following = chunk.next_features, next_extra or {}
        done: list[Transition] = []
        while self._pending and (ended or len(self._pending) == self.n):
            done.append(self._complete())
        return done

    def flush(self) -> list[Transition]:
        """Complete all that are pending with the chunks they have: what follows is not theirs."""
        return [self._complete() for _ in range(len(self._pending))]

    def _complete(self) -> Transition:
        """The oldest pending one with all chunks since."""
        total, weight = 0.0, 1.0
        for one in self._pending:
            total += weight * one.reward
            weight *= one.discount
        first, (next_features, next_extra) = self._pending.popleft(), self._following
        extra = first.extra | {f"next_{name}": value for name, value in next_extra.items()}
        return Transition(first.features, first.u, total, weight, next_features, extra)
