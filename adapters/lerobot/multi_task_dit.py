"""Adapter of LeRobot's ``multi_task_dit`` policy (CLIP and a diffusion transformer; flow matching or DDIM).

Noise: (horizon, action_dim), standard normal, in the normalised action space. Every row attends to every
other, so all of them move the executed slice
``[n_obs_steps - 1 : n_obs_steps - 1 + n_action_steps]``. CLIP runs once, in ``encode``; LeRobot's own sampler
(Euler, Runge-Kutta or DDIM) is ``denoise``; the one draw that DDIM makes is replaced.
"""

from typing import Any, ClassVar

import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor

from trimtab.adapters import Conditioning, PolicyConfig
from trimtab.adapters.lerobot.diffusion import DiffusionAdapter, cap_steps, use_ddim
from trimtab.adapters.lerobot.injection import injected


class MultiTaskDiTAdapter(DiffusionAdapter):
    """Features, over the history: normalised states, CLIP's class token of each camera, projected task."""

    policy_type: ClassVar[str] = "multi_task_dit"
    backbone_fields = ("vision_encoder_name", "text_encoder_name")
    loads_backbone = True
    inverts = False  # LeRobot hides the noise from its sampler
    takes_tokenizer = True
    reads_task = True
    resize_field = "image_resize_shape"

    @classmethod
    def prepare_config(cls, config: Any, options: PolicyConfig) -> list[str]:
        if config.is_diffusion:
            return [*cap_steps(config), *use_ddim(config, options.num_inference_steps)]
        config.num_integration_steps = options.num_inference_steps or config.num_integration_steps
        return cap_steps(config)

    def encode(self, batch: dict[str, Any]) -> Conditioning:
        batch = self.policy._prepare_batch(dict(batch))
        for key in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK):
            batch[key] = batch[key][:, -1]  # one task for the whole history
        return Conditioning({"features": self.policy.observation_encoder.encode(batch)})

    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        objective, network = self.policy.objective, self.policy.noise_predictor
        features = conditioning.rows("features")
        if self.config.is_diffusion:
            with injected(self, noise):
                actions = objective.conditional_sample(network, len(noise), features)
        else:  # LeRobot reads the times of its steps one by one: on a GPU it would wait for each
            euler = self.config.integration_method == "euler"
            integrate = objective._euler_integrate if euler else objective._rk4_integrate
            times = torch.linspace(0, 1, self.config.num_integration_steps + 1)
            actions = integrate(network, noise, times, features)
        return self.executed(actions[:, self.n_obs_steps - 1 :])
