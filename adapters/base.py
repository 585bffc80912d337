"""The adapter contract: a frozen generative policy as a function (observation, noise) -> action chunk."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.adapters import inputs, verification
from trimtab.adapters.checkpoint.files import (
    hash_files,
    placement,
    settings_hashes,
    weights_files,
    weights_hash,
)
from trimtab.adapters.conditioning import Conditioning, repeat_rows
from trimtab.adapters.config import PolicyConfig


@dataclass(frozen=True)
class NoiseSpec:
    """The noise that an adapter takes: standard normal in every entry, whatever the policy itself draws.

    A policy that draws something else (evo1: uniform) gets it from a standard normal by a fixed map
    (``PolicyAdapter.native_noise``), so that one prior serves every noise space and algorithm.

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


RELATIVE_STATE = "relative_state"  # raw state of each observation, for policies with relative actions


Observing = Callable[[Conditioning, dict[str, Any], Sequence[str] | None], Tensor]


class PolicyAdapter(abc.ABC):
    """Wraps one frozen LeRobot policy and exposes its sampling noise as an input.

    A subclass sets ``noise_spec`` and ``chunk_shape`` and writes ``encode`` and ``denoise``; the rest has
    defaults that suit a policy which looks at one observation and takes its batch as (B, ...).

    Args:
        policy: a loaded LeRobot policy in eval mode, without gradients.
        preprocessor: the policy's own saved input pipeline.
        postprocessor: the policy's own saved output pipeline.

    Attributes:
        policy_type: LeRobot's name of the policy type that the class adapts.
        history: whether the policy takes a time axis, (B, n_obs_steps, ...).
        remembers: whether a chunk depends on the episode before it, through ``follow``.
        rounding: share of the noise's own effect by which chunks of the same noise may differ.
        fills_missing_cameras: whether the policy does with fewer cameras than its config names.
        stacks_cameras: whether the policy's cameras must be of one size.
        reads_task: whether the policy is told what to do in words.
        max_batch: most noises that the policy denoises in one batch; ``None`` = any number.
        noise_spec: the noise that ``denoise`` takes.
        chunk_shape: (steps executed per chunk, action dimension after un-padding); with ``remembers`` of
            an episode's first chunk, for later ones may have other steps.
        n_obs_steps: length of the observation history that ``preprocess`` expects.
        notes: lines to show the user about what was changed at load.
        weights_files: the files that the weights were loaded from; empty where a loader did not say.
        trainable: names of the parameters that the policy's own class leaves open to training.
        observer: (conditioning, batch, tasks) -> (B, d), what a noise actor is to see in the place of
            ``features``; ``None`` = the features.
    """

    policy_type: ClassVar[str] = ""
    history: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    fills_missing_cameras: ClassVar[bool] = False
    stacks_cameras: ClassVar[bool] = False
    reads_task: ClassVar[bool] = False
    max_batch: ClassVar[int | None] = None
    rounding: ClassVar[float] = 0.0
    noise_spec: NoiseSpec
    chunk_shape: tuple[int, int]
    n_obs_steps: int = 1
    observer: Observing | None = None

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        self.policy = policy
        self.preprocessor = preprocessor
        self.postprocessor = postprocessor
        self.device = next(policy.parameters()).device
        self.notes: list[str] = []
        self.weights_files: list[Path] = []
        self.trainable: set[str] = set()

    # Loading: what differs between policies. LeRobot's own `from_pretrained` is not used, for some of
    # them return random weights where a file is missing.

    @classmethod
    def prepare_config(cls, config: Any, options: PolicyConfig) -> list[str]:
        """Change the policy's config before it is built; return a line for each change."""
        return []

    @classmethod
    def build(cls, config: Any) -> Any:
        """The policy that ``config`` describes, with any weights."""
        from lerobot.policies.factory import get_policy_class

        return get_policy_class(config.type)(config)

    @classmethod
    def frozen_parts(cls, policy: Any) -> dict[str, tuple[torch.nn.Module, Path]]:
        """Models that the policy runs but its checkpoint does not hold, by name, with their folders.

        Loading compares them with their files, and ``identity`` covers them. All have been built.
        """
        return {}

    @classmethod
    def prepare_weights(cls, saved: dict[str, Tensor], policy: Any) -> dict[str, Tensor]:
        """Rename tensors of older files as LeRobot's own loader does."""
        return saved

    @classmethod
    def cast(cls, policy: Any, dtype: torch.dtype) -> None:
        """Change the precision of a loaded policy whose config has no ``dtype`` of its own.

        Everything that the weights file holds changes. Other buffers (rotary frequencies, position tables)
        keep theirs, for they are computed, not learnt.
        """
        for tensor in policy.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)

    @classmethod
    def processor_overrides(
        cls, config: Any, options: PolicyConfig
    ) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """Overrides for the saved (preprocessor, postprocessor), by step name, beside the device's."""
        if options.tokenizer:
            return {"tokenizer_processor": {"tokenizer_name": options.tokenizer}}, {}
        return {}, {}

    @property
    def config(self) -> Any:
        """The policy's LeRobot config."""
        return self.policy.config

    @property
    def parameter_count(self) -> int | None:
        """Number of the policy's parameters; ``None`` where they are out of sight."""
        return sum(parameter.numel() for parameter in self.policy.parameters())

    def identity(self, base: Path | str) -> dict[str, Any]:
        """What tells this base from any other, as JSON values.

        Args:
            base: folder of the base, or address of its server.

        Returns:
            ``sha256`` of the weights' files; ``files``, the hashes of all else that makes the function
            (``files.settings_hashes``); ``weights_sha256`` of the weights in memory, with their
            ``weights_dtype`` and ``weights_device``.
        """
        base, parts = Path(base), self.frozen_parts(self.policy)
        return {
            "sha256": hash_files(self.weights_files or weights_files(base)),
            "files": settings_hashes(base, {name: folder for name, (_, folder) in parts.items()}),
            "weights_sha256": weights_hash(self.policy, *(module for module, _ in parts.values())),
            **placement(self.policy),
        }

    def check_identity(self, identity: dict[str, Any], base: Path | str) -> None:
        """Raise where the base is no longer the one that ``identity`` described.

        Raises:
            RuntimeError: a file or the weights in memory have changed.
        """
        now = self.identity(base)
        if now != identity:
            odd = ", ".join(sorted(k for k in now.keys() | identity.keys() if now.get(k) != identity.get(k)))
            raise RuntimeError(
                f"the base policy changed while it was steered ({odd}); this is a bug of trimtab"
            )

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of what the adapter holds outside this process."""

    # Observations.

    def preprocess(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Run the policy's saved preprocessor.

        Args:
            observation: LeRobot keys; tensors are (B, n_obs_steps, ...), ``task`` is a list of B strings.

        Returns:
            The policy's batch on its device; with ``history``, tensors (B, n_obs_steps, ...).

        Raises:
            UserError: the policy needs an input that the environment does not give.
        """
        self._check_observation(observation)
        flat, lead = {}, (0, 1)
        for key, value in observation.items():
            if isinstance(value, str):
                raise ValueError(f"'{key}' is one string; give a list with one for each observation")
        for key, value in observation.items():
            if isinstance(value, Tensor):
                lead = tuple(value.shape[:2])
                flat[key] = value.flatten(0, 1)
        for key, value in observation.items():
            if not isinstance(value, Tensor):  # one string per environment: repeat over the history
                flat[key] = [item for item in value for _ in range(lead[1])]
        batch = self.preprocessor(flat)
        if not self.history:
            return batch
        return {
            key: value.unflatten(0, lead)
            for key, value in batch.items()
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == lead[0] * lead[1]
        }

    def required_inputs(self, given: Collection[str]) -> dict[str, Any]:
        """The policy's input features that an observation with the renamed keys ``given`` must hold."""
        return inputs.required_inputs(self, given)

    def _check_observation(self, observation: dict[str, Any]) -> None:
        inputs.check_inputs(self, observation)

    def input_notes(self, observation: dict[str, Any]) -> list[str]:
        """What the user should know of an observation that ``preprocess`` takes, a line each."""
        return inputs.input_notes(self, observation)

    def cameras_used(self, given: Collection[str]) -> set[str]:
        """Of the renamed keys ``given`` the cameras that the policy looks at."""
        return set(inputs.cameras_of(self)).intersection(given)

    @property
    def resizes_images(self) -> bool:
        """Whether the policy takes images of any size."""
        return False

    def renames(self) -> dict[str, str]:
        for step in getattr(self.preprocessor, "steps", ()):
            if hasattr(step, "rename_map"):
                return step.rename_map
        return {}

    def observe(
        self, observation: dict[str, Any], before: tuple[Conditioning, Tensor] | None = None
    ) -> Conditioning:
        """``encode(preprocess(observation))``, and what ``postprocess`` needs of the observation.

        With ``before``, the (conditioning, chunk) that led here, ``follow`` takes the place of ``encode``.

        A policy with relative actions adds them to the state it saw; LeRobot remembers the state of the
        last observation only, so it is kept with each conditioning.
        """
        batch = self.preprocess(observation)
        conditioning = self.encode(batch) if before is None else self.follow(*before, batch)
        step = self._relative_step()
        if step is not None:
            state = step.get_cached_state().unflatten(0, (conditioning.observations, -1))[:, -1]
            conditioning.tensors[RELATIVE_STATE] = state
        return self.watch(conditioning, batch, observation.get("task"))

    def watch(
        self, conditioning: Conditioning, batch: dict[str, Any], tasks: Sequence[str] | None
    ) -> Conditioning:
        """The conditioning with what ``observer`` makes of the observation, where there is one."""
        if self.observer is None:
            return conditioning
        return replace(conditioning, observed=self.observer(conditioning, batch, tasks))

    def seen(self, conditioning: Conditioning) -> Tensor | None:
        """What the noise actor looks at, (B, d): the observer's, or the features, or ``None``."""
        if conditioning.observed is not None:
            return repeat_rows(conditioning.observed, conditioning.repeats)
        return self.features(conditioning)

    @property
    def relative_actions(self) -> bool:
        """Whether ``postprocess`` adds a chunk's actions to the state that it was made for."""
        return self._relative_step() is not None

    def runner_notes(self) -> list[str]:
        """Where LeRobot's own commands compute otherwise than the adapter, a line each."""
        notes = []
        if getattr(self.config, "use_amp", False):
            notes.append(
                "use_amp is on in config.json: lerobot-eval runs this policy under autocast, lerobot-rollout "
                "on CUDA alone, the policy server nowhere; trimtab and what it exports compute in the "
                "policy's own precision"
            )
        if self.relative_actions and self.chunk_shape[0] > 1:
            notes.append(
                "relative actions: trimtab adds a chunk to the state that it was made for, lerobot-eval and "
                "lerobot-rollout add each action to the state at its own step"
            )
        return notes

    def _relative_step(self) -> Any:
        for step in getattr(self.postprocessor, "steps", ()):
            if getattr(step, "relative_step", None) is not None and step.enabled:
                return step.relative_step
        return None

    # The function (observation, noise) -> chunk.

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

    def postprocess(self, chunk: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        """Un-normalise a chunk (B, steps, action_dim) to what the environment takes, on the CPU.

        Args:
            chunk: from ``denoise``.
            conditioning: what it was denoised with. A policy with relative actions needs it (from
                ``observe``), unless the chunk belongs to the last observation that was preprocessed.
        """
        step = self._relative_step()
        if step is None or conditioning is None or RELATIVE_STATE not in conditioning.tensors:
            return self.postprocessor(chunk)
        latest = step._last_state
        step._last_state = conditioning.rows(RELATIVE_STATE)
        try:
            return self.postprocessor(chunk)
        finally:
            step._last_state = latest

    def features(self, conditioning: Conditioning) -> Tensor | None:
        """A backbone representation (B, d) that the noise actor may look at, or ``None``."""
        return None

    # Verification.

    def example_observation(self, batch_size: int, generator: torch.Generator) -> dict[str, Any]:
        """A random observation within the policy's own statistics, with a task."""
        stats = {}
        for step in getattr(self.preprocessor, "steps", ()):
            stats = getattr(step, "_tensor_stats", None) or stats
        originals = {new: old for old, new in self.renames().items()}
        observation: dict[str, Any] = {}
        for key, feature in self.config.input_features.items():
            if "empty_camera" in key:
                continue  # LeRobot fills these itself
            value = torch.rand((batch_size, self.n_obs_steps, *feature.shape), generator=generator)
            known = stats.get(key, {})
            if len(feature.shape) < 3 and "min" in known and "max" in known:
                width = feature.shape[-1]  # evo1 pads its statistics
                low, high = (known[name].cpu().float()[..., :width] for name in ("min", "max"))
                value = low + (high - low) * value
            observation[originals.get(key, key)] = value
        observation["task"] = ["pick up the red cube"] * batch_size
        return observation

    def example_conditioning(self, batch_size: int, generator: torch.Generator) -> Conditioning:
        """A conditioning from random inputs, for ``verify``; the observer does not see them."""
        observer, self.observer = self.observer, None  # it may know other tasks than the example's
        try:
            return self.observe(self.example_observation(batch_size, generator))
        finally:
            self.observer = observer

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

    def verify(self) -> None:
        """Check on the real weights that noise steers this policy, and steers it alone.

        On two observations, each alone and both together: chunks and actions have the declared shapes and are
        finite, features too; the same observation and noise give the same chunk, encoded twice; another noise
        gives each row another chunk, and in entries that are declared inert the same; a row does not depend
        on the rows beside it.

        Raises:
            UserError: one of these does not hold, with what it means.
        """
        verification.verify(self)


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
