"""The residual actor: a bounded correction of the chunk that the frozen policy makes, alone or as an edit."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.adapters.errors import at_least
from trimtab.policies.acting import Choice, ChunkPolicy, Denoise, Edit
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.networks import ClampInvertingGradients, FeatureNormalizer, mlp
from trimtab.policies.observe import ObservationEncoder, ObserveConfig

WEIGHTS, SETTINGS = "residual.safetensors", "residual.json"


@dataclass
class EditConfig:
    """``--rl.edit.*``: edits of the chunks that the frozen policy makes of chosen noise."""

    # Largest change of an entry of a chunk, in the policy's normalised actions (mostly -1 to 1); 0: no edits.
    scale: float = 0.0
    # Deviation of the exploration noise, as a share of scale.
    exploration: float = 0.1
    # Weight of half the squared change, as shares of scale and summed over the entries, in units of return.
    # It holds edits near none, as prior_weight holds the noise near the base's.
    penalty: float = 0.25

    def __post_init__(self) -> None:
        at_least(0, self, "--rl.edit.", "scale", "exploration", "penalty")


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
        """Encoded observations (B, d) and the base's chunks (B, A) -> corrections (B, A).

        With K chunks to an observation, (B, K, A) -> (B, K, A).
        """
        seen = self.normalizer(features)
        if base.dim() > 2:
            seen = seen.unsqueeze(1).expand(-1, base.shape[1], -1)
        z = self.net(torch.cat([seen, base], -1))
        if self.limit is not None:
            z = ClampInvertingGradients.apply(z, self.limit)
        return self.scale * torch.tanh(z)

    @torch.no_grad()
    def correct(self, observations: Tensor, chunks: Tensor, noise: float = 0.0) -> Tensor:
        """What is executed at observations (B, d) in the place of the base's chunks (B, steps, action_dim).

        Or in the place of several to an observation, (B, K, steps, action_dim).
        ``noise`` is the deviation of the exploration noise; all stays within ``scale`` of the base.
        """
        device = self.normalizer.mean.device
        base = chunks.flatten(-2).to(device, torch.float32)
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
    """A ``ChunkPolicy`` that executes the chunk of ``base``, which takes one draw, as ``edit`` changes it."""

    base: ChunkPolicy
    edit: Edit
    draws: ClassVar[int] = 1

    def act(self, features: Tensor, prior: Tensor, denoise: Denoise) -> Choice:
        made = self.base.act(features, prior, denoise)
        return Choice(self.edit(features, made.chunk), made.u)


def edits_of(actor: NoiseActor, edit: ResidualActor | None, noise: float = 0.0) -> Edit | None:
    """How ``edit`` changes chunks at observations that the encoder of ``actor`` sees; ``None``: not at all.

    ``noise`` is the deviation of the exploration noise.
    """
    if edit is None:
        return None
    return lambda features, chunks: edit.correct(actor.encode(features), chunks, noise)
