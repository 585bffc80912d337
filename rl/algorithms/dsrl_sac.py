"""DSRL-SAC: soft actor-critic whose action is the noise of a frozen policy.

Source: Wagenmaker et al., arXiv 2506.15799, section 4 (the noise as the action of a transformed MDP), with
SAC of Haarnoja et al., arXiv 1812.05905: the actor maximises ``value - alpha * log pi``, and the temperature
``alpha`` follows a target entropy. The critic sees (observation features, noise) and never the action; the
base policy is called when acting only.

Deviations from the paper's code that are our defaults, each for a reason given in ``dsrl_sac.md``:
no entropy in the backup, a small initial temperature, n-step returns over chunks, targets clipped to
what the reward allows, one actor step for two critic steps.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.adapters import UserError
from trimtab.policies.actor import ActorConfig, ActorOutput, NoiseActor, kl_to_prior
from trimtab.policies.critic import LOSSES, CriticConfig, CriticEnsemble
from trimtab.rl.algorithms.base import MEASURED_EVERY, Algorithm, AlgorithmConfig, Problem, frozen
from trimtab.rl.data.replay import Batch


@dataclass
class SoftConfig(AlgorithmConfig):
    """Settings that DSRL-SAC and DSRL-NA share."""

    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    # How critics are regressed: squared, or logistic as in best_of_n.
    critic_loss: str = "squared"
    # Temperature at the start; fixed there with learn_temperature=false.
    initial_temperature: float = 0.01
    learn_temperature: bool = True
    # Entropy that the temperature aims at, in nats; default: a quarter of the noise dimension, negative.
    target_entropy: float | None = None
    # Subtract alpha * log pi in the TD target (the "soft" backup).
    backup_entropy: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("initial_temperature")
        self.require_known(critic_loss=LOSSES)
        if self.critic_loss == "logistic" and self.backup_entropy:
            raise UserError(
                "--rl.critic_loss", "logistic needs values that are returns; backup_entropy=false"
            )


class SoftActorCritic(Algorithm):
    """Actor, temperature and a TD critic with its target: what DSRL-SAC and DSRL-NA share.

    They differ in what that critic sees beside the features (the noise, or the chunk: ``critic_input_dim``),
    and so in the critic that the actor climbs.
    """

    config: SoftConfig

    def __init__(self, config: SoftConfig, problem: Problem, critic_input_dim: int) -> None:
        super().__init__(config, problem)
        space, bounds = problem.space, problem.bounds
        within = bounds if config.critic_loss == "logistic" else None  # what the critics cannot leave
        # A soft value is no return: with the entropy in it there is nothing to clip to.
        self.bounds = bounds if config.clip_targets and not config.backup_entropy else within
        self.target_entropy = -space.dim / 4 if config.target_entropy is None else config.target_entropy
        self.actor = NoiseActor(problem.feature_dim, space, config.actor, problem.observe)
        self.critic = CriticEnsemble(self.actor.encoder.dim, critic_input_dim, config.critic, within)
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
    def actor_critic(self) -> CriticEnsemble:
        """The critic of (features, u) that the actor climbs."""
        return self.critic

    def soft_bootstrap(self, batch: Batch, value: Tensor, log_prob: Tensor) -> Tensor:
        """``bootstrap``, with the entropy's share where it belongs there; all (B,)."""
        if self.config.backup_entropy:
            value = value - self.alpha * log_prob
        return self.bootstrap(batch, value)

    def actor_loss(self, batch: Batch) -> tuple[Tensor, ActorOutput]:
        """``E[alpha * log pi(u | s) - min_e Q_e(s, u)]``; its gradient reaches the actor alone."""
        features = batch["features"].detach()
        drawn = self.actor.sample(features)
        with frozen(self.actor_critic):
            value = self.actor_critic(features, drawn.u).min(0).values
        return (self.alpha.detach() * drawn.log_prob - value).mean(), drawn

    def temperature_loss(self, log_prob: Tensor) -> Tensor:
        """``-alpha * E[log pi + target entropy]``: raises alpha where the entropy is below its target."""
        return -(self.alpha * (log_prob.detach() + self.target_entropy).mean())

    def _update_critic(self, batch: Batch, target: Tensor) -> dict[str, Tensor]:
        loss, values = self.critic_loss(batch, target)
        self._step(self.critic_optimizer, loss)
        return {"critic_loss": loss.detach(), **self.q_statistics(values)}

    def _update_actor(self, batch: Batch) -> dict[str, Tensor]:
        """One step of actor and temperature, where it is their turn."""
        if not self.every(self.config.actor_every):
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
        if self.every(MEASURED_EVERY):
            mean, log_std = drawn.mean.detach(), drawn.log_std.detach()
            metrics["noise_kl_to_prior"] = kl_to_prior(mean, log_std, self.space.initial_std).mean()
            metrics["noise_rms"] = self.space.scale * drawn.u.detach().square().mean().sqrt()
        return metrics

    @torch.no_grad()
    def value(self, features: Tensor, u: Tensor, chunks: Tensor) -> Tensor:
        return self.actor_critic(self.actor.encoder(features), u).min(0).values


@AlgorithmConfig.register_subclass("dsrl_sac")
@dataclass
class DSRLSACConfig(SoftConfig):
    """Settings of DSRL-SAC."""

    def build(self, problem: Problem) -> DSRLSAC:
        return DSRLSAC(self, problem)


class DSRLSAC(SoftActorCritic):
    """The critic sees the noise."""

    def __init__(self, config: DSRLSACConfig, problem: Problem) -> None:
        super().__init__(config, problem, problem.space.dim)

    def critic_loss(self, batch: Batch, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.critic.regress(batch["features"], batch["u"], target)

    @torch.no_grad()
    def td_target(self, batch: Batch) -> Tensor:
        """``R + D * min_e Qbar_e(s', u')`` with ``u' ~ pi(s')``, (B,); clipped to the possible returns."""
        following = self.actor.sample(batch["next_features"])
        value = self.target_critic(batch["next_features"], following.u).min(0).values
        return self.soft_bootstrap(batch, value, following.log_prob)

    def learn(self, batch: Batch) -> dict[str, Tensor]:
        return self._update_critic(batch, self.td_target(batch)) | self._update_actor(batch)
