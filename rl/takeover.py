"""Who acts in the next training episode: the learner's policy, or the base until it has earned trust.

A robot's owner does not accept that success falls while the learner finds its feet. The schedule decides
per episode: the learner acts in a share of the episodes equal to the probability, given the outcomes so far,
that it succeeds at least as often as the base; never in less than ``least``, or nothing would be learnt
about it. (Probability matching between two Beta posteriors; Thompson 1933.)
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.adapters.errors import UserError, at_least

DRAWS = 2000


@dataclass
class TakeoverConfig:
    """``--train.gate.*``: how the learner earns trust."""

    # Whether the base acts until the learner's policy is as good; without it the learner acts at once.
    enabled: bool = False
    # Smallest share of episodes in which the learner acts.
    least: float = 0.1
    # Latest steered episodes that count: the learner changes, so old outcomes say little.
    window: int = 20
    # First episodes, in which the base acts whatever has been learnt: what the learner's are compared with.
    base_episodes: int = 0
    # Failures that the learner is taken to have had before its first episode.
    doubt: float = 2.0

    def __post_init__(self) -> None:
        if not 0.0 < self.least <= 1.0:
            raise UserError("--train.gate.least", f"is a share above 0 and at most 1, got {self.least}")
        at_least(1, self, "--train.gate.", "window")
        at_least(0, self, "--train.gate.", "doubt", "base_episodes")


class Takeover:
    """The schedule of one run, as the module's docstring has it; ``seed`` is that of its draws.

    ``share`` is that of the episodes in which the learner acts, as last reckoned.
    """

    def __init__(self, config: TakeoverConfig, seed: int) -> None:
        self.config = config
        self._rng = np.random.default_rng(seed)
        self._base: list[bool] = []
        self._steered: deque[bool] = deque(maxlen=config.window)
        self.share = config.least if config.enabled else 1.0

    def add(self, steered: bool, success: bool) -> None:
        """Note the outcome of a training episode."""
        (self._steered if steered else self._base).append(success)

    def _reckoned(self) -> float:
        base = self._rng.beta(1 + sum(self._base), 1 + len(self._base) - sum(self._base), DRAWS)
        won = sum(self._steered)
        lost = len(self._steered) - won
        steered = self._rng.beta(1 + won, 1 + lost + self.config.doubt, DRAWS)
        return max(self.config.least, float((steered >= base).mean()))

    def __call__(self) -> bool:
        """Whether the learner acts in the next episode."""
        if not self.config.enabled:
            return True
        if len(self._base) < self.config.base_episodes:
            return False
        chance = self._rng.random()
        self.share = self._reckoned()
        return bool(chance < self.share)

    def state_dict(self) -> dict[str, Any]:
        state = {"rng": self._rng.bit_generator.state, "share": self.share}
        return state | {"base": self._base, "steered": self._steered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]
        self._base, self.share = state["base"], state["share"]
        self._steered.extend(state["steered"])
