"""What DSRL-SAC and DSRL-NA share: soft actor-critic on the noise (Haarnoja et al., arXiv 1812.05905).

The actor maximises ``value - alpha * log pi`` and the temperature ``alpha`` follows a target entropy. The
two differ in what the critic that learns by TD sees (the noise, or the chunk), and so in the critic that the
actor climbs.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.adapters import UserError
from trimtab.policies.actor import ActorConfig, ActorOutput, NoiseActor, kl_to_prior
from trimtab.policies.critic import CriticConfig, CriticEnsemble, require_critic_loss
from trimtab.rl.algorithms.base import (
    MEASURED_EVERY,
    Algorithm,
    AlgorithmConfig,
    Problem,
    frozen,
    require_positive,
    spread,
)
from trimtab.rl.data.replay import Batch


@dataclass
class SoftConfig(AlgorithmConfig):
    """Settings that DSRL-SAC and DSRL-NA share."""

    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    # How critics are regressed: squared, or logistic as in best_of_n.
    critic_loss: str = "squared"
    learning_rate: float = 1e-3
    # Share of the online critic that its target takes over at each update.
    tau: float = 0.005
    # Critic updates per actor and temperature update.
    actor_every: int = 2
    # Temperature at the start; fixed there with learn_temperature=false.
    initial_temperature: float = 0.01
    learn_temperature: bool = True
    # Entropy that the temperature aims at, in nats; default: a quarter of the noise dimension, negative.
    target_entropy: float | None = None
    # Subtract alpha * log pi in the TD target (the "soft" backup).
    backup_entropy: bool = False
    # Clip TD targets to the returns that the reward allows.
    clip_targets: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "learning_rate", "tau", "actor_every", "initial_temperature")
        if self.tau > 1.0:
            raise UserError("--rl.tau", f"is a share, at most 1, got {self.tau}")
        require_critic_loss(self.critic_loss)
        if self.critic_loss == "logistic" and self.backup_entropy:
            raise UserError(
                "--rl.critic_loss", "logistic needs values that are returns; backup_entropy=false"
            )


class SoftActorCritic(Algorithm):
    """Actor, temperature and a TD critic with its target.

    Args:
        config, problem: see ``Algorithm``.
        acted: what of a transition the TD critic judges, and
        action_dim: its length.
    """

    config: SoftConfig

    def __init__(self, config: SoftConfig, problem: Problem, acted: str, action_dim: int) -> None:
        super().__init__(config, problem)
        self.acted = acted
        space, bounds = problem.space, problem.bounds
        within = bounds if config.critic_loss == "logistic" else None  # what the critics cannot leave
        # A soft value is no return: with the entropy in it there is nothing to clip to.
        self.bounds = bounds if config.clip_targets and not config.backup_entropy else within
        self.target_entropy = -space.dim / 4 if config.target_entropy is None else config.target_entropy
        self.actor = NoiseActor(problem.feature_dim, space, config.actor, problem.observe)
        self.critic = CriticEnsemble(self.actor.encoder.dim, action_dim, config.critic, within)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = torch.nn.Parameter(torch.tensor(math.log(config.initial_temperature)))
        self.critic_optimizer = self._adam(self.critic, self.actor.encoder)
        self.actor_optimizer = self._adam(self.actor.net)
        self.alpha_optimizer = self._adam(self.log_alpha)

    @property
    def alpha(self) -> Tensor:
        """The temperature."""
        return self.log_alpha.exp()

    @property
    def climbed(self) -> CriticEnsemble:
        """The critic of (features, u) that the actor climbs."""
        return self.critic

    def phase(self) -> tuple[int, ...]:
        return self.updates % self.config.actor_every == 0, self.updates % MEASURED_EVERY == 0

    def _backup(self, batch: Batch, value: Tensor, log_prob: Tensor) -> Tensor:
        """``R + D * value``, with the entropy's share where it belongs there, clipped; all (B,)."""
        if self.config.backup_entropy:
            value = value - self.alpha * log_prob
        target = batch["reward"] + batch["discount"] * value
        return target if self.bounds is None else target.clamp(*self.bounds)

    def critic_loss(self, batch: Batch, target: Tensor) -> tuple[Tensor, Tensor]:
        """Of the TD error, summed over the members, averaged over the batch; and the values (E, B)."""
        return self.critic.regress(batch["features"], batch[self.acted], target)

    def actor_loss(self, batch: Batch) -> tuple[Tensor, ActorOutput]:
        """``E[alpha * log pi(u | s) - min_e Q_e(s, u)]``; its gradient reaches the actor alone."""
        features = batch["features"].detach()
        drawn = self.actor.sample(features)
        with frozen(self.climbed):
            value = self.climbed(features, drawn.u).min(0).values
        return (self.alpha.detach() * drawn.log_prob - value).mean(), drawn

    def temperature_loss(self, log_prob: Tensor) -> Tensor:
        """``-alpha * E[log pi + target entropy]``: raises alpha where the entropy is below its target."""
        return -(self.alpha * (log_prob.detach() + self.target_entropy).mean())

    def _update_critic(self, batch: Batch, target: Tensor) -> dict[str, Tensor]:
        loss, values = self.critic_loss(batch, target)
        self._step(self.critic_optimizer, loss)
        return {
            "critic_loss": loss.detach(),
            **spread(values, self.updates),
        }

    def _update_actor(self, batch: Batch) -> dict[str, Tensor]:
        """One step of actor and temperature, where it is their turn."""
        if self.updates % self.config.actor_every:
            return {}
        loss, drawn = self.actor_loss(batch)
        self._step(self.actor_optimizer, loss)
        if self.config.learn_temperature:
            self._step(self.alpha_optimizer, self.temperature_loss(drawn.log_prob))
        metrics = {
            "actor_loss": loss.detach(),
            "entropy": -drawn.log_prob.detach().mean(),
            "alpha": self.alpha.detach(),
        }
        if self.updates % MEASURED_EVERY == 0:
            mean, log_std = drawn.mean.detach(), drawn.log_std.detach()
            metrics["noise_kl_to_prior"] = kl_to_prior(mean, log_std, self.actor.space.initial_std).mean()
            metrics["noise_rms"] = self.actor.space.scale * drawn.u.detach().square().mean().sqrt()
        return metrics

    @torch.no_grad()
    def value(self, features: Tensor, u: Tensor, chunks: Tensor) -> Tensor:
        return self.climbed(self.actor.encoder(features), u).min(0).values

    def fit_normalizer(self, features: Tensor) -> None:
        features = features.to(self.log_alpha.device)
        network: Any
        for network in self.children():
            network.normalizer.fit(features)
