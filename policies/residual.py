"""The residual actor: a bounded correction of the chunk that the frozen policy makes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.policies.acting import Choice, Denoise
from trimtab.policies.actor import ActorConfig
from trimtab.policies.networks import ClampInvertingGradients, FeatureNormalizer, mlp
from trimtab.policies.noise_samplers import NoiseSampler
from trimtab.policies.observe import ObservationEncoder, ObserveConfig

WEIGHTS, SETTINGS = "residual.safetensors", "residual.json"


class ResidualActor(nn.Module):
    """(observation, the base's chunk) -> what is added to that chunk: ``scale * tanh(net(s, a_base))``.

    The last layer starts at zero, so that before training the corrected policy is the base, bit for bit.
    Silver et al., arXiv 1812.06298; of whole chunks, with the base's own in view: Ankile et al., arXiv
    2509.19301.

    Args:
        feature_dim, observe: as for ``NoiseActor``.
        chunk_size: numbers in a chunk, steps * action_dim.
        scale: largest correction of an entry, in the policy's normalised actions.
        config: network size, and how far tanh may go; what it says of deviations has no meaning here.
    """

    def __init__(
        self,
        feature_dim: int,
        chunk_size: int,
        scale: float,
        config: ActorConfig,
        observe: ObserveConfig | None = None,
    ) -> None:
        super().__init__()
        self.encoder = ObservationEncoder(feature_dim, observe)
        self.scale = scale
        # Where tanh is flat nothing leads back: the noise actor's limit, for the same reason.
        self.limit = math.atanh(config.mean_limit) if config.mean_limit < 1.0 else None
        self.normalizer = FeatureNormalizer(self.encoder.dim)
        size = config.hidden, config.layers, config.activation, config.layer_norm
        self.net = mlp(self.encoder.dim + chunk_size, chunk_size, *size)
        for parameter in self.net[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, base: Tensor) -> Tensor:
        """Encoded observations (B, d) and the base's chunks (B, A) -> corrections (B, A)."""
        z = self.net(torch.cat([self.normalizer(features), base], 1))
        if self.limit is not None:
            z = ClampInvertingGradients.apply(z, self.limit)
        return self.scale * torch.tanh(z)

    @torch.no_grad()
    def correct(self, observations: Tensor, chunks: Tensor, noise: float = 0.0) -> Tensor:
        """What is executed at observations (B, d) in the place of the base's chunks (B, steps, action_dim).

        ``noise`` is the deviation of the exploration noise; all stays within ``scale`` of the base.
        """
        device = self.normalizer.mean.device
        base = chunks.flatten(1).to(device, torch.float32)
        correction = self(self.encoder(observations.to(device)), base)
        if noise:
            correction = (correction + noise * torch.randn_like(correction)).clamp(-self.scale, self.scale)
        return (base + correction).view(chunks.shape).to(chunks)

    def write(self, folder: Path) -> Path:
        """Write the weights and the scale. (No policy folder: nothing loads it as a LeRobot policy.)"""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS)
        (folder / SETTINGS).write_text(json.dumps({"scale": self.scale}) + "\n", encoding="utf-8")
        return folder


@dataclass(frozen=True)
class CorrectedChunk:
    """A ``ChunkPolicy`` that executes the chunk of ``base`` as ``actor`` corrects it."""

    base: NoiseSampler
    actor: ResidualActor
    draws: ClassVar[int] = 1

    def act(self, features: Tensor, prior: Tensor, denoise: Denoise) -> Choice:
        return Choice(self.actor.correct(features, self.base.act(features, prior, denoise).chunk))
