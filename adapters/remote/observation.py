"""Images as openpi's policy server takes them, and what a message holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.adapters.config import RemoteConfig


def is_image(key: str) -> bool:
    """Whether an observation of this name is an image."""
    return key.startswith("observation.image")


def sent_images(options: RemoteConfig, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as the server's: (B, side, side, 3) uint8, or channels first."""
    if images.is_floating_point():
        images = (images * 255).round().clamp(0, 255)
    arrays = images.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    if options.image_size:
        arrays = np.stack([resize_with_pad(image, options.image_size) for image in arrays])
    if options.channels_first:
        arrays = arrays.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(arrays))


def describe(message: dict[str, Any], prefix: str = "") -> list[str]:
    """The names in a message, with the shapes of arrays."""
    names = []
    for key, value in message.items():
        if isinstance(value, dict):
            names += describe(value, f"{prefix}{key}.")
        else:
            names.append(f"{prefix}{key}" + (f" {value.shape}" if isinstance(value, np.ndarray) else ""))
    return names


def resize_with_pad(image: np.ndarray, side: int) -> np.ndarray:
    """Fit an image (H, W, 3) uint8 into (side, side, 3), centred on black, as openpi's clients do."""
    from PIL import Image

    height, width = image.shape[:2]
    if (height, width) == (side, side):
        return image
    ratio = max(width / side, height / side)
    inner = int(height / ratio), int(width / ratio)
    canvas = np.zeros((side, side, 3), np.uint8)
    top, left = (side - inner[0]) // 2, (side - inner[1]) // 2
    small = Image.fromarray(image).resize(inner[::-1], Image.Resampling.BILINEAR)
    canvas[top : top + inner[0], left : left + inner[1]] = np.asarray(small)
    return canvas
