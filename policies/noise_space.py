"""Noise spaces: from the actor's bounded output ``u`` to the noise tensor that a policy takes."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import draccus
import torch
from torch import Tensor

from trimtab.adapters import NoiseSpec, UserError


@dataclass
class NoiseSpaceConfig(draccus.ChoiceRegistry, abc.ABC):
    """``--noise.type=...``: which part of the noise the actor steers, and how far.

    Attributes:
        bound: largest absolute value of an entry of ``u``, in standard deviations of the prior. It holds
            for the actor and for every other draw of ``u``.
    """

    bound: float = 2.0

    def __post_init__(self) -> None:
        if not (self.bound > 0 and math.isfinite(self.bound)):
            raise UserError("--noise.bound", f"the bound must be positive and finite, got {self.bound}")

    @property
    def type(self) -> str:
        return self.get_choice_name(self.__class__)

    @abc.abstractmethod
    def build(self, spec: NoiseSpec) -> NoiseSpace:
        """The noise space of this config for a policy's noise."""


class NoiseSpace(abc.ABC):
    """Maps ``u`` (B, dim) with entries in [-bound, bound] to noise (B, *spec.shape)."""

    def __init__(self, spec: NoiseSpec, dim: int, bound: float) -> None:
        self.spec = spec
        self.dim = dim
        self.bound = bound

    @abc.abstractmethod
    def expand(self, u: Tensor, prior: Tensor) -> Tensor:
        """Full noise for ``u``; ``prior`` (B, *spec.shape) is a fresh draw for what is not steered."""

    @abc.abstractmethod
    def project(self, noise: Tensor) -> Tensor:
        """The ``u`` (B, dim) that stands for ``noise`` in the replay, clipped to the bound."""

    def squash(self, z: Tensor) -> Tensor:
        """``bound * tanh(z / bound)``: the identity near 0, the bound far out.

        An actor whose head starts at mean 0 and deviation 1 so draws the policy's own noise with its
        tails pressed in: at bound 2 a draw of 2 becomes 1.52, the deviation 0.83 instead of 1.
        """
        return self.bound * torch.tanh(z / self.bound)

    def log_slope(self, z: Tensor) -> Tensor:
        """``log d squash / dz`` per entry: ``log(1 - tanh(z / bound)^2)``, without cancellation."""
        x = z / self.bound
        return 2.0 * (math.log(2.0) - x - torch.nn.functional.softplus(-2.0 * x))


@NoiseSpaceConfig.register_subclass("full")
@dataclass
class FullNoiseConfig(NoiseSpaceConfig):
    """The actor chooses every entry of the noise."""

    def build(self, spec: NoiseSpec) -> FullNoiseSpace:
        return FullNoiseSpace(spec, spec.size, self.bound)


class FullNoiseSpace(NoiseSpace):
    """``u`` is the whole noise, flattened."""

    def expand(self, u: Tensor, prior: Tensor) -> Tensor:
        return u.reshape(u.shape[0], *self.spec.shape).to(self.spec.dtype)

    def project(self, noise: Tensor) -> Tensor:
        return noise.flatten(1).clamp(-self.bound, self.bound)


@NoiseSpaceConfig.register_subclass("repeat")
@dataclass
class RepeatNoiseConfig(NoiseSpaceConfig):
    """One vector, repeated over the steps of the chunk: few dimensions to learn.

    Not every policy works under repeated noise: compare its success before choosing this.
    """

    def build(self, spec: NoiseSpec) -> RepeatNoiseSpace:
        if len(spec.shape) != 2:
            raise UserError(
                "--noise.type", f"repeat needs noise of shape (steps, dim), this has {spec.shape}"
            )
        return RepeatNoiseSpace(spec, spec.shape[1], self.bound)


class RepeatNoiseSpace(NoiseSpace):
    """``u`` is the noise of one step; all steps get it."""

    def expand(self, u: Tensor, prior: Tensor) -> Tensor:
        return u.unsqueeze(1).expand(-1, self.spec.shape[0], -1).to(self.spec.dtype).contiguous()

    def project(self, noise: Tensor) -> Tensor:
        return noise[:, 0].clamp(-self.bound, self.bound)
