"""What noise actor and critics look at: ``--observe.*``, and how one observation becomes a row of numbers.

A packed observation is one row (d,) float32: first a vector (backbone features, state, task), then, where
cameras take part, their pixels as whole numbers from 0 to 255, channels first. So it passes through whatever
handles features; the replay keeps the pixels as uint8 (``rl/data/frames.py``), and the networks take the row
apart (``policies/encoders.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

from trimtab.adapters import Conditioning, PolicyAdapter, UserError
from trimtab.adapters.errors import at_least

INPUTS = ("features", "state", "images", "task")
STATES = (OBS_STATE, OBS_ENV_STATE)
SMALLEST_IMAGE = 15  # the encoder's four convolutions take 14 off


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
        """This config with nothing left open.

        Args:
            adapter: the loaded policy.
            tasks: instructions of the run's environments.

        Raises:
            UserError: the policy does not have what is asked for.
        """
        inputs = self.inputs
        if inputs == ["features"] or (inputs is None and offers_features(adapter)):
            return replace(self, inputs=["features"], cameras=None, tasks=None)
        generator = torch.Generator().manual_seed(0)
        example = adapter.example_observation(min(2, adapter.max_batch or 2), generator)
        batch = adapter.preprocess(example)
        states = any(name in batch for name in STATES)
        cameras = [key for key in camera_names(adapter) if self.cameras is None or key in self.cameras]
        unknown = set(self.cameras or ()) - set(cameras)
        if unknown:
            known = ", ".join(camera_names(adapter)) or "none"
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
        if "features" in inputs and not offers_features(adapter):
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
    """Packs observations for a noise actor; set as ``adapter.observer``, it is asked once per observation.

    Args:
        config: a resolved config.
        adapter: the policy.
    """

    def __init__(self, config: ObserveConfig, adapter: PolicyAdapter) -> None:
        self.config, self.adapter = config, adapter

    def __call__(
        self, conditioning: Conditioning, batch: dict[str, Any], tasks: Sequence[str] | None
    ) -> Tensor:
        """Packed observations (B, d) float32.

        Args:
            conditioning: what the policy made of the observations.
            batch: what its preprocessor made of them; of a history, the states take part whole and the
                cameras with their last image.
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
            parts.append(self._one_hot(tasks or [""] * conditioning.observations))
        if "images" in inputs:
            parts.append(images(self.adapter, batch, config.cameras or (), config.image_size).flatten(1))
        return torch.cat([part.to(self.adapter.device, torch.float32) for part in parts], 1)

    def _one_hot(self, tasks: Sequence[str]) -> Tensor:
        known = list(self.config.tasks or ())
        unknown = [task for task in tasks if task not in known]
        if unknown:
            raise UserError(
                "--env.task",
                f"the noise actor was told of {', '.join(map(repr, known))}, not of {unknown[0]!r}",
            )
        return one_hot(torch.tensor([known.index(task) for task in tasks]), len(known))


def build_observer(config: ObserveConfig, adapter: PolicyAdapter, tasks: Sequence[str]) -> Observer | None:
    """The observer of a run; ``None`` where backbone features are all there is to see."""
    resolved = config.resolved(adapter, tasks)
    return None if resolved.inputs == ["features"] else Observer(resolved, adapter)


def offers_features(adapter: PolicyAdapter) -> bool:
    """Whether the adapter makes backbone features: it is asked on an example."""
    return adapter.features(adapter.example_conditioning(1, torch.Generator().manual_seed(0))) is not None


def camera_names(adapter: PolicyAdapter) -> list[str]:
    """The policy's cameras, without those that LeRobot fills."""
    features = adapter.config.input_features
    return [key for key in features if len(features[key].shape) == 3 and "empty_camera" not in key]


@torch.no_grad()
def images(adapter: PolicyAdapter, batch: dict[str, Any], cameras: Sequence[str], size: int) -> Tensor:
    """Small images (B, 3 * cameras, size, size) with values 0, 1, ..., 255, float32.

    Args:
        adapter: the policy; its normalisation of images is undone.
        batch: what its preprocessor made; images (B, 3, H, W), or with a history (B, T, 3, H, W), of which
            the last one counts.
        cameras: their names.
        size: pixels to a side; other shapes are squeezed to the square.
    """
    found = []
    for key in cameras:
        image = batch[key][:, -1] if batch[key].ndim == 5 else batch[key]
        found.append(_small(_as_seen(adapter, key, image), size))
    return torch.cat(found, 1)


def _small(image: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) in [0, 1] or uint8 -> (B, 3, size, size), whole numbers."""
    if not image.is_floating_point():
        image = image.float() / 255
    if image.shape[-2:] != (size, size):
        image = interpolate(image.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    return (image.float() * 255).round().clamp(0, 255)


def _as_seen(adapter: PolicyAdapter, key: str, image: Tensor) -> Tensor:
    """An image as it was before the policy's normalisation."""
    for step in getattr(adapter.preprocessor, "steps", ()):
        if hasattr(step, "_tensor_stats") and key in step.features:
            return step._apply_transform(image, key, step.features[key].type, inverse=True)
    return image


def _check_images(
    adapter: PolicyAdapter, example: dict[str, Any], batch: dict[str, Any], cameras: list[str], size: int
) -> None:
    """Refuse a policy whose preprocessor does not hand on its images, or not so that they can be undone."""
    originals = {new: old for old, new in adapter.renames().items()}
    for key in cameras:
        raw = example[originals.get(key, key)][:, -1]
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
