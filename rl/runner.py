"""From raw environment observations to conditioning, and from noise to executable actions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION
from torch import Tensor

from trimtab.adapters import Conditioning, PolicyAdapter, UserError
from trimtab.rl.envs.chunk import RawObservation, stack_observations


class PolicyRunner:
    """The frozen policy with an environment's processors around it, in ``lerobot-eval``'s order.

    Observation: LeRobot's conversion, task strings, environment preprocessor, policy preprocessor, encode.
    Action: denoise, policy postprocessor, environment postprocessor.

    Args:
        adapter: the frozen policy.
        env_config: the environment's LeRobot config.
    """

    def __init__(self, adapter: PolicyAdapter, env_config: EnvConfig) -> None:
        from lerobot.envs.factory import make_env_pre_post_processors

        self.adapter = adapter
        self.env_preprocessor, self.env_postprocessor = make_env_pre_post_processors(
            env_config, adapter.config
        )

    def encode(self, observations: list[RawObservation], tasks: list[str]) -> Conditioning:
        """Encode observation histories.

        Args:
            observations: B raw histories, entries (n_obs_steps, ...).
            tasks: B language instructions.
        """
        from lerobot.envs.utils import preprocess_observation

        batch = len(observations)
        stacked = stack_observations(observations)
        steps = self.adapter.n_obs_steps
        flat: dict[str, Any] = preprocess_observation(_flatten(stacked))
        flat["task"] = [task for task in tasks for _ in range(steps)]
        flat = self.env_preprocessor(flat)
        history: dict[str, Any] = {}
        for key, value in flat.items():  # LeRobot's pipeline adds empty entries; leave them out
            if isinstance(value, Tensor) and value.ndim and len(value) == batch * steps:
                history[key] = value.unflatten(0, (batch, steps))
            elif isinstance(value, list) and len(value) == batch * steps:
                history[key] = value[::steps]
        return self.adapter.observe(history)

    def features(self, conditioning: Conditioning) -> Tensor:
        """What the noise actor looks at, (B, d) float32 on the CPU.

        Raises:
            UserError: the adapter offers no features.
        """
        features = self.adapter.features(conditioning)
        if features is None:
            raise UserError(
                "--policy.path", f"the {self.adapter.policy_type} adapter offers no features to steer by"
            )
        return features.float().cpu()

    def decode(self, conditioning: Conditioning, noise: Tensor) -> np.ndarray:
        """Executable actions (B, steps, action_dim) for ``noise`` (B, *noise_spec.shape)."""
        spec = self.adapter.noise_spec
        chunk = self.adapter.denoise(conditioning, noise.to(self.adapter.device, spec.dtype))
        actions = self.adapter.postprocess(chunk, conditioning)
        actions = self.env_postprocessor({ACTION: actions})[ACTION]
        return actions.float().cpu().numpy()

    def prior(self, batch: int, generator: torch.Generator) -> Tensor:
        """A fresh draw (batch, *noise_spec.shape) from the policy's noise distribution."""
        return torch.randn((batch, *self.adapter.noise_spec.shape), generator=generator)


def _flatten(observation: Any) -> Any:
    """Merge the batch and history axes of every array."""
    if isinstance(observation, dict):
        return {key: _flatten(value) for key, value in observation.items()}
    return observation.reshape(-1, *observation.shape[2:])
