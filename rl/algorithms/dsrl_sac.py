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
from typing import Any

import torch
from torch import Tensor

from trimtab.policies.noise_space import NoiseSpace
from trimtab.policies.observe import ObserveConfig
from trimtab.rl.algorithms.base import AlgorithmConfig, as_set_up, polyak
from trimtab.rl.algorithms.soft import SoftActorCritic, SoftConfig
from trimtab.rl.data.replay import Batch


@AlgorithmConfig.register_subclass("dsrl_sac")
@dataclass
class DSRLSACConfig(SoftConfig):
    """Settings of DSRL-SAC."""

    def build(
        self,
        feature_dim: int,
        space: NoiseSpace,
        accelerator: Any,
        bounds: tuple[float, float] | None,
        chunk_size: int = 0,
        observe: ObserveConfig | None = None,
    ) -> DSRLSAC:
        return DSRLSAC(self, feature_dim, space, accelerator, bounds, observe)


class DSRLSAC(SoftActorCritic):
    """See the module's docstring.

    Args:
        config: settings.
        feature_dim: length of the observation features.
        space: noise space.
        accelerator: an ``accelerate.Accelerator``.
        bounds: smallest and largest possible return, or ``None``.
        observe: a resolved config, where there are images to look at.
    """

    def __init__(
        self,
        config: DSRLSACConfig,
        feature_dim: int,
        space: NoiseSpace,
        accelerator: Any,
        bounds: tuple[float, float] | None,
        observe: ObserveConfig | None = None,
    ) -> None:
        super().__init__(config, feature_dim, space, accelerator, bounds, "u", space.dim, observe)

    @torch.no_grad()
    def td_target(self, batch: Batch) -> Tensor:
        """``R + D * min_e Qbar_e(s', u')`` with ``u' ~ pi(s')``, (B,); clipped to the possible returns."""
        following = self.actor.sample(batch["next_features"])
        value = self.target_critic(batch["next_features"], following.u).min(0).values
        return self._backup(batch, value, following.log_prob)

    @as_set_up
    def update(self, batch: Batch) -> dict[str, Tensor]:
        batch = self.look(batch)
        metrics = self._update_critic(batch, self.td_target(batch))
        metrics |= self._update_actor(batch)
        polyak(self.target_critic, self.critic, self.config.tau)
        self.updates += 1
        return metrics
