"""Critic ensembles over (observation features, noise or chunk), and the choice among chunks by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.adapters import UserError
from trimtab.policies.networks import EnsembleMLP, FeatureNormalizer, require_activation


@dataclass
class CriticConfig:
    """Size of the critic ensemble."""

    members: int = 2
    hidden: int = 128
    layers: int = 3
    layer_norm: bool = True
    # relu or tanh.
    activation: str = "relu"

    def __post_init__(self) -> None:
        require_activation("--rl.critic.activation", self.activation)
        if min(self.members, self.hidden, self.layers) < 1:
            raise UserError("--rl.critic.members", "hidden and layers must be at least 1")


class CriticEnsemble(nn.Module):
    """``Q_e(features, u)`` for every member ``e`` at once."""

    def __init__(self, feature_dim: int, action_dim: int, config: CriticConfig) -> None:
        super().__init__()
        self.normalizer = FeatureNormalizer(feature_dim)
        self.net = EnsembleMLP(
            config.members,
            feature_dim + action_dim,
            1,
            config.hidden,
            config.layers,
            config.layer_norm,
            config.activation,
        )

    def forward(self, features: Tensor, u: Tensor) -> Tensor:
        """(B, feature_dim), (B, action_dim) -> (E, B).

        With m actions to a state, (B, m, action_dim) -> (E, B, m).
        """
        values = self.net(self.normalizer(features), u)
        return values.view(-1, *u.shape[:-1])


@torch.no_grad()
def best_candidate(critic: CriticEnsemble, features: Tensor, chunks: Tensor) -> Tensor:
    """Which chunk has the best mean value: (B, d), (B, K, steps, action_dim) -> (B,)."""
    device = critic.normalizer.mean.device
    values = critic(features.float().to(device), chunks.flatten(2).float().to(device))
    return values.mean(0).argmax(1).to(chunks.device)
