"""Adapter of a policy on an openpi policy server: observation and noise go out, a chunk comes back.

Noise: (horizon, 32) for openpi's models, standard normal. It travels inside the observation as (1, horizon,
32), under the key that the DSRL forks of openpi use. openpi's own server ignores it and draws its own:
``verify`` notices, and says which lines to change. The server normalises, so chunks are in the
environment's own units. It takes one observation with one noise at a time; nothing is shared between K
noises. The noise actor sees the raw state, and the server's prefix where it offers one.
"""

from dataclasses import asdict
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from torch import Tensor

from trimtab.adapters import Conditioning, NoiseSpec, PolicyAdapter, PolicyConfig, UserError, policy_error
from trimtab.adapters.checkpoint.identity import same_answer
from trimtab.adapters.remote.openpi_client import PolicyServer, ServerError, describe, is_image, sent_images

DEFAULT_SIDE = 224  # of an example image that is sent as it is
NOISE_DIM = 32  # openpi pads the actions of all its models to it
MEND = (
    "openpi's own server ignores the noise it is sent. In its websocket_policy_server.py write "
    "`noise = obs.pop('noise', None)` after `obs` is unpacked, and call "
    "`self._policy.infer(obs, noise=noise)`"
)
# What takes the place of options that have no effect on a server's policy.
INSTEAD = {"rename_map": "--policy.remote.keys", "n_action_steps": "--policy.remote.n_action_steps"}


