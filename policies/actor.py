"""The noise actor: a squashed Gaussian over the bounded noise space."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapters import UserError
from trimtab.policies.networks import ClampInvertingGradients, FeatureNormalizer, mlp, require_activation
from trimtab.policies.noise_space import NoiseSpace
from trimtab.policies.observe import ObservationEncoder, ObserveConfig


@dataclass
class ActorConfig:
    """Size of the noise actor."""

    # Width and number of the hidden layers.
    hidden: int = 128
    layers: int = 3
    # relu or tanh, and whether each is preceded by a LayerNorm.
    activation: str = "relu"
    layer_norm: bool = False
    # Range of the log standard deviation before squashing.
    log_std_min: float = -5.0
    log_std_max: float = 1.0
    # Clamp it to that range, as Stable-Baselines3 does, instead of leading it there by a tanh.
    log_std_clamp: bool = False
    # How far the squashed mean may go, as a share of the bound; 1 lets it run to where tanh is flat.
    mean_limit: float = 0.98

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.layers < 1:
            raise UserError("--rl.actor.layers", "and hidden must be at least 1")
        require_activation("--rl.actor.activation", self.activation)
        if not self.log_std_min < 0.0 < self.log_std_max:
            raise UserError(
                "--rl.actor.log_std_min",
                f"must lie below 0 and log_std_max above, got {self.log_std_min} and {self.log_std_max}",
            )
        if not 0.0 < self.mean_limit <= 1.0:
            raise UserError("--rl.actor.mean_limit", f"is a share, above 0, got {self.mean_limit}")


@dataclass
class ActorOutput:
    """A draw ``u`` (B, dim), its log density (B,), and mean and log_std (B, dim) before squashing."""

    u: Tensor
    log_prob: Tensor
    mean: Tensor
    log_std: Tensor


class NoiseActor(nn.Module):
    """Observation features (``feature_dim`` long, without the pixels) -> distribution over ``u``.

    The head starts at mean 0 and the noise space's own deviation, which through ``NoiseSpace.squash`` is
    the policy's noise with its tails pressed in: before training, the steered policy samples much like the
    base does in this noise space. In a space that does not use the features there is nothing but a head.

    ``choose`` and ``act`` take observations as they come; ``forward`` and ``sample`` what ``encoder`` makes
    of them, which differs where ``observe``, a resolved config, looks at images. The critics share the
    encoder and train it; the actor's own loss does not.
    """

    def __init__(
        self,
        feature_dim: int,
        space: NoiseSpace,
        config: ActorConfig,
        observe: ObserveConfig | None = None,
    ) -> None:
        super().__init__()
        self.encoder = ObservationEncoder(feature_dim, observe)
        self.space, self.config = space, config
        # Of the mean before squashing: where |squash(mean)| = mean_limit * bound.
        self.limit = space.bound * math.atanh(config.mean_limit) if config.mean_limit < 1.0 else None
        self.normalizer = FeatureNormalizer(self.encoder.dim if space.uses_features else 0)
        size = config.hidden, config.layers, config.activation, config.layer_norm
        self.net: Any = mlp(len(self.normalizer.mean), 2 * space.dim, *size)
        weight, bias = self.net[-1].parameters()  # of the layer that makes mean and log_std
        nn.init.zeros_(weight)
        nn.init.zeros_(bias)
        # A tanh leads log_std into its range: 0 at 0, with slope 1.
        low, high = config.log_std_min, config.log_std_max
        self.offset = math.atanh(-(high + low) / (high - low))
        self.slope = 0.5 * (high - low) * (1.0 - math.tanh(self.offset) ** 2)
        if space.initial_std != 1.0:
            start = math.log(space.initial_std)
            if not low < start < high:
                raise UserError("--rl.actor.log_std_min", f"{low} leaves no room for a start at {start:.2f}")
            if not config.log_std_clamp:
                start = self.slope * (math.atanh(2.0 * (start - low) / (high - low) - 1.0) - self.offset)
            nn.init.constant_(bias[space.dim :], start)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, feature_dim) -> mean and log_std before squashing, each (B, dim)."""
        seen = features if self.space.uses_features else features[:, :0]
        mean, raw = self.net(self.normalizer(seen)).chunk(2, dim=-1)
        mean = mean if self.limit is None else ClampInvertingGradients.apply(mean, self.limit)
        low, high = self.config.log_std_min, self.config.log_std_max
        if self.config.log_std_clamp:
            return mean, raw.clamp(low, high)
        return mean, low + 0.5 * (high - low) * (torch.tanh(raw / self.slope + self.offset) + 1.0)

    def sample(self, features: Tensor, eps: Tensor | None = None) -> ActorOutput:
        """Draw ``u`` by reparametrisation, from ``eps`` (B, dim), a standard normal draw."""
        mean, log_std = self(features)
        eps = torch.randn_like(mean) if eps is None else eps
        z = mean + log_std.exp() * eps
        density = -0.5 * eps.square() - log_std - self.space.log_slope(z)
        log_prob = density.sum(1) - 0.5 * math.log(2.0 * math.pi) * self.space.dim
        return ActorOutput(self.space.squash(z), log_prob, mean, log_std)

    def log_prob(self, features: Tensor, u: Tensor) -> Tensor:
        """``log pi(u | s)``, (B,), of ``u`` (B, dim)."""
        space, z = self.space, self.space.unsquash(u, 0.999)
        mean, log_std = self(features)
        gaussian = -0.5 * ((z - mean) * (-log_std).exp()).square() - log_std
        return (gaussian - 0.5 * math.log(2.0 * math.pi) - space.log_slope(z)).sum(-1)

    @torch.no_grad()
    def encode(self, observations: Tensor) -> Tensor:
        """Observations as they come -> what the networks look at, on their device."""
        return self.encoder(observations.to(self.normalizer.mean.device))

    @torch.no_grad()
    def choose(self, features: Tensor, prior: Tensor, deterministic: bool = False) -> Tensor:
        """``u`` (B, dim).

        Args:
            features: (B, feature_dim), packed observations where images are looked at.
            prior: (B, *spec.shape) fresh draw from the policy's noise distribution. The actor's randomness
                is made of it (``NoiseSpace.draw``): one stream of draws decides an episode.
            deterministic: take the mean.
        """
        features = features.to(self.normalizer.mean.device)
        seen = self.encoder(features) if self.space.uses_features else features
        mean, log_std = self(seen)
        z = mean if deterministic else mean + log_std.exp() * self.space.draw(prior).to(mean)
        return self.space.squash(z)

    def act(self, features: Tensor, prior: Tensor, deterministic: bool = False) -> Tensor:
        """Noise (B, *spec.shape) for the policy; arguments as for ``choose``."""
        u = self.choose(features, prior, deterministic)
        return self.space.expand(u, prior.to(u.device))

    @torch.no_grad()
    def begin_at(self, noise: Tensor) -> Tensor:
        """Make a constant ``noise`` (*spec.shape) the mean of an untrained actor; its deviation stays.

        Returns that mean before squashing, (dim,). A UserError says that the noise space cannot express it.
        """
        space, wanted = self.space, noise.unsqueeze(0).float()
        if not space.determines_noise:
            raise UserError(
                "--noise.type", "this noise space draws a part of the noise afresh; use full for a warm start"
            )
        share = self.config.mean_limit if self.config.mean_limit < 1.0 else 0.999
        u = space.project(wanted).clamp(-share * space.bound, share * space.bound)
        if not torch.allclose(space.expand(u, wanted).float(), wanted, atol=1e-5):
            largest, reach = float(wanted.abs().max()), share * space.bound * space.scale
            if largest > reach:
                raise UserError(
                    "--noise.bound",
                    f"the warm start reaches {largest:.2f}, an actor here {reach:.2f}; raise the bound to "
                    f"{1.05 * largest:.2f}",
                )
            raise UserError(
                "--noise.type", "this noise space cannot make the noise of the warm start; use full"
            )
        mean = space.unsquash(u[0]).to(self.net[-1].bias)
        self.net[-1].bias[: space.dim] = mean
        return mean


def kl_to_prior(mean: Tensor, log_std: Tensor, prior_std: float = 1.0) -> Tensor:
    """KL(N(mean, std) || N(0, prior_std)) in nats, (B,): how far the noise has left what the base draws.

    With ``prior_std = space.initial_std`` it is 0 for an untrained actor in every noise space.
    """
    log_ratio = 2.0 * (log_std - math.log(prior_std))
    return 0.5 * ((mean / prior_std).square() + log_ratio.exp() - 1.0 - log_ratio).sum(-1)


def constant_actor(noise: Tensor, space: NoiseSpace, config: ActorConfig | None = None) -> NoiseActor:
    """The actor that always takes ``noise`` (*spec.shape), for a ``constant`` space; see ``begin_at``.

    It is exact where it acts by its mean; its least deviation is what remains in draws.
    """
    if space.uses_features:
        raise ValueError("an actor of one noise needs a noise space of the type 'constant'")
    actor = NoiseActor(0, space, config or ActorConfig())
    actor.begin_at(noise)
    actor.net[-1].bias.data[space.dim :] = -1e3  # the least deviation
    return actor
