"""What noise actor and critics look at: ``--observe.*``, and how one observation becomes a row of numbers.

A packed observation is one row (d,) float32: first a vector (backbone features, state, task), then, where
cameras take part, their pixels as whole numbers from 0 to 255, channels first. So it passes through whatever
handles features; the replay keeps the pixels as uint8 (``rl/data/frames.py``), and the networks take the row
apart (``ObservationEncoder``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE
from torch import Tensor, nn
from torch.nn.functional import interpolate, one_hot

from trimtab.adapters import Conditioning, PolicyAdapter, UserError
from trimtab.adapters.errors import at_least

INPUTS = ("features", "state", "images", "task")
STATES = (OBS_STATE, OBS_ENV_STATE)
CHANNELS, STRIDES = 32, (2, 1, 1, 1)  # of the encoder's 3x3 convolutions
SMALLEST_IMAGE = 15  # they take 14 off


@dataclass
class ObserveConfig:
    """``--observe.*``: what actor and critics look at.

    A run fills in what is ``None`` (``resolved``), and its artefact holds it so.
    """

    # Any of features (the policy's own encoding of the observation), state (its normalised states), images
    # (its cameras, made small) and task (one entry per task). Default: features where the policy offers
    # them, else state and images, as far as the policy has them.
    inputs: list[str] | None = None
    # images: which cameras, by the policy's names; default: all of them.
    cameras: list[str] | None = None
    # images: pixels to a side.
    image_size: int = 64
    # images: length of what the encoder makes of them.
    image_dim: int = 50
    # images: pixels by which a replayed image is shifted at random, at most (0: not at all).
    shift: int = 4
    # task: the instructions that are told apart; default: those of the run.
    tasks: list[str] | None = None

    def __post_init__(self) -> None:
        if self.inputs is not None:
            wrong = [name for name in self.inputs if name not in INPUTS]
            if wrong or not self.inputs or len(set(self.inputs)) < len(self.inputs):
                raise UserError(
                    "--observe.inputs", f"takes some of {', '.join(INPUTS)}, each once, got {self.inputs}"
                )
        at_least(SMALLEST_IMAGE, self, "--observe.", "image_size")
        at_least(1, self, "--observe.", "image_dim")
        if not 0 <= self.shift < self.image_size:
            raise UserError("--observe.shift", f"must be between 0 and image_size - 1, got {self.shift}")

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(3 * cameras, side, side) of a resolved config; ``None`` where it looks at no images."""
        if "images" not in (self.inputs or ()):
            return None
        return 3 * len(self.cameras or ()), self.image_size, self.image_size

    @property
    def pixels(self) -> int:
        """Numbers at the end of a packed observation that are pixels."""
        return 0 if self.image_shape is None else self.image_shape[0] * self.image_size**2

    def resolved(self, adapter: PolicyAdapter, tasks: Sequence[str]) -> ObserveConfig:
        """This config with nothing left open, for a loaded policy and the instructions of a run.

        Raises:
            UserError: the policy does not have what is asked for.
        """
        inputs = self.inputs
        if inputs == ["features"] or (inputs is None and adapter.offers_features):
            return replace(self, inputs=["features"], cameras=None, tasks=None)
        example = adapter.example_observation(
            min(2, adapter.max_batch or 2), torch.Generator().manual_seed(0)
        )
        batch = adapter.preprocess(example)
        states = any(name in batch for name in STATES)
        cameras = [key for key in adapter.cameras() if self.cameras is None or key in self.cameras]
        unknown = set(self.cameras or ()) - set(cameras)
        if unknown:
            known = ", ".join(adapter.cameras()) or "none"
            raise UserError(
                "--observe.cameras", f"the policy has no {', '.join(sorted(unknown))}, only {known}"
            )
        if inputs is None:
            inputs = ["state"] * states + ["images"] * bool(cameras)
        name = adapter.policy_type
        if not inputs:
            raise UserError(
                "--policy.path", f"the {name} adapter offers nothing to steer by: no features, no input"
            )
        if "features" in inputs and not adapter.offers_features:
            raise UserError("--observe.inputs", f"the {name} adapter offers no features; use state, images")
        if "state" in inputs and not states:
            raise UserError("--observe.inputs", f"the {name} policy is given no state; leave it out")
        if "images" in inputs:
            if not cameras:
                raise UserError("--observe.inputs", f"the {name} policy has no camera; leave images out")
            _check_images(adapter, example, batch, cameras, self.image_size)
        return replace(
            self,
            inputs=list(inputs),
            cameras=cameras if "images" in inputs else None,
            tasks=(self.tasks or sorted(set(tasks))) if "task" in inputs else None,
        )


