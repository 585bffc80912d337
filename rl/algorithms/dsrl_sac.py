"""DSRL-SAC: soft actor-critic whose action is the noise of a frozen policy.

Source: Wagenmaker et al., arXiv 2506.15799, section 4 (the noise as the action of a transformed MDP), with
SAC of Haarnoja et al., arXiv 1812.05905. The critic sees (observation features, noise) and never the
action; the base policy is called when acting only.

Deviations from the paper's code that are our defaults, each for a reason given in ``dsrl_sac.md``:
no entropy in the backup, a small initial temperature, n-step returns over chunks, targets clipped to
what the reward allows, one actor step for two critic steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.rl.algorithms.base import AlgorithmConfig, Problem
from trimtab.rl.algorithms.soft import SoftActorCritic, SoftConfig
from trimtab.rl.data.replay import Batch


@AlgorithmConfig.register_subclass("dsrl_sac")
@dataclass
class DSRLSACConfig(SoftConfig):
    """Settings of DSRL-SAC."""

    def build(self, problem: Problem) -> DSRLSAC:
        return DSRLSAC(self, problem)


class DSRLSAC(SoftActorCritic):
    """See the module's docstring."""

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
