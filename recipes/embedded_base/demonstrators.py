"""Operators of mixed skill: Meta-World's scripted experts with noise, and with eyes that err.

A demonstrator acts as the scripted expert would on what it *sees*. A careful one sees the object
where it is. A careless one sees it displaced, for a whole episode, and mostly misses. A policy that
imitates both keeps both habits and picks one of them by its noise: that is what steering can use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.adapters.errors import UserError

OBJECT = slice(4, 7)  # where every Meta-World state holds the (first) object's position, in metres

KINDS = ("careful", "shift", "blind_spot")


@dataclass
class Operator:
    """How one task's demonstrations are performed."""

    # ``careful``; ``shift`` (the object is seen displaced in a random direction); or ``blind_spot``
    # (displaced along x, away from the middle: to the right where the object lies right of ``center``, to the
    # left where it lies left of it).
    kind: str = "careful"
    # Share of the episodes with that error.
    p_bad: float = 0.0
    # Size of the error in metres; an episode draws a factor of U(0.5, 1.3) for ``shift`` and U(0.8, 1.3) for
    # ``blind_spot``.
    offset: float = 0.0
    # What divides left from right, x in metres, for ``blind_spot``; ``None`` takes the median of the task's
    # start states.
    center: float | None = None
    # Standard deviation of the Gaussian noise on every action, in action units.
    noise: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError("--demonstrators", f"kind '{self.kind}' is none of {', '.join(KINDS)}")
        if not 0.0 <= self.p_bad <= 1.0:
            raise UserError("--demonstrators", f"p_bad is a probability, got {self.p_bad}")
        if self.offset < 0 or self.noise < 0:
            raise UserError("--demonstrators", "offset and noise cannot be negative")

    def error(self, object_position: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw an episode's error of sight (3,) in metres for an object at ``object_position``."""
        if self.kind == "careful" or rng.random() >= self.p_bad:
            return np.zeros(3)
        if self.kind == "shift":
            angle = rng.uniform(0.0, 2.0 * np.pi)
            size = self.offset * rng.uniform(0.5, 1.3)
            return np.array([size * np.cos(angle), size * np.sin(angle), 0.0])
        side = 1.0 if object_position[0] > (self.center or 0.0) else -1.0
        return np.array([side * self.offset * rng.uniform(0.8, 1.3), 0.0, 0.0])


class Demonstrator:
    """The scripted expert of one task, acting on what its operator sees."""

    def __init__(self, task: str, operator: Operator) -> None:
        from lerobot.envs.metaworld import TASK_POLICY_MAPPING

        self.operator = operator
        self._expert: Any = TASK_POLICY_MAPPING[task]()
        self._error = np.zeros(3)

    def start(self, state: np.ndarray, rng: np.random.Generator) -> None:
        """Draw the error of sight of a new episode that begins in ``state`` (39,)."""
        self._error = self.operator.error(state[OBJECT], rng)

    def act(self, state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The action (4,) in [-1, 1] for ``state`` (39,)."""
        seen = state.copy()
        seen[OBJECT] += self._error
        action = np.asarray(self._expert.get_action(seen), dtype=np.float64)
        action = action + rng.normal(0.0, self.operator.noise, action.shape)
        return np.clip(action, -1.0, 1.0).astype(np.float32)
