"""A residual policy: what is learnt is added to the frozen policy's chunk, not fed to it as noise.

A residual actor sees the observation and the chunk that the base makes of its own noise, and adds a bounded
correction, zero at the start. Residual policy learning: Silver et al., arXiv 1812.06298; off-policy, on
frozen policies that were cloned in chunks: ResFiT, Ankile et al., arXiv 2509.19301. The learner is TD3
(Fujimoto et al., arXiv 1802.09477) on whole chunks: a deterministic actor, exploration noise, clipped double
Q, smoothed targets. How it differs from ResFiT: ``residual.md``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.adapters.errors import UserError, at_least
from trimtab.policies.acting import Candidates, Choice, ChunkPolicy, Denoise
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig, CriticEnsemble
from trimtab.policies.noise_samplers import own_noise
from trimtab.policies.noise_space import NoiseSpace, NoiseSpaceConfig
from trimtab.policies.residual import CorrectedChunk, ResidualActor
from trimtab.rl.algorithms.acting import PLAIN_RUN, LoadedBase, RunRequest
from trimtab.rl.algorithms.base import Algorithm, AlgorithmConfig, Problem, frozen
from trimtab.rl.data.replay import Batch


@AlgorithmConfig.register_subclass("residual")
@dataclass
class ResidualConfig(AlgorithmConfig):
    """Settings of the residual policy. The noise space has no part in it: the base's noise is its own."""

    # Size and activation of the actor; its other settings have no effect.
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    # Largest correction of an entry of the chunk, in the policy's normalised actions (mostly -1 to 1).
    scale: float = 0.5
    # Deviation of the exploration noise, as a share of scale.
    exploration: float = 0.1
    # Deviation of the noise in the TD target, and where that noise is clipped, as shares of scale.
    target_noise: float = 0.2
    target_clip: float = 0.5
    # Weight of the mean squared correction (as a share of scale), in units of return.
    penalty: float = 0.01

    candidates = 1  # the base's own chunk
    replayed = ("chunk", "candidates", "next_candidates")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("scale")
        at_least(0, self, "--rl.", "exploration", "target_noise", "target_clip", "penalty")

    def check(self, space: NoiseSpace, run: RunRequest = PLAIN_RUN) -> None:
        if run.warm_start:
            raise UserError("--train.warm_start", "a residual policy chooses no noise; leave it out")

    def untrained(self, space: NoiseSpace) -> ChunkPolicy | None:
        return None

    def build(self, problem: Problem) -> Residual:
        return Residual(self, problem)


class Residual(Algorithm):
    """See the module's docstring."""

    config: ResidualConfig
    actor: ResidualActor  # type: ignore[assignment]
    draws = 0  # it acts by its one candidate, the base's own chunk

    def __init__(self, config: ResidualConfig, problem: Problem) -> None:
        super().__init__(config, problem)
        self.bounds = problem.bounds if config.clip_targets else None
        sizes = problem.feature_dim, problem.chunk_size
        self.actor = ResidualActor(*sizes, config.scale, config.actor, problem.observe)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = CriticEnsemble(self.actor.encoder.dim, problem.chunk_size, config.critic)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.critic_optimizer = self._adam(self.critic, self.actor.encoder)
        self.actor_optimizer = self._adam(self.actor.net)

    @torch.no_grad()
    def td_target(self, batch: Batch, eps: Tensor | None = None) -> Tensor:
        """``R + D * min_e Qbar_e(s', a'_base + clip(rbar(s', a'_base) + noise))``, (B,); clipped.

        ``next_candidates`` (B, 1, A) is the base's chunk at s', ``eps`` (B, A) the noise, standard normal.
        """
        features, base, config = batch["next_features"], batch["next_candidates"][:, 0], self.config
        correction = self.target_actor(features, base)
        eps = torch.randn_like(correction) if eps is None else eps
        noise = (config.target_noise * eps).clamp(-config.target_clip, config.target_clip)
        correction = (correction + config.scale * noise).clamp(-config.scale, config.scale)
        value = self.target_critic(features, base + correction).min(0).values
        return self.bootstrap(batch, value)

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """``E[penalty * mean((r / scale)^2) - mean_e Q_e(s, a_base + r)]``, ``r = r(s, a_base)``."""
        features, base = batch["features"].detach(), batch["candidates"][:, 0]
        correction = self.actor(features, base)
        with frozen(self.critic):
            value = self.critic(features, base + correction).mean(0)
        cost = (correction / self.config.scale).square().mean(1)
        return (self.config.penalty * cost - value).mean(), correction

    def learn(self, batch: Batch) -> dict[str, Tensor]:
        loss, values = self.critic_loss(batch, self.td_target(batch))
        self._step(self.critic_optimizer, loss)
        metrics = {"critic_loss": loss.detach(), **self.q_statistics(values)}
        if self.every(self.config.actor_every):
            loss, correction = self.actor_loss(batch)
            self._step(self.actor_optimizer, loss)
            metrics |= {
                "actor_loss": loss.detach(),
                "correction_rms": correction.detach().square().mean().sqrt(),
            }
        return metrics

    def propose(self, features: Tensor, prior: Tensor, denoise: Denoise, steering: bool) -> Candidates:
        flat = prior.flatten(0, 1)
        noise = own_noise(self.space.spec)(None, flat)
        u = self.space.project(noise, flat).float().unflatten(0, prior.shape[:2])
        return Candidates(u, denoise(noise.unflatten(0, prior.shape[:2])).float())

    def act(
        self, features: Tensor, prior: Tensor, denoise: Denoise, candidates: Candidates, steered: Tensor
    ) -> Choice:
        u, chunks = candidates.u[:, 0], candidates.chunks[:, 0]
        if steered.any():
            noise = self.config.exploration * self.config.scale
            corrected = self.actor.correct(features, chunks, noise)
            chunks = torch.where(steered.to(chunks.device)[:, None, None], corrected, chunks)
        if not torch.isfinite(chunks).all():
            raise UserError("--rl.learning_rate", "the residual actor has diverged to NaN or Inf; lower it")
        return Choice(chunks, u)

    def deployed_policy(self, deterministic: bool = True) -> ChunkPolicy:
        return CorrectedChunk(own_noise(self.space.spec), self.actor.correct)

    def save(self, output: Path, base: LoadedBase, noise: NoiseSpaceConfig, training: dict[str, Any]) -> Path:
        return self.actor.write(output / "residual")
