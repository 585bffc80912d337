"""Adapter of LeRobot's ``vla_jepa`` policy (Qwen3-VL, whose action tokens condition a flow-matching DiT).

Noise: (chunk_size, action_dim), standard normal, in the normalised action space; nothing is padded.
``encode`` runs Qwen3-VL once; ``denoise`` runs LeRobot's own loop on the hidden states of its embodied-action
tokens, its single draw replaced. The world model takes part in training alone and is not built.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.adapters.base import NoiseSpec, PolicyAdapter
from trimtab.adapters.conditioning import Conditioning
from trimtab.adapters.config import PolicyConfig
from trimtab.adapters.errors import UserError, reason
from trimtab.adapters.lerobot.backbone import without_weights
from trimtab.adapters.lerobot.injection import NoiseInjector

WORLD_MODEL = ("model.video_encoder.", "model.video_predictor.")


class VLAJEPAAdapter(PolicyAdapter):
    """``encode`` is Qwen3-VL, ``denoise`` the Euler loop of the action head."""

    policy_type: ClassVar[str] = "vla_jepa"
    reads_task = True
    resizes_images = True

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        super().__init__(policy, preprocessor, postprocessor)
        config = policy.config
        self.noise_spec = NoiseSpec((config.chunk_size, config.action_dim))
        self.chunk_shape = (config.n_action_steps, config.action_dim)

    @classmethod
    def prepare_config(cls, config: Any, options: PolicyConfig) -> list[str]:
        if options.tokenizer:
            raise UserError(
                "--policy.tokenizer", "vla_jepa takes its tokenizer from its backbone: name --policy.backbone"
            )
        config.qwen_model_name = options.backbone or config.qwen_model_name
        config.num_inference_timesteps = options.num_inference_steps or config.num_inference_timesteps
        if not config.enable_world_model:
            return []
        config.enable_world_model = False
        return ["the world model, which acts in training alone, was left out"]

    @classmethod
    def build(cls, config: Any) -> Any:
        name = config.qwen_model_name
        with without_weights(name) as folder:
            config.qwen_model_name = folder
            try:
                return super().build(config)
            except (OSError, ValueError) as error:
                if isinstance(error, ValueError) and folder not in str(error):
                    raise  # about the policy's own numbers
                raise UserError(
                    "--policy.backbone",
                    f"the config and processor of the backbone '{name}' cannot be loaded: {reason(error)}; "
                    "name a folder that holds them",
                ) from error
            finally:
                config.qwen_model_name = name

    @classmethod
    def prepare_weights(cls, saved: dict[str, Tensor], policy: Any) -> dict[str, Tensor]:
        """Leave out the world model's tensors.

        Raises:
            UserError: its encoder contradicts the config, which without it decides how long the prompt is.
        """
        for name, tensor in saved.items():
            frames = policy.config.jepa_tubelet_size
            if name.startswith(WORLD_MODEL[0]) and tensor.ndim == 5 and tensor.shape[2] != frames:
                raise UserError(
                    "--policy.path",
                    f"config.json says jepa_tubelet_size {frames}, the saved video encoder takes "
                    f"{tensor.shape[2]} frames; correct config.json",
                )
        return {name: tensor for name, tensor in saved.items() if not name.startswith(WORLD_MODEL)}

    @torch.no_grad()
    def encode(self, batch: dict[str, Any]) -> Conditioning:
        model = self.policy.model
        inputs = self.policy._prepare_model_inputs(batch, training=False)
        images, size = inputs["images"], self.policy.config.resize_images_to
        if size is not None:
            images = [[F.interpolate(v[None], size=tuple(size), mode="area")[0] for v in s] for s in images]
        tokens, _ = model._encode_qwen(images, inputs["instructions"], need_action_tokens=False)
        dtype = next(model.action_model.parameters()).dtype  # LeRobot says float, also to a head in half
        tensors = {"tokens": tokens.to(dtype), "features": tokens.float().mean(1)}
        if "state" in inputs:
            tensors["state"] = inputs["state"].to(dtype)
            tensors["features"] = torch.cat([tensors["features"], inputs["state"].flatten(1)], -1)
        return Conditioning(tensors)

    @torch.no_grad()
    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        self.check_noise(conditioning, noise)
        state = conditioning.rows("state") if "state" in conditioning.tensors else None
        with NoiseInjector(noise) as injector:
            chunk = self.policy.model.action_model.predict_action(conditioning.rows("tokens"), state)
        injector.check(self.policy_type)
        return self.executed(chunk).float()

    def features(self, conditioning: Conditioning) -> Tensor:
        """Mean of the embodied-action tokens' hidden states, and the normalised state."""
        return conditioning.rows("features")
