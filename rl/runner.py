"""From raw environment observations to conditioning, and from noise to executable actions."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION
from torch import Tensor
from torch.nn.functional import pad

from trimtab.adapters import Conditioning, PolicyAdapter, UserError
from trimtab.policies.acting import Choice, ChunkPolicy, denoise_several
from trimtab.policies.noise_samplers import base_noise
from trimtab.rl.envs.chunk import RawObservation, stack_observations
from trimtab.rl.envs.hooks import env_processors

# One conditioning for all environments; of a policy that remembers, one for each: their episodes stand at
# different chunks, whose conditionings cannot be joined.
Encoded = Conditioning | list[Conditioning]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device``; from the host to a GPU, one for which the host does not wait."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class PolicyRunner:
    """The frozen policy with an environment's processors around it, in ``lerobot-eval``'s order.

    Observation: LeRobot's conversion, task strings, environment preprocessor, policy preprocessor, encode.
    Action: denoise, policy postprocessor, environment postprocessor.

    A policy that remembers its episode (``adapter.remembers``) does so where ``slots`` name the
    environments: ``act`` keeps each one's conditioning and chunk, and the next ``encode`` follows on from
    them, until ``forget``. Nothing else changes what is kept. A runner remembers one set of environments at a
    time. Other policies ignore ``slots``.
    """

    def __init__(self, adapter: PolicyAdapter, env_config: EnvConfig) -> None:
        self.adapter = adapter
        self.fps: float | None = getattr(env_config, "fps", None)  # environment steps a second
        self.env_preprocessor, self.env_postprocessor = env_processors(env_config, adapter.config)
        self._memory: dict[int, tuple[Conditioning, Tensor]] = {}

    def forget(self, slot: int) -> None:
        """Call before an episode starts in the environment ``slot``."""
        self._memory.pop(slot, None)

    def remember(self, slot: int, conditioning: Conditioning, chunk: Tensor) -> None:
        """Take ``chunk`` (1, steps, action_dim) as what the environment ``slot`` executes from here on."""
        self._memory[slot] = (conditioning, chunk)

    def encode(
        self, observations: list[RawObservation], tasks: list[str], slots: Sequence[int] | None = None
    ) -> Encoded:
        """Encode B observation histories, entries (n_obs_steps, ...), with their language instructions.

        Args:
            observations, tasks: B of each.
            slots: B environment indices, each with its last chunk executed to the end; without them a
                policy that remembers sees each observation as an episode's first.

        Returns:
            one conditioning of B rows; with ``slots`` and a policy that remembers, B of one row each.
        """
        if slots is None or not self.adapter.remembers:
            return self.adapter.observe(self.history(observations, tasks))
        encoded = []
        for observation, task, slot in zip(observations, tasks, slots, strict=True):
            history = self.history([observation], [task])
            encoded.append(self.adapter.observe(history, self._memory.get(slot)))
        return encoded

    def history(self, observations: list[RawObservation], tasks: list[str]) -> dict[str, Any]:
        """What ``adapter.observe`` takes, of what ``encode`` takes."""
        from lerobot.envs.utils import preprocess_observation

        batch, steps = len(observations), self.adapter.n_obs_steps
        joined = stack_observations(observations, np.concatenate)
        flat: dict[str, Any] = preprocess_observation(joined)  # (B * n_obs_steps, ...)
        flat["task"] = [task for task in tasks for _ in range(steps)]
        flat = self.env_preprocessor(flat)
        history: dict[str, Any] = {}
        for key, value in flat.items():  # LeRobot's pipeline adds empty entries; leave them out
            if isinstance(value, Tensor) and value.ndim and len(value) == batch * steps:
                if self.adapter.device.type == "cuda" and value.device.type == "cpu":
                    value = value.pin_memory()  # LeRobot's preprocessor then copies without waiting
                history[key] = value.unflatten(0, (batch, steps))
            elif isinstance(value, list) and len(value) == batch * steps:
                history[key] = value[::steps]
        return history

    def features(self, conditioning: Encoded) -> Tensor:
        """What the noise actor looks at, (B, d) float32: features, or packed observations.

        Raises:
            UserError: the adapter offers no features.
        """
        if isinstance(conditioning, list):
            return torch.cat([self.features(row) for row in conditioning])
        features = self.adapter.seen(conditioning)
        if features is None:
            raise UserError(
                "--policy.path", f"the {self.adapter.policy_type} adapter offers no features to steer by"
            )
        return features.float()

    def denoise(self, conditioning: Encoded, noise: Tensor, lengths: list[int] | None = None) -> Tensor:
        """Normalised chunks (B, K, steps, action_dim) for noise (B, K, *noise_shape).

        Of a policy that remembers, chunks may be of different lengths: ``lengths`` takes them, the rest of a
        chunk is zero.

        Raises:
            UserError: several noises of a policy that denoises one sample at a time from a memory of its own.
        """
        if not isinstance(conditioning, list):
            return denoise_several(self.adapter, conditioning, noise)
        if noise.shape[1] > 1:
            raise UserError(
                "--rl.type", f"a {self.adapter.policy_type} policy offers no candidates; use dsrl_sac"
            )
        pairs = zip(conditioning, noise.split(1), strict=True)
        rows = [denoise_several(self.adapter, one, drawn)[0, 0] for one, drawn in pairs]
        if lengths is not None:
            lengths[:] = [len(row) for row in rows]
        steps = max(len(row) for row in rows)
        return torch.stack([pad(row, (0, 0, 0, steps - len(row))) for row in rows]).unsqueeze(1)

    def act(
        self,
        policy: ChunkPolicy,
        conditioning: Encoded,
        features: Tensor | None,
        prior: Tensor,
        slots: Sequence[int] | None = None,
    ) -> tuple[Choice, list[np.ndarray]]:
        """What ``policy`` chooses, and the actions (steps, action_dim) that each environment gets for it.

        Args:
            policy: acts.
            conditioning, features: of B observations, from ``encode`` and ``features``; a policy that does
                not look takes ``None``.
            prior: (B, policy.draws, *noise_shape) draws.
            slots: as for ``encode``; a policy that remembers keeps the chunks as theirs.
        """
        lengths: list[int] = []
        denoise = partial(self.denoise, conditioning, lengths=lengths)
        choice = policy.act(features, to_device(prior, self.adapter.device), denoise)
        if not isinstance(conditioning, list):
            return choice, list(self.executable(choice.chunk, conditioning))
        actions = []
        for row, (one, length) in enumerate(zip(conditioning, lengths, strict=True)):
            chunk = choice.chunk[row : row + 1, :length]
            if slots is not None:
                self.remember(slots[row], one, chunk)
            actions.append(self.executable(chunk, one)[0])
        return choice, actions

    def decode(
        self, conditioning: Encoded, noise: Tensor, slots: Sequence[int] | None = None
    ) -> list[np.ndarray]:
        """The actions for one ``noise`` (B, *noise_shape) of each observation, as ``act`` gives them."""
        return self.act(base_noise, conditioning, None, noise.unsqueeze(1), slots)[1]

    def executable(self, chunk: Tensor, conditioning: Conditioning) -> np.ndarray:
        """What the environment gets for normalised chunks (B, steps, action_dim)."""
        actions = self.adapter.postprocess(chunk, conditioning)
        # A step at a time, as LeRobot's loop does: X-VLA's in LIBERO turn (B, 20) into (B, 7).
        sent = self.env_postprocessor({ACTION: actions.flatten(0, 1)})[ACTION]
        return sent.unflatten(0, actions.shape[:2]).float().cpu().numpy()

    def normalised(self, history: dict[str, Any], actions: Tensor) -> Tensor:
        """Actions (B, T, action_dim) as the policy makes them, on the CPU, where ``history`` was seen.

        The policy's preprocessor may need the observation for it (relative actions).
        """
        last = {key: value[:, -1] if isinstance(value, Tensor) else value for key, value in history.items()}
        found = self.adapter.preprocessor({**last, ACTION: actions})[ACTION]
        return found[..., : actions.shape[-1]].float().cpu()

    def prior(self, count: int, generator: torch.Generator) -> Tensor:
        """Fresh draws (count, *noise_shape) from the policy's noise distribution, on the CPU."""
        return torch.randn((count, *self.adapter.noise_spec.shape), generator=generator)
