"""How a policy acts: from an observation and fresh draws of noise to the action chunk that is executed.

Everything that acts is a ``ChunkPolicy``: a noise sampler (``noise_samplers.py``), the best of several
candidates, a corrected chunk (``residual.py``). Evaluation, rollouts, videos and artefacts take any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trimtab.adapters import Conditioning, PolicyAdapter
from trimtab.policies.actor import NoiseActor
from trimtab.policies.critic import CriticEnsemble
from trimtab.policies.noise_space import NoiseSpace

# The frozen policy at B observations: noise (B, K, *noise_shape) -> normalised chunks (B, K, steps, dim).
Denoise = Callable[[Tensor], Tensor]
ACCURATE = 0.1  # of sigma, see NoiseToChunk.misses
WITHIN = 0.98  # of the bound: an actor's mean_limit
# Observations (B, d) and chunks (B, K, steps, action_dim) -> (B,) index of the chunk to execute.
Select = Callable[[Tensor, Tensor], Tensor]
# Observations (B, d) and chunks (B, steps, action_dim) or (B, K, steps, action_dim) -> the chunks, changed.
Edit = Callable[[Tensor, Tensor], Tensor]


def denoise_several(adapter: PolicyAdapter, conditioning: Conditioning, noise: Tensor) -> Tensor:
    """Normalised chunks (B, K, steps, action_dim) for noise (B, K, *noise_shape) at B observations."""
    noise = noise.to(adapter.device, adapter.noise_spec.dtype)
    chunks = adapter.denoise(conditioning.repeat_interleave(noise.shape[1]), noise.flatten(0, 1))
    return chunks.unflatten(0, tuple(noise.shape[:2]))


def noise_of(
    adapter: PolicyAdapter, space: NoiseSpace, conditioning: Conditioning, chunk: Tensor
) -> Tensor | None:
    """``u`` (dim,) of a noise in ``space`` that the frozen policy makes ``chunk`` of, if there is one.

    ``chunk`` (1, steps, action_dim), normalised, is that of one observation. The noise must make it but for
    ``ACCURATE`` of what noise changes at all, also once it is cut to what an actor's mean can say. The base
    makes no such chunk of any noise where a person does what it never would.
    """
    found = adapter.invert(conditioning, chunk)
    if found is None or not found[1] < ACCURATE:
        return None
    u = space.project(found[0]).clamp(-WITHIN * space.bound, WITHIN * space.bound)
    said = space.expand(u, found[0])
    return u[0] if adapter.misses(conditioning, said, chunk) < ACCURATE else None


@dataclass
class Choice:
    """What is executed at B observations.

    Attributes:
        chunk: (B, steps, action_dim), normalised.
        u: (B, dim) the noise it came from, in the noise space of whoever chose it; ``None`` if in none.
    """

    chunk: Tensor
    u: Tensor | None = None


@dataclass
class Candidates:
    """K noises for each of B observations, and what the frozen policy makes of them.

    Attributes:
        u: (B, K, dim) in the noise space.
        chunks: (B, K, steps, action_dim), normalised, float32.
    """

    u: Tensor
    chunks: Tensor

    def take(self, index: Tensor) -> Choice:
        """The candidate ``index`` (B,) of each observation."""
        index = index.to(self.chunks.device)
        rows = torch.arange(len(index), device=index.device)
        return Choice(self.chunks[rows, index], self.u[rows, index])

    def with_edits(self, features: Tensor, edit: Edit | None) -> Candidates:
        """These, and behind them each of them edited at observations (B, d): twice as many, if any edits."""
        if edit is None:
            return self
        edited = edit(features, self.chunks)
        return Candidates(self.u.repeat(1, 2, 1), torch.cat([self.chunks, edited], 1))


class ChunkPolicy(Protocol):
    """How a policy acts; ``draws`` of its noise distribution are needed for each observation."""

    @property
    def draws(self) -> int: ...

    def act(self, features: Tensor, prior: Tensor, denoise: Denoise) -> Choice:
        """Choose a chunk for each of B observations.

        Args:
            features: (B, d) what the noise actor looks at.
            prior: (B, draws, *noise_shape) fresh draws.
            denoise: the frozen policy at these observations.
        """
        ...


def draw_candidates(
    space: NoiseSpace,
    prior: Tensor,
    denoise: Denoise,
    features: Tensor | None = None,
    actor: NoiseActor | None = None,
    proposed: int = 0,
    mean: bool = True,
) -> Candidates:
    """Candidates that an untrained actor would draw; the last ``proposed`` of them are the actor's own.

    Args:
        space, denoise: noise space and frozen policy.
        prior: (B, K, *noise_shape) fresh draws.
        features, actor: who proposes, and what it looks at (B, d).
        proposed: how many.
        mean: the actor's first proposal is its mean, which is what is deployed, and the others lie around it
            ever farther, with 1 / (P - 1), 2 / (P - 1), ... of its deviation. In many dimensions no plain
            draw comes near the mean, so that it would never be seen, judged or learnt.
    """
    flat, lead = prior.flatten(0, 1), prior.shape[:2]
    u = space.squash(space.initial_std * space.draw(flat)).unflatten(0, lead)
    if actor is not None and proposed:
        own = prior[:, -proposed:]
        if mean:  # the actor's randomness is made of the prior's
            own = own * torch.linspace(0.0, 1.0, proposed).to(own).view(proposed, *[1] * (own.dim() - 2))
        seen = features.repeat_interleave(proposed, 0)
        u[:, -proposed:] = actor.choose(seen, own.flatten(0, 1)).to(u).unflatten(0, (len(u), proposed))
    noise = space.expand(u.flatten(0, 1), flat).unflatten(0, lead)
    return Candidates(u, denoise(noise).float())


@dataclass(frozen=True)
class BestOfCandidates:
    """Decodes ``draws`` candidates for each observation and executes the one that ``select`` takes.

    ``actor``, ``proposed`` and ``mean`` are those of ``draw_candidates``. With ``edit`` each candidate stands
    for election twice: as it is, and edited.
    """

    space: NoiseSpace
    draws: int
    select: Select
    actor: NoiseActor | None = None
    proposed: int = 0
    mean: bool = True
    edit: Edit | None = None

    def act(self, features: Tensor, prior: Tensor, denoise: Denoise) -> Choice:
        candidates = draw_candidates(
            self.space, prior, denoise, features, self.actor, self.proposed, self.mean
        ).with_edits(features, self.edit)
        return candidates.take(self.select(features, candidates.chunks))


def by_critic(actor: NoiseActor, critic: CriticEnsemble) -> Select:
    """Take the candidate whose mean value by ``critic`` is largest; ``actor`` holds the encoder."""

    @torch.no_grad()
    def select(features: Tensor, chunks: Tensor) -> Tensor:
        device = critic.normalizer.mean.device
        seen = actor.encode(features).float().to(device)
        return critic(seen, chunks.flatten(2).float().to(device)).mean(0).argmax(1).to(chunks.device)

    return select