class Observer:
    """Packs observations for a noise actor, by a resolved config; set as ``adapter.observer``."""

    def __init__(self, config: ObserveConfig, adapter: PolicyAdapter) -> None:
        self.config, self.adapter = config, adapter

    def __call__(
        self, conditioning: Conditioning, batch: dict[str, Any], tasks: Sequence[str] | None
    ) -> Tensor:
        """Packed observations (B, d) float32.

        Args:
            conditioning, batch: what the policy and its preprocessor made of the observations; of a history,
                the states take part whole and the cameras with their last image.
            tasks: B instructions.

        Raises:
            UserError: an instruction that the actor does not know.
        """
        config, parts = self.config, []
        inputs = config.inputs or ()
        if "features" in inputs:
            parts.append(self.adapter.features(conditioning))
        if "state" in inputs:
            parts += [batch[name].flatten(1) for name in STATES if name in batch]
        if "task" in inputs:
            known = list(config.tasks or ())
            tasks = tasks or [""] * conditioning.observations
            if unknown := [task for task in tasks if task not in known]:
                raise UserError(
                    "--env.task",
                    f"the noise actor was told of {', '.join(map(repr, known))}, not of {unknown[0]!r}",
                )
            parts.append(one_hot(torch.tensor([known.index(task) for task in tasks]), len(known)))
        if "images" in inputs:
            parts.append(images(self.adapter, batch, config.cameras or (), config.image_size).flatten(1))
        return torch.cat([part.to(self.adapter.device, torch.float32) for part in parts], 1)


def build_observer(config: ObserveConfig, adapter: PolicyAdapter, tasks: Sequence[str]) -> Observer | None:
    """The observer of a run; ``None`` where backbone features are all there is to see."""
    resolved = config.resolved(adapter, tasks)
    return None if resolved.inputs == ["features"] else Observer(resolved, adapter)


@torch.no_grad()
def images(adapter: PolicyAdapter, batch: dict[str, Any], cameras: Sequence[str], size: int) -> Tensor:
    """Small images (B, 3 * cameras, size, size) with values 0, 1, ..., 255, float32.

    ``batch`` is what the policy's preprocessor made; its normalisation is undone. Images are (B, 3, H, W), or
    with a history (B, T, 3, H, W), of which the last one counts; other shapes are squeezed to the square.
    """
    found = []
    for key in cameras:
        if key not in batch:
            given = ", ".join(name for name in cameras if name in batch) or "none of them"
            raise UserError("--observe.cameras", f"the environment gives no {key}; it gives {given}")
        image = batch[key][:, -1] if batch[key].ndim == 5 else batch[key]
        for step in getattr(adapter.preprocessor, "steps", ()):
            if hasattr(step, "_tensor_stats") and key in step.features:
                image = step._apply_transform(image, key, step.features[key].type, inverse=True)
                break
        found.append(_small(image, size))
    return torch.cat(found, 1)


def _small(image: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) in [0, 1] or uint8 -> (B, 3, size, size), whole numbers."""
    if not image.is_floating_point():
        image = image.float() / 255
    if image.shape[-2:] != (size, size):
        image = interpolate(image.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    return (image.float() * 255).round().clamp(0, 255)


def _check_images(
    adapter: PolicyAdapter, example: dict[str, Any], batch: dict[str, Any], cameras: list[str], size: int
) -> None:
    """Refuse a policy whose preprocessor does not hand on its images, or not so that they can be undone."""
    names = adapter.raw_names()
    for key in cameras:
        raw = example[names[key]][:, -1]
        held = batch.get(key)
        if isinstance(held, Tensor) and held.ndim in (4, 5) and held.shape[-3] == 3:
            found = images(adapter, batch, [key], size)
            if (found - _small(raw, size).to(found)).abs().max() <= 1:
                continue
        raise UserError(
            "--observe.inputs",
            f"the preprocessor of this {adapter.policy_type} policy does not hand on {key} as an image; use "
            "features",
        )


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

    Architecture and augmentation of DrQ-v2 (Yarats et al., arXiv 2107.09645): four 3x3 convolutions, then a
    linear layer, LayerNorm and tanh. One encoder serves all networks: the TD loss of the critic trains it,
    everything else sees what it makes without gradient.

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
