"""Noise samplers: who chooses the noise that the frozen policy is fed. Each is a policy to compare."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.adapters import NoiseSpec
from trimtab.policies.acting import BestOfCandidates, Choice, ChunkPolicy, Denoise, by_critic
from trimtab.policies.actor import NoiseActor
from trimtab.policies.critic import CriticEnsemble
from trimtab.policies.noise_space import NoiseSpace
from trimtab.policies.residual import CorrectedChunk, ResidualActor, edits_of


@dataclass(frozen=True)
class NoiseSampler:
    """A ``ChunkPolicy`` that chooses one noise for each observation.

    Attributes:
        choose: observations (B, d), a draw (B, *noise_shape) -> noise like the draw; with ``space``, ``u``.
        space: the noise space of what ``choose`` gives.
    """

    choose: Callable[[Tensor | None, Tensor], Tensor]
    space: NoiseSpace | None = None
    draws: ClassVar[int] = 1

    def __call__(self, features: Tensor | None, prior: Tensor) -> Tensor:
        """The noise (B, *noise_shape)."""
        return self._expand(self.choose(features, prior), prior)

    def act(self, features: Tensor, prior: Tensor, denoise: Denoise) -> Choice:
        prior = prior[:, 0]
        chosen = self.choose(features, prior)
        chunks = denoise(self._expand(chosen, prior).unsqueeze(1))
        return Choice(chunks[:, 0], None if self.space is None else chosen)

    def _expand(self, chosen: Tensor, prior: Tensor) -> Tensor:
        return chosen if self.space is None else self.space.expand(chosen, prior)


# A draw from the policy's noise distribution as it is; no noise at all; that of one step, repeated.
base_noise = NoiseSampler(lambda features, prior: prior)
zero_noise = NoiseSampler(lambda features, prior: torch.zeros_like(prior))
repeated_noise = NoiseSampler(lambda features, prior: prior[:, :1].expand_as(prior))


def own_noise(spec: NoiseSpec) -> NoiseSampler:
    """What the policy feeds itself: a draw from its prior, or zero where that is how it decodes (act)."""
    return zero_noise if spec.distribution == "zero" else base_noise


def constant_noise(noise: Tensor) -> NoiseSampler:
    """The same ``noise`` (*noise_shape) for every observation."""
    return NoiseSampler(lambda features, prior: noise.to(prior).expand_as(prior))


def steered_noise(actor: NoiseActor, deterministic: bool = False) -> NoiseSampler:
    """What the noise actor chooses; ``deterministic`` takes its mean."""
    return NoiseSampler(
        lambda features, prior: actor.choose(features, prior, deterministic).to(prior), actor.space
    )


def steered_policy(
    actor: NoiseActor,
    critic: CriticEnsemble | None,
    deterministic: bool = True,
    num_candidates: int = 1,
    edit: ResidualActor | None = None,
) -> ChunkPolicy:
    """How what was trained acts: by the actor's mean, or a draw; its chunk as ``edit`` changes it.

    With more candidates than 1, that chunk and others of the base's are decoded, and the best by ``critic``
    is executed, of those and their edits.
    """
    own, changes = steered_noise(actor, deterministic), edits_of(actor, edit)
    if num_candidates == 1:
        return own if changes is None else CorrectedChunk(own, changes)
    assert critic is not None  # an artefact without one is refused by its config
    select = by_critic(actor, critic)
    return BestOfCandidates(actor.space, num_candidates, select, actor, 1, deterministic, changes)


def prior_noise(space: NoiseSpace, mean: Tensor | None = None) -> NoiseSampler:
    """What an untrained actor draws: the policy's own noise, squashed into the noise space.

    ``mean`` (dim,) is that of the actor's Gaussian before squashing, where it begins elsewhere than at 0.
    """

    def choose(features: Tensor | None, prior: Tensor) -> Tensor:
        z = space.initial_std * space.draw(prior)
        return space.squash(z if mean is None else z + mean.to(z))

    return NoiseSampler(choose, space)
