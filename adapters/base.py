"""The base class of adapters: how a policy is loaded, what it is shown, what identifies it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.adapters.checkpoint.identity import identity
from trimtab.adapters.conditioning import Conditioning, repeat_rows
from trimtab.adapters.config import PolicyConfig
from trimtab.adapters.contract import NoiseSpec, NoiseToChunk
from trimtab.adapters.inputs import cameras_of, check_inputs, input_notes, required_inputs
from trimtab.adapters.verification import verify

__all__ = ["NoiseSpec", "PolicyAdapter"]

RELATIVE_STATE = "relative_state"  # raw state of each observation, for policies with relative actions


class PolicyAdapter(NoiseToChunk):
    """Wraps one frozen LeRobot policy and exposes its sampling noise as an input.

    A subclass sets ``noise_spec`` and ``chunk_shape`` and writes ``encode`` and ``denoise``; the rest has
    defaults that suit a policy which looks at one observation and takes its batch as (B, ...).

    Args:
        policy: a loaded LeRobot policy in eval mode, without gradients.
        preprocessor: the policy's own saved input pipeline.
        postprocessor: the policy's own saved output pipeline.

    Attributes:
        steps_field: field of the config that ``--policy.num_inference_steps`` sets; ``None`` where
            ``prepare_config`` takes the option.
        dtype_field: field that ``--policy.dtype`` sets, where the config has it.
        dtypes: the precisions that the policy runs in; empty = any.
        backbone_fields: fields that ``--policy.backbone`` sets; empty where there is no such option.
        takes_tokenizer: whether ``--policy.tokenizer`` has an effect.
        tokenizer_step: (name of a preprocessor's step, its entry) that names the tokenizer.
        notes: lines to show the user about what was changed at load.
        weights_files: the files that the weights were loaded from; empty where a loader did not say.
        trainable: names of the parameters that the policy's own class leaves open to training.
        observer: (conditioning, batch, tasks) -> (B, d), what a noise actor is to see in the place of
            ``features``; ``None`` = the features.
    """

    steps_field: ClassVar[str | None] = None
    dtype_field: ClassVar[str] = "dtype"
    dtypes: ClassVar[tuple[str, ...]] = ()
    backbone_fields: ClassVar[tuple[str, ...]] = ()
    takes_tokenizer: ClassVar[bool] = True
    tokenizer_step: ClassVar[tuple[str, str]] = ("tokenizer_processor", "tokenizer_name")
    observer: Callable[[Conditioning, dict[str, Any], Sequence[str] | None], Tensor] | None = None

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
        """Change the policy's config, in which the options are set, before the policy is built.

        Returns:
            A line for each change that the user should know of.
        """
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
        """Change the precision of a loaded policy whose config has no ``dtype``.

        Everything that the weights file holds changes. Other buffers (rotary frequencies, position tables)
        keep theirs, for they are computed, not learnt.
        """
        for tensor in policy.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)

    @classmethod
    def processor_overrides(cls, config: Any, options: PolicyConfig) -> dict[str, dict[str, Any]]:
        """Overrides for the saved preprocessor, by step name, beside the device's."""
        name = options.tokenizer or (options.backbone if cls.backbone_fields else None)
        step, entry = cls.tokenizer_step
        return {step: {entry: name}} if name and cls.takes_tokenizer else {}

    @property
    def config(self) -> Any:
        return self.policy.config

    @property
    def parameter_count(self) -> int | None:
        """Number of the policy's parameters; ``None`` where they are out of sight."""
        return sum(parameter.numel() for parameter in self.policy.parameters())

    def identity(self, base: Path | str) -> dict[str, Any]:
        """What tells this base from any other, as JSON values: see ``checkpoint.identity.identity``.

        Args:
            base: folder of the base, or address of its server.
        """
        return identity(self.policy, Path(base), self.weights_files, self.frozen_parts(self.policy))

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

    def close(self) -> None:
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

    def _check_observation(self, observation: dict[str, Any]) -> None:
        check_inputs(self, observation)

    def required_inputs(self, given: Collection[str]) -> dict[str, Any]:
        """The policy's input features that an observation with the renamed keys ``given`` must hold."""
        return required_inputs(self, given)

    def input_notes(self, observation: dict[str, Any]) -> list[str]:
        """What the user should know of an observation that ``preprocess`` takes, a line each."""
        return input_notes(self, observation)

    def cameras_used(self, given: Collection[str]) -> set[str]:
        return set(cameras_of(self)).intersection(given)

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

    def _relative_step(self) -> Any:
        for step in getattr(self.postprocessor, "steps", ()):
            if getattr(step, "relative_step", None) is not None and step.enabled:
                return step.relative_step
        return None

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

    # Verification.

    def example_observation(self, batch_size: int, generator: torch.Generator) -> dict[str, Any]:
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

    def verify(self) -> None:
        """Check on the real weights that noise steers this policy, and steers it alone.

        On two observations, each alone and both together: chunks and actions have the declared shapes and are
        finite, features too; the same observation and noise give the same chunk, encoded twice; another noise
        gives each row another chunk, and in entries that are declared inert the same; a row does not depend
        on the rows beside it.

        Raises:
            UserError: one of these does not hold, with what it means.
        """
        verify(self)
