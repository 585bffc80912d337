"""What an adapter is: a frozen generative policy as a function (observation, noise) -> action chunk."""

import abc
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.adapters.conditioning import Conditioning, repeat_rows

SPREAD = 8  # draws that tell how far noise moves a chunk
RELATIVE_STATE = "relative_state"  # raw state of each observation, for policies with relative actions


@dataclass(frozen=True)
class NoiseSpec:
    """The noise that an adapter takes: standard normal in every entry, whatever the policy itself draws.

    A policy that draws something else (evo1: uniform) gets it from a standard normal by a fixed map
    (``native_noise``), so that one prior serves every noise space and algorithm.
    """

    shape: tuple[int, ...]  # of one sample, without the batch dimension
    distribution: str = "normal"  # what the policy itself feeds in: normal, uniform, or zero (act)
    dtype: torch.dtype = torch.float32  # that denoise takes
    live: Tensor | None = None  # mask of shape: entries that can change the executed actions; None = all

    def __post_init__(self) -> None:
        if self.live is not None and self.live.all():
            object.__setattr__(self, "live", None)

    @property
    def size(self) -> int:
        """Number of entries of one sample."""
        return math.prod(self.shape)


def steps_with(name: str, pipeline: Any) -> list[Any]:
    """The steps of a processor that have an attribute ``name``; of a plain function, none."""
    return [step for step in getattr(pipeline, "steps", ()) if hasattr(step, name)]


