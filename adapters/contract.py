"""What an adapter is: a frozen generative policy as a function (observation, noise) -> action chunk."""

from __future__ import annotations

import abc
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.adapters.conditioning import Conditioning


@dataclass(frozen=True)
class NoiseSpec:
    """The noise that an adapter takes: standard normal in every entry, whatever the policy itself draws.

    A policy that draws something else (evo1: uniform) gets it from a standard normal by a fixed map
    (``native_noise``), so that one prior serves every noise space and algorithm.

    Attributes:
        shape: shape of one sample, without the batch dimension.
        distribution: what the policy itself feeds in: ``normal``, ``uniform``, or ``zero`` (act).
        dtype: dtype that ``denoise`` takes.
        live: boolean mask of ``shape``: entries that can change the executed actions; ``None`` = all.
    """

    shape: tuple[int, ...]
    distribution: str = "normal"
    dtype: torch.dtype = torch.float32
    live: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of entries of one sample."""
        return math.prod(self.shape)


class NoiseToChunk(abc.ABC):
    """The function (observation, noise) -> chunk, without how its policy is loaded.

    Attributes:
        policy_type: LeRobot's name of the policy type.
        history: whether the policy takes a time axis, (B, n_obs_steps, ...).
        remembers: whether a chunk depends on the episode before it, through ``follow``.
        rounding: share of the noise's effect by which chunks of the same noise may differ.
        fills_missing_cameras: whether the policy runs with fewer cameras than its config names.
        stacks_cameras: whether the policy's cameras must be of one size.
        resizes_images: whether the policy takes images of any size.
        reads_task: whether the policy reads an instruction.
        max_batch: most noises that the policy denoises in one batch; ``None`` = any number.
        device: of the policy.
        noise_spec: the noise that ``denoise`` takes.
        chunk_shape: (steps executed per chunk, action dimension after un-padding); with ``remembers`` of
            an episode's first chunk, for later ones may have other steps.
        n_obs_steps: length of the observation history that ``preprocess`` expects.
    """

    policy_type: ClassVar[str] = ""
    history: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    rounding: ClassVar[float] = 0.0
    fills_missing_cameras: ClassVar[bool] = False
    stacks_cameras: ClassVar[bool] = False
    resizes_images: bool = False
    reads_task: ClassVar[bool] = False
    max_batch: ClassVar[int | None] = None
    device: torch.device
    noise_spec: NoiseSpec
    chunk_shape: tuple[int, int]
    n_obs_steps: int = 1

    @property
    @abc.abstractmethod
    def config(self) -> Any:
        """The policy's LeRobot config."""

    @abc.abstractmethod
    def renames(self) -> dict[str, str]:
        """Other names that the preprocessor gives to observations."""

    @abc.abstractmethod
    def cameras_used(self, given: Collection[str]) -> set[str]:
        """Of the renamed keys ``given`` the cameras that the policy looks at."""

    @abc.abstractmethod
    def observe(
        self, observation: dict[str, Any], before: tuple[Conditioning, Tensor] | None = None
    ) -> Conditioning:
        """What ``denoise`` needs of raw observations."""

    @abc.abstractmethod
    def encode(self, batch: dict[str, Any]) -> Conditioning:
        """Run what depends on the observation alone. No gradient. ``batch`` is not changed."""

    def follow(self, conditioning: Conditioning, chunk: Tensor, batch: dict[str, Any]) -> Conditioning:
        """The conditioning of the next chunk of the same episodes. No argument is changed.

        A policy that remembers its episode (``remembers``) keeps all its memory in the conditioning and
        overrides this; for any other policy it is ``encode(batch)``.

        Args:
            conditioning: what ``chunk`` was denoised with, at the same chunk of all its episodes.
            chunk: (B, steps, action_dim) from ``denoise``, executed to its end.
            batch: as for ``encode``, after the chunk's last action.
        """
        return self.encode(batch)

    @abc.abstractmethod
    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        """Turn noise into an action chunk, deterministically. No gradient.

        Args:
            conditioning: from ``encode``, for B noises. It is not changed.
            noise: (B, *noise_spec.shape) of ``noise_spec.dtype``.

        Returns:
            (B, steps, action_dim) in the policy's normalised space.
        """

    def native_noise(self, noise: Tensor) -> Tensor:
        """What the policy itself would have drawn, for standard normal ``noise`` (B, *noise_spec.shape)."""
        return noise

    def executed(self, chunk: Tensor) -> Tensor:
        """The part of the policy's chunk (B, T, D) that is executed: (B, *chunk_shape)."""
        return chunk[:, : self.chunk_shape[0], : self.chunk_shape[1]]

    @abc.abstractmethod
    def postprocess(self, chunk: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        """Un-normalise a chunk (B, steps, action_dim) to what the environment takes, on the CPU."""

    def features(self, conditioning: Conditioning) -> Tensor | None:
        """A backbone representation (B, d) that the noise actor may look at: the entry ``features``."""
        return conditioning.rows("features") if "features" in conditioning.tensors else None

    def check_noise(self, conditioning: Conditioning, noise: Tensor) -> None:
        """Refuse noise of the wrong shape or dtype in one clear line.

        Raises:
            ValueError: shape, dtype or device differ from what ``noise_spec``, the conditioning's batch size
                and the policy ask for.
        """
        expected = (conditioning.batch_size, *self.noise_spec.shape)
        if tuple(noise.shape) != expected:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, {self.policy_type} takes {expected}")
        if noise.dtype != self.noise_spec.dtype:
            raise ValueError(f"noise is {noise.dtype}, {self.policy_type} takes {self.noise_spec.dtype}")
        if noise.device.type != self.device.type:
            raise ValueError(f"noise is on {noise.device}, {self.policy_type} on {self.device}")

    @abc.abstractmethod
    def example_observation(self, batch_size: int, generator: torch.Generator) -> dict[str, Any]:
        """A random observation within the policy's own statistics, with a task."""
