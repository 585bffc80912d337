"""An observation as openpi's policy server takes it: which names, which image layout, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from torch import Tensor

from trimtab.adapters import Conditioning, UserError
from trimtab.adapters.config import RemoteConfig

DEFAULT_SIDE = 224  # of an example image that is sent as it is


def is_image(key: str) -> bool:
    """Whether an observation of this name is an image."""
    return key.startswith("observation.image")


def input_features(options: RemoteConfig) -> dict[str, PolicyFeature]:
    """The observations that are sent, as the features of a LeRobot config."""
    features = {}
    for key in options.keys:
        if is_image(key):
            side = options.image_size or DEFAULT_SIDE
            features[key] = PolicyFeature(FeatureType.VISUAL, (3, side, side))
        elif options.dims.get(key, 0) < 1:
            raise UserError("--policy.remote.dims", f"say how many entries {key} has: {{{key}: 8}}")
        else:
            features[key] = PolicyFeature(FeatureType.STATE, (options.dims[key],))
    if not features:
        raise UserError("--policy.remote.keys", "name at least one observation to send")
    return features


def check_sent(options: RemoteConfig, observation: dict[str, Any]) -> None:
    """Refuse a raw observation that lacks what is to be sent, or has it in another shape."""
    missing = [key for key in options.keys if key not in observation]
    if missing:
        given = ", ".join(sorted(key for key in observation if key.startswith("observation"))) or "none"
        raise UserError(
            "--policy.remote.keys",
            f"the server is sent {', '.join(missing)}, the environment gives {given}; choose the "
            "environment that the policy was trained on, or map what there is to the server's names",
        )
    for key in options.keys:
        shape = tuple(observation[key].shape[2:])
        if is_image(key) and len(shape) != 3:
            raise UserError("--policy.remote.keys", f"{key} of shape {shape} is no image")
        if not is_image(key) and shape != (options.dims[key],):
            raise UserError(
                "--policy.remote.dims",
                f"{key} is said to have {options.dims[key]} entries, the environment gives {shape}",
            )


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


def message_of(options: RemoteConfig, conditioning: Conditioning, row: int) -> dict[str, Any]:
    """Observation ``row`` as the server takes it."""
    content: dict[str, Any] = {}
    for key, name in options.keys.items():
        *parents, last = name.split(".")
        inner = content
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = conditioning.tensors[key][row].numpy()
    if "task" in conditioning.lists:
        content[options.prompt_key] = conditioning.lists["task"][row]
    return content


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
