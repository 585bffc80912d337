"""``full``, ``repeat`` and ``constant``: ``u`` is the noise itself, whole or one step of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.adapters import NoiseSpec
from trimtab.policies.noise_space.base import NoiseSpace, NoiseSpaceConfig, full_or_repeat, rows_and_columns


@NoiseSpaceConfig.register_subclass("full")
@dataclass
class FullNoiseConfig(NoiseSpaceConfig):
    """The actor chooses every entry of the noise."""

    def build_unscaled(self, spec: NoiseSpec) -> FullNoiseSpace:
        return FullNoiseSpace(spec, spec.size, self.bound)


class FullNoiseSpace(NoiseSpace):
    """``u`` is the whole noise, flattened."""

    def _noise(self, u: Tensor, prior: Tensor) -> Tensor:
        return u.unflatten(1, self.spec.shape)

    def _steered(self, noise: Tensor, prior: Tensor | None) -> Tensor:
        return noise.flatten(1)


@NoiseSpaceConfig.register_subclass("repeat")
@dataclass
class RepeatNoiseConfig(NoiseSpaceConfig):
    """One vector, repeated over the steps of the chunk: few dimensions to learn.

    Not every policy works under repeated noise: compare its success before choosing this.
    """

    def build_unscaled(self, spec: NoiseSpec) -> RepeatNoiseSpace:
        _, dim = rows_and_columns(spec, "--noise.type", "repeat")
        return RepeatNoiseSpace(spec, dim, self.bound)


class RepeatNoiseSpace(NoiseSpace):
    """``u`` is the noise of one step; all steps get it."""

    def _noise(self, u: Tensor, prior: Tensor) -> Tensor:
        return u.unsqueeze(1).repeat(1, self.spec.shape[0], 1)

    def _steered(self, noise: Tensor, prior: Tensor | None) -> Tensor:
        return noise[:, 0]


@NoiseSpaceConfig.register_subclass("constant")
@dataclass
class ConstantNoiseConfig(NoiseSpaceConfig):
    """One noise for every observation (a golden ticket): the actor does not look.

    Before training that one distribution is the prior; learning narrows it to one noise.
    """

    # ``full``, or ``repeat`` for one vector over the steps of the chunk.
    ticket: str = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        full_or_repeat("--noise.ticket", self.ticket)

    def build_unscaled(self, spec: NoiseSpec) -> NoiseSpace:
        space: NoiseSpace = FullNoiseSpace(spec, spec.size, self.bound)
        if self.ticket == "repeat":
            _, dim = rows_and_columns(spec, "--noise.ticket", "repeat")
            space = RepeatNoiseSpace(spec, dim, self.bound)
        space.uses_features = False
        return space