class RemoteAdapter(PolicyAdapter):
    """``encode`` packs the observation, ``denoise`` sends it with each noise.

    Features: the raw states as they are sent, and the last token of the server's prefix where that is asked.
    Chunks and features are handed over on ``device``.
    """

    policy_type: ClassVar[str] = "remote"
    reads_task = True
    rounding = 0.1  # a server need not repeat itself to the bit
    config: Any = None  # has the features alone

    def __init__(self, options: PolicyConfig, device: str) -> None:
        for name, default in vars(PolicyConfig(path="", device="", remote=options.remote)).items():
            if getattr(options, name) != default and name not in ("path", "device"):
                instead = INSTEAD.get(name, "the server's own options")
                raise UserError(f"--policy.{name}", f"has no effect on a policy server; use {instead}")
        if not options.remote.timeout > 0:
            raise UserError("--policy.remote.timeout", f"must be positive, got {options.remote.timeout}")
        self.options = options.remote
        self.policy = None  # out of sight
        self.preprocessor = self.postprocessor = lambda value: value
        self.device = torch.device(device)
        self.config = SimpleNamespace(input_features=self._input_features(), output_features={})
        self._answer_shape: tuple[int, int] | None = None
        self.server = PolicyServer(options.path or "", self.options.timeout)
        try:
            self.notes = self._probe()
        except BaseException:
            self.close()
            raise

    def _probe(self) -> list[str]:
        """Learn the shapes from the server's metadata and one answer; return what to tell the user."""
        notes = []
        named, wanted = self.server.metadata.get("noise_shape"), self.options.noise_shape
        shape = _noise_shape(wanted if named is None else named)
        if named is not None and wanted and _noise_shape(wanted) != shape:
            notes.append(
                f"the server takes noise of shape {shape}; --policy.remote.noise_shape has no effect"
            )
        conditioning = self.example_conditioning(1, torch.Generator().manual_seed(0))
        message = self._message(conditioning, 0)
        if shape is not None:
            message[self.options.noise_key] = np.zeros((1, *shape), np.float32)
        try:
            horizon, action_dim = self._chunk(self.server.request(message)).shape
        except ServerError as error:
            raise policy_error(
                f"{error.message}; it was sent {', '.join(describe(message))} (change what with "
                "--policy.remote.keys and --policy.remote.dims)"
            ) from None
        self._answer_shape = (horizon, action_dim)
        self.offers_features = "features" in conditioning.tensors
        steps = horizon if self.options.n_action_steps is None else self.options.n_action_steps
        if not 1 <= steps <= horizon:
            raise UserError(
                "--policy.remote.n_action_steps",
                f"must be between 1 and {horizon}, the length of the server's chunks, got {steps}",
            )
        self.noise_spec = NoiseSpec(shape or (horizon, NOISE_DIM))
        self.chunk_shape = (steps, action_dim)
        self.config.output_features["action"] = PolicyFeature(FeatureType.ACTION, (action_dim,))
        seen = [key for key in self.options.keys if not is_image(key)]
        if seen and not self.options.prefix_features and len(seen) < len(self.options.keys):
            notes.append(
                f"the noise actor sees {', '.join(seen)} but no image: the server keeps what its model sees "
                "to itself (--policy.remote.prefix_features asks a server that has dsrl_pi0's get_prefix_rep)"
            )
        return notes

    def close(self) -> None:
        self.server.close()

    def _input_features(self) -> dict[str, PolicyFeature]:
        """The observations that are sent, as the features of a LeRobot config."""
        features, dims = {}, self.options.dims
        for key in self.options.keys:
            if is_image(key):
                side = self.options.image_size or DEFAULT_SIDE
                features[key] = PolicyFeature(FeatureType.VISUAL, (3, side, side))
            elif dims.get(key, 0) < 1:
                raise UserError("--policy.remote.dims", f"say how many entries {key} has: {{{key}: 8}}")
            else:
                features[key] = PolicyFeature(FeatureType.STATE, (dims[key],))
        if not features:
            raise UserError("--policy.remote.keys", "name at least one observation to send")
        options = self.options
        names = sorted([*options.keys.values(), options.prompt_key, options.noise_key])
        for one, other in pairwise(names):
            if one == other or other.startswith(f"{one}."):
                raise UserError(
                    "--policy.remote.keys", f"the server's name {other} is used twice, as {one} and {other}"
                )
        return features

    def check_observation(self, observation: dict[str, Any]) -> None:
        missing = [key for key in self.options.keys if key not in observation]
        if missing:
            given = ", ".join(sorted(key for key in observation if key.startswith("observation"))) or "none"
            raise UserError(
                "--policy.remote.keys",
                f"the server is sent {', '.join(missing)}, the environment gives {given}; choose the "
                "environment that the policy was trained on, or map what there is to the server's names",
            )
        for key in self.options.keys:
            shape, dim = tuple(observation[key].shape[2:]), self.options.dims.get(key)
            if is_image(key) and len(shape) != 3:
                raise UserError("--policy.remote.keys", f"{key} of shape {shape} is no image")
            if not is_image(key) and shape != (dim,):
                raise UserError(
                    "--policy.remote.dims",
                    f"{key} is said to have {dim} entries, the environment gives {shape}",
                )

    def _message(self, conditioning: Conditioning, row: int) -> dict[str, Any]:
        """Observation ``row`` as the server takes it."""
        content: dict[str, Any] = {}
        for key, name in self.options.keys.items():
            *parents, last = name.split(".")
            inner = content
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = conditioning.tensors[key][row].numpy()
        if "task" in conditioning.lists:
            content[self.options.prompt_key] = conditioning.lists["task"][row]
        return content

    def encode(self, batch: dict[str, Any]) -> Conditioning:
        tensors = {
            key: sent_images(self.options, batch[key]) if is_image(key) else batch[key].float().cpu()
            for key in self.options.keys
        }
        tasks = batch.get("task")
        conditioning = Conditioning(tensors, {"task": list(tasks)} if tasks else {})
        features = [tensors[key] for key in self.options.keys if not is_image(key)]
        if self.options.prefix_features:
            rows = range(conditioning.observations)
            features.append(torch.stack([self._prefix(conditioning, row) for row in rows]))
        if features:
            tensors["features"] = torch.cat(features, -1).to(self.device)
        return conditioning

    def _prefix(self, conditioning: Conditioning, row: int) -> Tensor:
        """What the model makes of images and instruction: the last token of its prefix (width,)."""
        message = {"method": "get_prefix_rep", "obs": self._message(conditioning, row)}
        try:
            answer = self.server.request(message)
        except ServerError as error:
            raise UserError(
                "--policy.remote.prefix_features",
                f"{error.message}; openpi's own server has no get_prefix_rep",
            ) from None
        tokens = answer[0] if isinstance(answer, list) and answer else answer
        if not isinstance(tokens, np.ndarray) or tokens.dtype.kind != "f" or not tokens.size:
            raise UserError(
                "--policy.remote.prefix_features", f"{self.server.url} returned no prefix representation"
            )
        return torch.from_numpy(tokens.reshape(-1, tokens.shape[-1])[-1].astype(np.float32))

    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        chunks = []
        for row, sample in enumerate(noise.cpu().numpy()):
            message = self._message(conditioning, row // conditioning.repeats)
            message[self.options.noise_key] = sample[None]
            chunks.append(torch.from_numpy(self._chunk(self.server.request(message))))
        return self.executed(torch.stack(chunks)).to(noise.device)

    def _chunk(self, answer: Any) -> np.ndarray:
        """The actions (horizon, action_dim) float32 in an answer, of the same shape every time."""
        actions = answer.get("actions") if isinstance(answer, dict) else None
        if not isinstance(actions, np.ndarray) or actions.dtype.kind not in "fiu":
            raise policy_error(f"{self.server.url} answered without 'actions'")
        if actions.ndim == 3 and len(actions) == 1:
            actions = actions[0]
        expected = self._answer_shape
        if actions.ndim != 2 or not actions.size or (expected and actions.shape != expected):
            wanted = f"always {expected}" if expected else "(horizon, action dimension)"
            raise policy_error(
                f"{self.server.url} returned actions of shape {actions.shape}; they must be {wanted}"
            )
        if not np.isfinite(actions).all():
            raise policy_error(f"{self.server.url} returned NaN or Inf actions")
        return actions.astype(np.float32)

    def _two_chunks(self, repeat: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Chunks of one observation: for one noise, for it again, and for another."""
        generator = torch.Generator().manual_seed(1)
        first, second = torch.randn((2, 1, *self.noise_spec.shape), generator=generator)
        conditioning = self.example_conditioning(1, torch.Generator().manual_seed(0))
        once = self.denoise(conditioning, first)
        return once, self.denoise(conditioning, first) if repeat else once, self.denoise(conditioning, second)

    def verify(self) -> None:
        """Check that the server uses the noise it is sent; a ``UserError`` names the lines to change."""
        try:
            once, again, other = self._two_chunks(repeat=True)
        except ServerError as error:
            raise policy_error(
                f"{error.message}; it was sent noise of shape (1, {self.noise_spec.shape[0]}, "
                f"{self.noise_spec.shape[1]}) (--policy.remote.noise_shape)"
            ) from None
        repeated, effect = float((once - again).abs().max()), float((once - other).abs().max())
        if repeated > self.rounding * effect:
            odd = "the same noise gave two different chunks"
        elif effect == 0:
            odd = "two different noises gave the same chunk"
        else:
            return
        raise policy_error(f"{odd}: {self.server.url} ignores the noise it is sent. {MEND}")

    def identity(self, base: Any) -> dict[str, Any]:
        """The server's answer to one fixed observation and noise, and how to ask it again."""
        once, _, other = self._two_chunks()
        return {
            "answer": once[0, 0].tolist(),
            "tolerance": self.rounding * float((once - other).abs().max()),
            "remote": {name: value for name, value in asdict(self.options).items() if name != "timeout"},
        }

    def check_identity(self, identity: dict[str, Any], base: Any) -> None:
        if same_answer(identity, self.identity(base)):
            return
        raise policy_error(
            f"{self.server.url} no longer answers as the base did: another policy is served there"
        )


def _noise_shape(value: Any) -> tuple[int, int] | None:
    """A noise shape as two positive integers; ``None`` stays ``None``."""
    if value is None:
        return None
    try:
        horizon, dim = (int(length) for length in value)
    except (TypeError, ValueError):
        horizon = dim = 0
    if horizon < 1 or dim < 1:
        raise UserError("--policy.remote.noise_shape", f"must be [horizon, dimension], got {value}")
    return horizon, dim
