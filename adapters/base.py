"""The adapter contract: a frozen generative policy as a function (observation, noise) -> action chunk."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.adapters.errors import UserError


@dataclass(frozen=True)
class NoiseSpec:
    """What the policy draws before it denoises.

    Attributes:
        shape: shape of one sample, without the batch dimension.
        distribution: ``normal`` (standard normal).
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
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class Conditioning:
    """All that depends on the observation alone: tensors with a common batch dimension.

    Attributes:
        tensors: by name, each (B, ...).
    """

    tensors: dict[str, Tensor]

    @property
    def batch_size(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, index: Any) -> Conditioning:
        """Select rows; an integer keeps the batch dimension."""
        if isinstance(index, int):
            index = slice(index, index + 1 if index != -1 else None)
        return replace(self, tensors={key: value[index] for key, value in self.tensors.items()})

    def repeat_interleave(self, k: int) -> Conditioning:
        """Repeat each row ``k`` times in place, for ``k`` noises per observation."""
        return replace(self, tensors={key: v.repeat_interleave(k, 0) for key, v in self.tensors.items()})


class PolicyAdapter(abc.ABC):
    """Wraps one frozen LeRobot policy and exposes its sampling noise as an input.

    Args:
        policy: a loaded LeRobot policy in eval mode, without gradients.
        preprocessor: the policy's own saved input pipeline.
        postprocessor: the policy's own saved output pipeline.

    Attributes:
        policy_type: LeRobot's name of the policy type that the class adapts.
        noise_spec: the noise that ``denoise`` takes.
        chunk_shape: (steps executed per chunk, action dimension after un-padding).
        n_obs_steps: length of the observation history that ``preprocess`` expects.
        notes: lines to show the user about what was changed at load.
    """

    policy_type: ClassVar[str] = ""
    noise_spec: NoiseSpec
    chunk_shape: tuple[int, int]
    n_obs_steps: int

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        self.policy = policy
        self.preprocessor = preprocessor
        self.postprocessor = postprocessor
        self.device = next(policy.parameters()).device
        self.notes: list[str] = []

    @classmethod
    def prepare_config(cls, config: Any, num_inference_steps: int | None) -> list[str]:
        """Change the policy's config before it is built; return a line for each change."""
        return []

    def preprocess(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Run the policy's saved preprocessor.

        Args:
            observation: LeRobot keys; tensors are (B, n_obs_steps, ...), ``task`` is a list of B strings.

        Returns:
            The policy's batch, tensors (B, n_obs_steps, ...) on the policy's device.

        Raises:
            UserError: the policy needs an input that the environment does not give.
        """
        missing = [key for key in self.policy.config.input_features if key not in observation]
        if missing:
            given = ", ".join(sorted(key for key in observation if key.startswith("observation"))) or "none"
            raise UserError(
                "--env.type",
                f"the policy needs {', '.join(missing)}, the environment gives {given}; choose the "
                "environment (or its --env.obs_type) that the policy was trained on",
            )
        for key, feature in self.policy.config.input_features.items():
            if tuple(observation[key].shape[2:]) != tuple(feature.shape):
                raise UserError(
                    "--env.type",
                    f"the policy needs {key} of shape {tuple(feature.shape)}, the environment gives "
                    f"{tuple(observation[key].shape[2:])}; choose the environment that it was trained on",
                )
        flat, lead = {}, None
        for key, value in observation.items():
            if isinstance(value, Tensor):
                lead = value.shape[:2]
                flat[key] = value.flatten(0, 1)
        for key, value in observation.items():
            if not isinstance(value, Tensor):  # one string per environment: repeat over the history
                flat[key] = [item for item in value for _ in range(lead[1])]
        batch = self.preprocessor(flat)
        return {
            key: value.unflatten(0, tuple(lead))
            for key, value in batch.items()
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == lead[0] * lead[1]
        }

    @abc.abstractmethod
    def encode(self, batch: dict[str, Any]) -> Conditioning:
        """Run what depends on the observation alone. No gradient."""

    @abc.abstractmethod
    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        """Turn noise into an action chunk, deterministically. No gradient.

        Args:
            conditioning: from ``encode``, B rows.
            noise: (B, *noise_spec.shape) of ``noise_spec.dtype``.

        Returns:
            (B, steps, action_dim) in the policy's normalised space.
        """

    def postprocess(self, chunk: Tensor) -> Tensor:
        """Un-normalise a chunk (B, steps, action_dim) to what the environment takes, on the CPU."""
        return self.postprocessor(chunk)

    def features(self, conditioning: Conditioning) -> Tensor | None:
        """A backbone representation (B, d) that the noise actor may look at, or ``None``."""
        return None

    @abc.abstractmethod
    def example_conditioning(self, batch_size: int, generator: torch.Generator) -> Conditioning:
        """A conditioning from random inputs in the policy's normalised space, for ``verify``."""

    def check_noise(self, conditioning: Conditioning, noise: Tensor) -> None:
        """Refuse noise of the wrong shape or dtype in one clear line.

        Raises:
            ValueError: shape or dtype differ from ``noise_spec`` and the conditioning's batch size.
        """
        expected = (conditioning.batch_size, *self.noise_spec.shape)
        if tuple(noise.shape) != expected:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, {self.policy_type} takes {expected}")
        if noise.dtype != self.noise_spec.dtype:
            raise ValueError(f"noise is {noise.dtype}, {self.policy_type} takes {self.noise_spec.dtype}")

    def verify(self) -> None:
        """Check on the real weights that noise steers this policy, and steers it alone.

        Raises:
            UserError: not finite, not deterministic given the noise, or blind to the noise.
        """
        generator = torch.Generator().manual_seed(0)
        conditioning = self.example_conditioning(2, generator)
        shape = (2, *self.noise_spec.shape)
        first = torch.randn(shape, generator=generator).to(self.device, self.noise_spec.dtype)
        second = torch.randn(shape, generator=generator).to(self.device, self.noise_spec.dtype)
        once = self.denoise(conditioning, first)
        if not torch.isfinite(once).all():
            raise UserError(
                "--policy.path",
                "the policy turns ordinary noise into NaN or Inf actions; its weights are broken",
            )
        if not torch.equal(once, self.denoise(conditioning, first)):
            raise UserError(
                "--policy.path",
                f"the same noise gave two different chunks: this {self.policy_type} policy draws randomness "
                "while it samples and cannot be steered; save it with a deterministic sampler",
            )
        if torch.equal(once, self.denoise(conditioning, second)):
            raise UserError(
                "--policy.path",
                f"two different noises gave the same chunk: this {self.policy_type} policy ignores its noise "
                "and cannot be steered",
            )


_REGISTRY: dict[str, Callable[[], type[PolicyAdapter]]] = {}


def register_adapter(policy_type: str, loader: Callable[[], type[PolicyAdapter]]) -> None:
    """Register an adapter class for a LeRobot policy type.

    Args:
        policy_type: the ``type`` in the policy's ``config.json``.
        loader: returns the class; called on first use, so that listing adapters imports nothing.
    """
    _REGISTRY[policy_type] = loader


def adapter_class(policy_type: str) -> type[PolicyAdapter] | None:
    """The adapter registered for a policy type, or ``None``."""
    loader = _REGISTRY.get(policy_type)
    return loader() if loader else None


def adapter_types() -> list[str]:
    """The policy types that have an adapter."""
    return sorted(_REGISTRY)
