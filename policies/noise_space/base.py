"""What every noise space offers to the actor, the replay and the algorithms."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import draccus
import torch
from torch import Tensor

from trimtab.adapters import NoiseSpec, UserError

UNITS = ("deviation", "bound")


@dataclass
class NoiseSpaceConfig(draccus.ChoiceRegistry, abc.ABC):
    """``--noise.type=...``: which part of the noise the actor steers, and how far."""

    # How far an entry of ``u`` takes the noise at most, in standard deviations of the prior. It holds for the
    # actor and for every other draw of ``u``.
    bound: float = 2.0
    # Of ``u``, its log pi and the critic's input: ``deviation`` (standard deviations of the prior) or
    # ``bound`` (shares of the bound in [-1, 1], as Stable-Baselines3 scales actions).
    unit: str = "deviation"

    def __post_init__(self) -> None:
        if not (self.bound > 0 and math.isfinite(self.bound)):
            raise UserError("--noise.bound", f"the bound must be positive and finite, got {self.bound}")
        if self.unit not in UNITS:
            raise UserError("--noise.unit", f"'{self.unit}' is none of {', '.join(UNITS)}")

    @property
    def type(self) -> str:
        return self.get_choice_name(self.__class__)

    def build(self, spec: NoiseSpec) -> NoiseSpace:
        """The noise space of this config for a policy's noise, or a UserError where it has no such space."""
        space = self.build_unscaled(spec)
        if self.unit == "bound":  # squash is tanh then, and log pi that of SAC's action in [-1, 1]
            space.scale, space.bound = space.bound, 1.0
            space.initial_std /= space.scale
        return space

    @abc.abstractmethod
    def build_unscaled(self, spec: NoiseSpec) -> NoiseSpace:
        """``build``, where ``u`` counts in standard deviations of the prior."""


class NoiseSpace(abc.ABC):
    """Maps ``u`` (B, dim) with entries in [-bound, bound] to noise (B, *spec.shape).

    Attributes:
        spec: the policy's noise.
        dim: length of ``u``.
        bound: largest absolute value of an entry of ``u``.
        scale: standard deviations of the prior in a unit of ``u``.
        initial_std: deviation of the actor's Gaussian before training (its mean is 0), such that the noise
            then has the policy's own distribution, up to the squash.
        uses_features: whether the actor looks at the observation.
        determines_noise: whether ``u`` alone tells the noise, so that a chunk can be laid to its account.
    """

    scale: float = 1.0
    initial_std: float = 1.0
    uses_features: bool = True
    determines_noise: bool = True

    def __init__(self, spec: NoiseSpec, dim: int, bound: float) -> None:
        self.spec, self.dim, self.bound = spec, dim, bound

    def expand(self, u: Tensor, prior: Tensor) -> Tensor:
        """Full noise for ``u``; ``prior`` (B, *spec.shape) is a fresh draw for what is not steered."""
        return self._noise(self.scale * u, prior).to(self.spec.dtype)

    def project(self, noise: Tensor, prior: Tensor | None = None) -> Tensor:
        """The ``u`` (B, dim) that stands for ``noise`` in the replay, clipped to the bound.

        Args:
            noise: (B, *spec.shape); need not come from ``expand``.
            prior: the draw that ``noise`` was made with; only ``residual`` needs it.
        """
        return (self._steered(noise, prior) / self.scale).clamp(-self.bound, self.bound)

    @abc.abstractmethod
    def _noise(self, u: Tensor, prior: Tensor) -> Tensor:
        """``expand`` for ``u`` in standard deviations of the prior."""

    @abc.abstractmethod
    def _steered(self, noise: Tensor, prior: Tensor | None) -> Tensor:
        """The inverse of ``_noise``, without a bound."""

    def draw(self, prior: Tensor) -> Tensor:
        """The actor's randomness (B, dim), standard normal, made of ``prior``.

        One stream of draws so decides an episode. Never a part of ``prior`` that ``expand`` adds to ``u``:
        the critic would credit ``u`` with what the unseen prior did.
        """
        return prior.flatten(1)[:, : self.dim]

    def squash(self, z: Tensor) -> Tensor:
        """``bound * tanh(z / bound)``: the identity near 0, the bound far out.

        An actor whose head starts at mean 0 and deviation 1 so draws the policy's own noise with its
        tails pressed in: at bound 2 a draw of 2 becomes 1.52, the deviation 0.83 instead of 1.
        """
        return self.bound * torch.tanh(z / self.bound)

    def unsquash(self, u: Tensor, within: float = 1.0) -> Tensor:
        """The inverse of ``squash``; what lies farther out than ``within`` of the bound counts as there."""
        return self.bound * torch.atanh((u / self.bound).clamp(-within, within))

    def log_slope(self, z: Tensor) -> Tensor:
        """``log d squash / dz`` per entry: ``log(1 - tanh(z / bound)^2)``, without cancellation."""
        x = z / self.bound
        return 2.0 * (math.log(2.0) - x - torch.nn.functional.softplus(-2.0 * x))

    def unsteered(self, prior: Tensor) -> Tensor:
        """What the policy feeds itself where nothing is steered, in its dtype: ``prior``, or zero (act)."""
        prior = prior.to(self.spec.dtype)
        return torch.zeros_like(prior) if self.spec.distribution == "zero" else prior
