"""The image encoder of noise actor and critics, and the random shift of replayed images.

Architecture and augmentation of DrQ-v2 (Yarats et al., arXiv 2107.09645): four 3x3 convolutions of 32
channels, the first of stride 2, then a linear layer, LayerNorm and tanh. One encoder serves all networks:
the TD loss of the critic trains it, everything else sees what it makes without gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.policies.observe import ObserveConfig

CHANNELS = 32
STRIDES = (2, 1, 1, 1)


def random_shift(images: Tensor, pad: int) -> Tensor:
    """Each of images (B, C, H, W) shifted by up to ``pad`` pixels each way, its border repeated.

    That is pad and crop in one gather. All channels, so all cameras of an observation, move together.
    """
    if pad == 0:
        return images
    batch, _, height, width = images.shape
    device = images.device
    offset = torch.randint(-pad, pad + 1, (2, batch, 1), device=device)
    rows = (torch.arange(height, device=device) + offset[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + offset[1]).clamp(0, width - 1)
    index = (rows.unsqueeze(2) * width + columns.unsqueeze(1)).flatten(1)  # (B, H * W)
    flat = images.flatten(2)
    return flat.gather(2, index.unsqueeze(1).expand_as(flat)).view_as(images)


class ObservationEncoder(nn.Module):
    """Packed observations -> what the networks look at; the identity where there are no pixels in them.

    ``vector_dim`` entries come before the pixels, of which ``observe`` (resolved; ``None``: there are none)
    tells the shape. What comes out is ``dim`` long: the vector, and ``image_dim`` entries for the images.
    """

    def __init__(self, vector_dim: int, observe: ObserveConfig | None = None) -> None:
        super().__init__()
        self.vector_dim = self.dim = vector_dim
        self.image_shape = observe.image_shape if observe else None
        if observe is None or self.image_shape is None:
            return
        self.shift = observe.shift
        layers: list[nn.Module] = []
        channels, size = self.image_shape[:2]
        for stride in STRIDES:
            convolution = nn.Conv2d(channels, CHANNELS, 3, stride)
            nn.init.orthogonal_(convolution.weight, nn.init.calculate_gain("relu"))
            nn.init.zeros_(convolution.bias)
            layers += [convolution, nn.ReLU()]
            channels, size = CHANNELS, (size - 3) // stride + 1
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Sequential(
            nn.Linear(CHANNELS * size**2, observe.image_dim), nn.LayerNorm(observe.image_dim), nn.Tanh()
        )
        self.dim += observe.image_dim

    def forward(self, observations: Tensor, augment: bool = False) -> Tensor:
        """(B, vector_dim + pixels) -> (B, dim); ``augment`` shifts the images at random."""
        if self.image_shape is None:
            return observations
        vector, pixels = observations[:, : self.vector_dim], observations[:, self.vector_dim :]
        images = pixels.unflatten(1, self.image_shape)
        if augment:
            images = random_shift(images, self.shift)
        return torch.cat([vector, self.head(self.convolutions(images / 255 - 0.5))], 1)
