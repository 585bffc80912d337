"""DSRL-SAC: soft actor-critic whose action is the noise of a frozen policy.

Source: Wagenmaker et al., arXiv 2506.15799, section 4 (the noise as the action of a transformed MDP), with
SAC of Haarnoja et al., arXiv 1812.05905. The critic sees (observation features, noise) and never the
action; the base policy is called when acting only.

Deviations from the paper's code that are our defaults, each for a reason measured in ``rl/README.md``:
no entropy in the backup, a small initial temperature, n-step returns over chunks, targets clipped to
what the reward allows, one actor step for two critic steps.
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
from trimtab.policies.critic import CriticConfig, CriticEnsemble
from trimtab.policies.noise_space import NoiseSpace
from trimtab.rl.algorithms.base import Algorithm, AlgorithmConfig, polyak, require_positive
from trimtab.rl.replay import Batch


@AlgorithmConfig.register_subclass("dsrl_sac")
@dataclass
class DSRLSACConfig(AlgorithmConfig):
    """Settings of DSRL-SAC."""

    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
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

    def build(
        self,
        feature_dim: int,
        space: NoiseSpace,
        accelerator: Any,
        bounds: tuple[float, float] | None,
        chunk_size: int = 0,
    ) -> DSRLSAC:
        return DSRLSAC(self, feature_dim, space, accelerator, bounds)


class DSRLSAC(Algorithm):
    """See the module's docstring.

    Args:
        config: settings.
        feature_dim: length of the observation features.
        space: noise space.
        accelerator: an ``accelerate.Accelerator``.
        bounds: smallest and largest possible return, or ``None``.
    """

    def __init__(
        self,
        config: DSRLSACConfig,
        feature_dim: int,
        space: NoiseSpace,
        accelerator: Any,
        bounds: tuple[float, float] | None,
    ) -> None:
        super().__init__()
        self.config = config
        # A soft value is no return: with the entropy in it there is nothing to clip to.
        self.bounds = bounds if config.clip_targets and not config.backup_entropy else None
        self.target_entropy = -space.dim / 4 if config.target_entropy is None else config.target_entropy
        self.actor = NoiseActor(feature_dim, space, config.actor)
        self.critic = CriticEnsemble(feature_dim, space.dim, config.critic)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = torch.nn.Parameter(torch.tensor(math.log(config.initial_temperature)))
        self.to(accelerator.device)
        self.accelerator = accelerator
        self.updates = 0
        self._critic_parameters = list(self.critic.parameters())

        def adam(parameters: list[torch.nn.Parameter]) -> Any:
            optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)
            return accelerator.prepare_optimizer(optimizer)

        self.critic_optimizer = adam(self._critic_parameters)
        self.actor_optimizer = adam(list(self.actor.parameters()))
        self.alpha_optimizer = adam([self.log_alpha])

    @property
    def alpha(self) -> Tensor:
        """The temperature."""
        return self.log_alpha.exp()

    @torch.no_grad()
    def td_target(self, batch: Batch) -> Tensor:
        """``R + D * min_e Qbar_e(s', u')`` with ``u' ~ pi(s')``, (B,); clipped to the possible returns."""
        following = self.actor.sample(batch["next_features"])
        value = self.target_critic(batch["next_features"], following.u).min(0).values
        if self.config.backup_entropy:
            value = value - self.alpha * following.log_prob
        target = batch["reward"] + batch["discount"] * value
        return target if self.bounds is None else target.clamp(*self.bounds)

    def critic_loss(self, batch: Batch, target: Tensor) -> tuple[Tensor, Tensor]:
        """Squared TD error, summed over the members, averaged over the batch; and the values (E, B)."""
        values = self.critic(batch["features"], batch["u"])
        return (values - target).square().mean(1).sum(), values

    def actor_loss(self, batch: Batch) -> tuple[Tensor, ActorOutput]:
        """``E[alpha * log pi(u | s) - min_e Q_e(s, u)]``; its gradient reaches the actor alone."""
        drawn = self.actor.sample(batch["features"])
        for parameter in self._critic_parameters:
            parameter.requires_grad_(False)
        value = self.critic(batch["features"], drawn.u).min(0).values
        for parameter in self._critic_parameters:
            parameter.requires_grad_(True)
        return (self.alpha.detach() * drawn.log_prob - value).mean(), drawn

    def temperature_loss(self, log_prob: Tensor) -> Tensor:
        """``-alpha * E[log pi + target entropy]``: raises alpha where the entropy is below its target."""
        return -(self.alpha * (log_prob.detach() + self.target_entropy).mean())

    def update(self, batch: Batch) -> dict[str, Tensor]:
        loss, values = self.critic_loss(batch, self.td_target(batch))
        self._step(self.critic_optimizer, loss)
        metrics = {
            "critic_loss": loss.detach(),
            "q_mean": values.detach().mean(),
            "q_min": values.detach().min(),
            "q_max": values.detach().max(),
        }
        if self.updates % self.config.actor_every == 0:
            loss, drawn = self.actor_loss(batch)
            self._step(self.actor_optimizer, loss)
            if self.config.learn_temperature:
                self._step(self.alpha_optimizer, self.temperature_loss(drawn.log_prob))
            metrics |= {
                "actor_loss": loss.detach(),
                "entropy": -drawn.log_prob.detach().mean(),
                "alpha": self.alpha.detach(),
                "noise_kl_to_prior": kl_to_prior(
                    drawn.mean.detach(), drawn.log_std.detach(), self.actor.space.initial_std
                ).mean(),
                "noise_rms": drawn.u.detach().square().mean().sqrt(),
            }
        polyak(self.target_critic, self.critic, self.config.tau)
        self.updates += 1
        return metrics

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        optimizer.step()

    @torch.no_grad()
    def value(self, features: Tensor, u: Tensor) -> Tensor:
        return self.critic(features, u).min(0).values

    def fit_normalizer(self, features: Tensor) -> None:
        features = features.to(self.log_alpha.device)
        for network in (self.actor, self.critic, self.target_critic):
            network.normalizer.fit(features)