def _checked(denoise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(denoise)
    def checked(self: NoiseToChunk, conditioning: Conditioning, noise: Tensor) -> Tensor:
        self.check_noise(conditioning, noise)
        return denoise(self, conditioning, noise)

    return checked


class NoiseToChunk(abc.ABC):
    """The function of a loaded policy: ``postprocess(denoise(observe(observation), noise))``.

    It takes a LeRobot policy in eval mode, without gradients, and its own saved pipelines. A subclass's
    ``encode``, ``follow`` and ``denoise`` run without gradients; ``denoise`` first does ``check_noise``.
    """

    policy_type: ClassVar[str] = ""  # LeRobot's name
    history: ClassVar[bool] = False  # takes a time axis, (B, n_obs_steps, ...)
    inverts: bool = False  # whether invert finds the noise of a chunk, through reverse
    remembers: ClassVar[bool] = False  # a chunk depends on the episode before it, through follow
    rounding: float = 0.0  # share of the noise's effect by which the same noise's chunks may differ
    fills_missing_cameras: ClassVar[bool] = False  # runs with fewer cameras than its config names
    stacks_cameras: ClassVar[bool] = False  # its cameras must be of one size
    resizes_images: bool = False  # takes images of any size
    reads_task: ClassVar[bool] = False  # reads an instruction
    max_batch: ClassVar[int | None] = None  # most noises that it denoises in one batch; None = any number
    recorded: ClassVar[tuple[str, ...]] = ("encode", "denoise")  # may run by --policy.engine
    brightest: ClassVar[float] = 1.001  # of an image in [0, 1], with room for an interpolation's rounding
    noise_spec: NoiseSpec
    # (steps executed per chunk, action dimension after un-padding); with remembers, of an episode's first.
    chunk_shape: tuple[int, int]
    n_obs_steps: int = 1  # length of the observation history that preprocess expects
    # (conditioning, batch, tasks) -> (B, d), what a noise actor is to see; None = the features.
    observer: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in {"encode", "follow", "denoise"} & vars(cls).keys():
            method = vars(cls)[name]
            setattr(cls, name, torch.no_grad()(_checked(method) if name == "denoise" else method))

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        self.policy = policy
        self.preprocessor = preprocessor
        self.postprocessor = postprocessor
        self.device = next(policy.parameters()).device

    @property
    def config(self) -> Any:
        return self.policy.config

    def preprocess(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The policy's batch on its device, from its saved preprocessor; with ``history``, with a time axis.

        ``observation`` has LeRobot's keys: tensors (B, n_obs_steps, ...), ``task`` a list of B strings. A
        ``UserError`` says what the policy needs and the environment does not give.
        """
        self.check_observation(observation)
        lead = next((tuple(v.shape[:2]) for v in observation.values() if isinstance(v, Tensor)), (0, 1))
        flat: dict[str, Any] = {}
        for key, value in observation.items():
            if isinstance(value, str):
                raise ValueError(f"'{key}' is one string; give a list with one for each observation")
            if isinstance(value, Tensor):
                flat[key] = value.flatten(0, 1)
            else:  # one string per environment: repeat over the history
                flat[key] = [item for item in value for _ in range(lead[1])]
        batch = self.preprocessor(flat)
        if not self.history:
            return batch
        return {
            key: value.unflatten(0, lead)
            for key, value in batch.items()
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == lead[0] * lead[1]
        }

    @abc.abstractmethod
    def check_observation(self, observation: dict[str, Any]) -> None:
        """Refuse an observation that is not what the policy was trained on."""

    def renames(self) -> dict[str, str]:
        """Other names that the preprocessor gives to observations."""
        return next((step.rename_map for step in steps_with("rename_map", self.preprocessor)), {})

    def raw_names(self) -> dict[str, str]:
        """By the policy's name for an input: its name in an observation, before it is renamed."""
        originals = {new: old for old, new in self.renames().items()}
        return {key: originals.get(key, key) for key in self.config.input_features}

    def cameras(self) -> list[str]:
        """The cameras that the policy was trained on, by its own names; not those that LeRobot fills."""
        features = self.config.input_features.items()
        return [key for key, feature in features if len(feature.shape) == 3 and "empty_camera" not in key]

    def cameras_used(self, given: Collection[str]) -> set[str]:
        """Of the renamed keys ``given`` the cameras that the policy looks at."""
        return set(self.cameras()).intersection(given)

    def observe(
        self, observation: dict[str, Any], before: tuple[Conditioning, Tensor] | None = None
    ) -> Conditioning:
        """``encode(preprocess(observation))``, with the state that relative actions will be added to.

        With ``before``, the (conditioning, chunk) that led here, ``follow`` takes the place of ``encode``.
        LeRobot itself remembers the state of the last observation alone.
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

    def example_observation(self, batch_size: int, generator: torch.Generator) -> dict[str, Any]:
        """A random observation within the policy's own statistics, with a task."""
        steps = steps_with("_tensor_stats", self.preprocessor)
        stats: dict[str, Any] = next((step._tensor_stats for step in steps if step._tensor_stats), {})
        names = self.raw_names()
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
            observation[names[key]] = value
        observation["task"] = ["pick up the red cube"] * batch_size
        return observation

    def example_conditioning(self, batch_size: int, generator: torch.Generator) -> Conditioning:
        """A conditioning from random inputs; the observer does not see them."""
        observer, self.observer = self.observer, None  # it may know other tasks than the example's
        try:
            return self.observe(self.example_observation(batch_size, generator))
        finally:
            self.observer = observer

    @abc.abstractmethod
    def encode(self, batch: dict[str, Any]) -> Conditioning:
        """Run what depends on the observation alone. ``batch`` is not changed."""

    def follow(self, conditioning: Conditioning, chunk: Tensor, batch: dict[str, Any]) -> Conditioning:
        """The conditioning of the next chunk of the same episodes. No argument is changed.

        A policy that remembers its episode keeps all its memory in the conditioning and overrides this.

        Args:
            conditioning: what ``chunk`` was denoised with, at the same chunk of all its episodes.
            chunk: (B, steps, action_dim) from ``denoise``, executed to its end.
            batch: as for ``encode``, after the chunk's last action.
        """
        return self.encode(batch)

    @abc.abstractmethod
    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        """The chunk (B, steps, action_dim) in the policy's normalised space, deterministically.

        Args:
            conditioning: from ``encode``, for B noises. It is not changed.
            noise: (B, *noise_spec.shape) of ``noise_spec.dtype``.
        """

    @torch.no_grad()
    def invert(
        self, conditioning: Conditioning, chunk: Tensor, iterations: int = 5
    ) -> tuple[Tensor, Tensor] | None:
        """The noise that ``denoise`` makes ``chunk`` of, and how far it is off; ``None`` unless ``inverts``.

        Args:
            conditioning: of B observations.
            chunk: (B, steps, action_dim), normalised. What ``denoise`` makes beside that may be anything.
            iterations: fixed-point iterations for each denoising step.

        Returns:
            noise (B, *noise_spec.shape), finite, and its ``misses`` (B,). Both are large where no noise makes
            such a chunk.
        """
        if not self.inverts:
            return None
        chunk = chunk.to(self.device)
        noise = self.reverse(conditioning, chunk, iterations).nan_to_num(0.0, 0.0, 0.0)
        noise = noise.to(self.noise_spec.dtype)
        return noise, self.misses(conditioning, noise, chunk)

    def reverse(self, conditioning: Conditioning, chunk: Tensor, iterations: int) -> Tensor:
        """The denoising loop backwards, for a subclass that ``inverts``.

        What is not executed of a chunk is as zero noise makes it.
        """
        raise NotImplementedError

    def misses(self, conditioning: Conditioning, noise: Tensor, chunk: Tensor) -> Tensor:
        """How far ``denoise`` of ``noise`` is from ``chunk``, (B,): root mean square, in units of sigma.

        Sigma is the deviation that noise causes at the same observation, in ``SPREAD`` draws that are always
        the same.
        """
        draws = torch.randn((SPREAD, *self.noise_spec.shape), generator=torch.Generator().manual_seed(0))
        several = draws.to(noise).repeat(len(noise), *[1] * len(self.noise_spec.shape))
        chunks = self.denoise(conditioning.repeat_interleave(SPREAD), several).unflatten(0, (-1, SPREAD))
        error = (self.denoise(conditioning, noise) - chunk.to(self.device)).square().flatten(1).mean(1)
        return (error / chunks.var(1).flatten(1).mean(1).clamp_min(1e-12)).sqrt()

    def check_noise(self, conditioning: Conditioning, noise: Tensor) -> None:
        """Refuse noise of another shape, dtype or device than the policy takes (``ValueError``)."""
        expected = (conditioning.batch_size, *self.noise_spec.shape)
        if tuple(noise.shape) != expected:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, {self.policy_type} takes {expected}")
        if noise.dtype != self.noise_spec.dtype:
            raise ValueError(f"noise is {noise.dtype}, {self.policy_type} takes {self.noise_spec.dtype}")
        if noise.device.type != self.device.type:
            raise ValueError(f"noise is on {noise.device}, {self.policy_type} on {self.device}")

    def native_noise(self, noise: Tensor) -> Tensor:
        """What the policy itself would have drawn, for standard normal ``noise`` (B, *noise_spec.shape)."""
        return noise

    def executed(self, chunk: Tensor) -> Tensor:
        """The part of the policy's chunk (B, T, D) that is executed: (B, *chunk_shape)."""
        return chunk[:, : self.chunk_shape[0], : self.chunk_shape[1]]

    @property
    def relative_actions(self) -> bool:
        """Whether ``postprocess`` adds a chunk's actions to the state that it was made for."""
        return self._relative_step() is not None

    def _relative_step(self) -> Any:
        steps = steps_with("relative_step", self.postprocessor)
        return next((step.relative_step for step in steps if step.relative_step and step.enabled), None)

    def postprocess(self, chunk: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        """Un-normalise a chunk (B, steps, action_dim) to what the environment takes, on the CPU.

        A policy with relative actions needs the ``conditioning`` that the chunk was denoised with (from
        ``observe``), unless it belongs to the last observation that was preprocessed.
        """
        if not self.relative_actions:  # step by step, as LeRobot's loops: an own processor may say `[:, -1]`
            return self.postprocessor(chunk.flatten(0, -2)).unflatten(0, chunk.shape[:-1])
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
        """A backbone representation (B, d) that the noise actor may look at: the entry ``features``."""
        return conditioning.rows("features") if "features" in conditioning.tensors else None

    @cached_property
    def offers_features(self) -> bool:
        """Whether there are ``features``: ``verify`` has seen it, else an example shows it."""
        return self.features(self.example_conditioning(1, torch.Generator().manual_seed(0))) is not None
