"""The noise actor: a squashed Gaussian over the bounded noise space."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.adapters import UserError
from trimtab.policies.networks import FeatureNormalizer, mlp
from trimtab.policies.noise_space import NoiseSpace


@dataclass
class ActorConfig:
    """Size of the noise actor."""

    # Width and number of the hidden layers.
    hidden: int = 128
    layers: int = 3
    # Range of the log standard deviation before squashing.
    log_std_min: float = -5.0
    log_std_max: float = 1.0

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.layers < 1:
            raise UserError("--rl.actor.layers", "and hidden must be at least 1")
        if not self.log_std_min < 0.0 < self.log_std_max:
            raise UserError(
                "--rl.actor.log_std_min",
                f"must lie below 0 and log_std_max above, got {self.log_std_min} and {self.log_std_max}",
            )


@dataclass
class ActorOutput:
    """A draw from the actor.

    Attributes:
        u: (B, dim) in [-bound, bound].
        log_prob: (B,) log density of ``u``.
        mean, log_std: (B, dim) of the Gaussian before squashing.
    """

    u: Tensor
    log_prob: Tensor
    mean: Tensor
    log_std: Tensor


class NoiseActor(nn.Module):
    """Observation features -> distribution over ``u``.

    The head starts at mean 0 and standard deviation 1, which through ``NoiseSpace.squash`` is the policy's
    own noise with its tails pressed in: before training, the steered policy samples much like the base
    does in this noise space.

    Args:
        feature_dim: length of the observation features.
        space: the noise space.
        config: network size.
    """

    def __init__(self, feature_dim: int, space: NoiseSpace, config: ActorConfig) -> None:
        super().__init__()
        self.space = space
        self.config = config
        self.normalizer = FeatureNormalizer(feature_dim)
        self.net = mlp(feature_dim, 2 * space.dim, config.hidden, config.layers)
        head = self.net[-1]
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, feature_dim) -> mean and log_std before squashing, each (B, dim)."""
        mean, raw = self.net(self.normalizer(features)).chunk(2, dim=-1)
        return mean, self._bounded_log_std(raw)

    def _bounded_log_std(self, raw: Tensor) -> Tensor:
        """Smoothly into [log_std_min, log_std_max], with 0 at 0."""
        low, high = self.config.log_std_min, self.config.log_std_max
        offset = math.atanh(-(high + low) / (high - low))  # raw = 0 -> log_std = 0
        # The factor makes the slope at 0 one, whatever the range.
        slope = 0.5 * (high - low) * (1.0 - math.tanh(offset) ** 2)
        return low + 0.5 * (high - low) * (torch.tanh(raw / slope + offset) + 1.0)

    def sample(self, features: Tensor, eps: Tensor | None = None) -> ActorOutput:
        """Draw ``u`` by reparametrisation.

        Args:
            features: (B, feature_dim).
            eps: (B, dim) standard normal draw; made here where ``None``.
        """
        mean, log_std = self(features)
        eps = torch.randn_like(mean) if eps is None else eps
        z = mean + log_std.exp() * eps
        log_prob = (
            -0.5 * eps.square() - log_std - 0.5 * math.log(2.0 * math.pi) - self.space.log_slope(z)
        ).sum(-1)
        return ActorOutput(self.space.squash(z), log_prob, mean, log_std)

    @torch.no_grad()
    def act(self, features: Tensor, prior: Tensor, deterministic: bool = False) -> Tensor:
        """Noise (B, *spec.shape) for the policy.

        Args:
            features: (B, feature_dim).
            prior: (B, *spec.shape) fresh draw from the policy's noise distribution. Its first ``dim``
                entries are the actor's randomness too: one stream of draws decides an episode.
            deterministic: take the mean.
        """
        mean, log_std = self(features)
        eps = prior.flatten(1)[:, : self.space.dim].to(mean)
        z = mean if deterministic else mean + log_std.exp() * eps
        return self.space.expand(self.space.squash(z), prior)


def kl_to_prior(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, std) || N(0, I)) in nats, (B,): how far the noise has left what the base draws."""
    return 0.5 * (mean.square() + (2.0 * log_std).exp() - 1.0 - 2.0 * log_std).sum(-1)
