"""Adapter of LeRobot's ``diffusion`` policy (a conditional U-Net denoised by DDIM).

Noise: (horizon, action_dim), standard normal, in the normalised action space. All rows influence the
executed slice ``[n_obs_steps - 1 : n_obs_steps - 1 + n_action_steps]`` through the U-Net.
"""

from typing import Any, ClassVar

import torch
from lerobot.utils.constants import OBS_IMAGES
from torch import Tensor

from trimtab.adapters import Conditioning, NoiseSpec, PolicyAdapter, PolicyConfig, UserError
from trimtab.adapters.lerobot.inversion import solve

DEFAULT_DDIM_STEPS = 10  # what a checkpoint saved with DDPM is sampled with, unless told otherwise


def use_ddim(config: Any, num_inference_steps: int | None) -> list[str]:
    """Switch DDPM, whose steps draw fresh noise, to DDIM, whose steps do not: same weights and betas.

    Changes ``config``, and returns a line for the user where something was switched.
    """
    notes = []
    if config.noise_scheduler_type != "DDIM":
        config.noise_scheduler_type = "DDIM"
        config.num_inference_steps = num_inference_steps or min(
            DEFAULT_DDIM_STEPS, config.num_train_timesteps
        )
        notes.append(
            f"the checkpoint samples with DDPM, which is random given the noise: switched to DDIM with "
            f"{config.num_inference_steps} steps (change with --policy.num_inference_steps)"
        )
    elif num_inference_steps:
        config.num_inference_steps = num_inference_steps
    steps, most = config.num_inference_steps, config.num_train_timesteps
    if steps is not None and not 1 <= steps <= most:
        raise UserError("--policy.num_inference_steps", f"must be between 1 and {most}, got {steps}")
    return notes


def steps_to_horizon(config: Any) -> int:
    """Actions that LeRobot executes of a chunk, which it cuts short where the horizon ends.

    The horizon starts at the first of the observations, the executed slice at the last of them.
    """
    return min(config.n_action_steps, config.horizon - config.n_obs_steps + 1)


def cap_steps(config: Any) -> list[str]:
    """A line for the user where the horizon ends before ``n_action_steps`` actions."""
    steps = steps_to_horizon(config)
    if steps == config.n_action_steps:
        return []
    return [
        f"config.json says n_action_steps {config.n_action_steps}, but with n_obs_steps {config.n_obs_steps} "
        f"the horizon of {config.horizon} ends after {steps}: {steps} actions of each chunk are executed, as "
        "LeRobot does"
    ]


class DiffusionAdapter(PolicyAdapter):
    """Features: the U-Net's global conditioning: the normalised states and the cameras' keypoints."""

    policy_type: ClassVar[str] = "diffusion"
    takes_tokenizer = False
    dtypes = ("float32",)  # LeRobot gives the encoder, or joins to its output, float32 states
    history: ClassVar[bool] = True
    stacks_cameras = True
    resize_field: ClassVar[str] = "resize_shape"

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        super().__init__(policy, preprocessor, postprocessor)
        config = policy.config
        action_dim = config.action_feature.shape[0]
        self.noise_spec = NoiseSpec((config.horizon, action_dim))
        self.chunk_shape = (steps_to_horizon(config), action_dim)
        self.n_obs_steps = config.n_obs_steps
        # To one size; a crop alone would show another part of them.
        self.resizes_images = getattr(config, self.resize_field) is not None

    @classmethod
    def prepare_config(cls, config: Any, options: PolicyConfig) -> list[str]:
        return [*cap_steps(config), *use_ddim(config, options.num_inference_steps)]

    def encode(self, batch: dict[str, Any]) -> Conditioning:
        batch = dict(batch)
        if self.policy.config.image_features:
            batch[OBS_IMAGES] = torch.stack([batch[key] for key in self.policy.config.image_features], dim=-4)
        return Conditioning({"features": self.policy.diffusion._prepare_global_conditioning(batch)})

    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        actions = self.policy.diffusion.conditional_sample(
            conditioning.batch_size, global_cond=conditioning.rows("features"), noise=noise
        )
        return self.executed(actions[:, self.n_obs_steps - 1 :])

    @property
    def inverts(self) -> bool:  # type: ignore[override]
        return self.config.noise_scheduler_type == "DDIM"

    def reverse(self, conditioning: Conditioning, chunk: Tensor, iterations: int) -> Tensor:
        """Each DDIM step is ``x := a x + b eps(x, t)``.

        Where LeRobot clips what it predicts (``clip_sample``) it has no inverse.
        """
        model, features = self.policy.diffusion, conditioning.rows("features")
        zero = chunk.new_zeros(len(chunk), *self.noise_spec.shape)
        x = model.conditional_sample(len(chunk), global_cond=features, noise=zero)
        self.executed(x[:, self.n_obs_steps - 1 :]).copy_(chunk)
        scheduler = model.noise_scheduler  # conditional_sample has set its timesteps
        following = scheduler.final_alpha_cumprod
        for t in scheduler.timesteps.flip(0):
            times, alpha = torch.full((len(x),), t, device=x.device), scheduler.alphas_cumprod[t]

            def step(x: Tensor, t: Tensor = t, times: Tensor = times) -> Tensor:
                return scheduler.step(model.unet(x, times, global_cond=features), t, x).prev_sample

            x = solve(step, x, float((following / alpha).sqrt()), iterations)
            following = alpha
        return x
