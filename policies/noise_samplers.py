"""Noise sources: who chooses the noise that a policy is fed. Each is a policy to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from trimtab.adapters import NoiseSpec
from trimtab.policies.actor import NoiseActor
from trimtab.policies.noise_space import NoiseSpace


class NoiseSource(Protocol):
    """Chooses noise for a batch of observations."""

    def __call__(self, features: Tensor | None, prior: Tensor) -> Tensor:
        """Noise like ``prior`` (B, *spec.shape), which is a fresh draw from the policy's distribution."""
        ...


def base_noise(features: Tensor | None, prior: Tensor) -> Tensor:
    """The policy's own noise: the base policy as it is."""
    return prior


def zero_noise(features: Tensor | None, prior: Tensor) -> Tensor:
    """No noise at all."""
    return torch.zeros_like(prior)


def repeated_noise(features: Tensor | None, prior: Tensor) -> Tensor:
    """The policy's own noise of one step, repeated over the chunk."""
    return prior[:, :1].expand_as(prior)


def own_noise(spec: NoiseSpec) -> NoiseSource:
    """What the policy feeds itself: a draw from its prior, or zero where that is how it decodes (act)."""
    return zero_noise if spec.distribution == "zero" else base_noise


def constant_noise(noise: Tensor) -> Callable[[Tensor | None, Tensor], Tensor]:
    """The same ``noise`` (*spec.shape) for every observation."""

    def source(features: Tensor | None, prior: Tensor) -> Tensor:
        return noise.to(prior).expand_as(prior)

    return source


def steered_noise(
    actor: NoiseActor, deterministic: bool = False
) -> Callable[[Tensor | None, Tensor], Tensor]:
    """What the noise actor chooses; ``deterministic`` takes its mean."""

    def source(features: Tensor | None, prior: Tensor) -> Tensor:
        device = actor.normalizer.mean.device
        return actor.act(features.to(device), prior.to(device), deterministic).to(prior)

    return source


def proposed_noise(actor: NoiseActor, mean: bool = True) -> Callable[[Tensor | None, Tensor], Tensor]:
    """Several choices of the noise actor for each observation, (B, P, *spec.shape).

    Args:
        actor: chooses.
        mean: the first choice is the actor's mean, which is what is deployed, and the others lie around it
            ever farther, with 1 / (P - 1), 2 / (P - 1), ... of its deviation. In many dimensions no draw of
            all of it comes near the mean, so that what is there would never be seen, judged or learnt.
    """
    source = steered_noise(actor)

    def propose(features: Tensor | None, prior: Tensor) -> Tensor:
        count = prior.shape[1]
        if mean:  # the actor's randomness is made of the prior's
            prior = prior * torch.linspace(0.0, 1.0, count).to(prior).view(count, *[1] * (prior.dim() - 2))
        seen = features.repeat_interleave(count, 0)
        return source(seen, prior.flatten(0, 1)).unflatten(0, tuple(prior.shape[:2]))

    return propose


def candidate_noise(
    space: NoiseSpace, actor: NoiseActor | None = None, deterministic: bool = False, proposed: int = 1
) -> Callable[[Tensor | None, Tensor], Tensor]:
    """K noises for each observation, to choose among: what an untrained actor draws, and the first
    ``proposed`` of them the actor's own where there is one (``deterministic``: its mean comes first).

    Its source takes and returns (B, K, *spec.shape), one fresh draw for each candidate.
    """
    drawn = prior_noise(space)

    def source(features: Tensor | None, prior: Tensor) -> Tensor:
        noise = drawn(None, prior.flatten(0, 1)).unflatten(0, tuple(prior.shape[:2]))
        if actor is None:
            return noise
        own = proposed_noise(actor, deterministic)(features, prior[:, :proposed])
        return torch.cat([own, noise[:, proposed:]], 1)

    return source


def prior_noise(space: NoiseSpace) -> Callable[[Tensor | None, Tensor], Tensor]:
    """What an untrained actor draws: the policy's own noise, squashed into the noise space."""

    def source(features: Tensor | None, prior: Tensor) -> Tensor:
        return space.expand(space.squash(space.initial_std * space.draw(prior)), prior)

    return source
