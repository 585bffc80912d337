"""Critic ensembles over (observation features, noise or chunk)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from trimtab.adapters import UserError
from trimtab.policies.networks import EnsembleMLP, FeatureNormalizer, require_activation

LOSSES = ("logistic", "squared")


@dataclass
class CriticConfig:
    """Size of the critic ensemble."""

    members: int = 2
    hidden: int = 128
    layers: int = 3
    layer_norm: bool = True
    # relu or tanh.
    activation: str = "relu"
    # Share of the hidden units that is dropped while it learns, and only then.
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_activation("--rl.critic.activation", self.activation)
        if min(self.members, self.hidden, self.layers) < 1:
            raise UserError("--rl.critic.members", "hidden and layers must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError("--rl.critic.dropout", f"is a share, from 0 to below 1, got {self.dropout}")


class CriticEnsemble(nn.Module):
    """``Q_e(features, u)`` for every member ``e`` at once.

    With ``bounds`` a member's output is the logit of where its value lies between them, and it learns by
    cross-entropy, as in "Stop Regressing" (Farebrother et al., arXiv 2403.03950) with two classes. Whatever
    the scale of the returns, its first values lie in their middle, and a step of the optimiser moves them
    alike: few transitions are enough to tell chunks apart. Without, it learns values by squared error.

    ``dropout`` keeps members from remembering by its states how each of few episodes ended.
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        config: CriticConfig,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.bounds, self.members, self.dropout = bounds, config.members, config.dropout
        self.normalizer = FeatureNormalizer(feature_dim)
        size = config.hidden, config.layers, config.layer_norm, config.activation
        self.net = EnsembleMLP(config.members, feature_dim + action_dim, *size)

    def forward(self, features: Tensor, u: Tensor) -> Tensor:
        """Values: (B, feature_dim), (B, action_dim) -> (E, B).

        With m actions to a state, (B, m, action_dim) -> (E, B, m).
        """
        return self._values(self.net(self.normalizer(features), u))

    @torch.no_grad()
    def smallest(self, features: Tensor, u: Tensor, count: int) -> Tensor:
        """The smallest value among ``count`` members, drawn anew at each call: (B,), or (B, m) as above.

        A pessimism that does not grow with the ensemble: REDQ (Chen et al., arXiv 2101.05982).
        """
        members = None
        if count < self.members:
            members = torch.rand(self.members, device=u.device).argsort()[:count]
        return self._values(self.net(self.normalizer(features), u, members)).min(0).values

    def regress(self, features: Tensor, u: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, averaged over the batch and summed over the members, and the values without gradient.

        ``target`` is (B,) or (E, B), with m actions to a state (B, m) or (E, B, m); within ``bounds``. Only
        here units are dropped. DroQ (Hiraoka et al., arXiv 2110.02034) drops them in targets, too.
        """
        outputs = self.net(self.normalizer(features), u, dropout=self.dropout)
        if self.bounds is None:
            errors = (outputs - target).square()
        else:
            low, high = self.bounds
            probability = ((target - low) / (high - low)).expand_as(outputs)
            errors = binary_cross_entropy_with_logits(outputs, probability, reduction="none")
        return errors.flatten(1).mean(1).sum(), self._values(outputs.detach())

    @torch.no_grad()
    def begin_at(self, value: float) -> None:
        """Move what has learnt nothing from the middle of its ``bounds``, if any, to ``value``."""
        if self.bounds is not None:
            low, high = self.bounds
            share = torch.tensor((value - low) / (high - low)).clamp(1e-4, 1.0 - 1e-4)
            self.net.biases[-1] += torch.logit(share)

    def _values(self, outputs: Tensor) -> Tensor:
        if self.bounds is None:
            return outputs
        low, high = self.bounds
        return low + (high - low) * torch.sigmoid(outputs)
