"""Adapter of LeRobot's ``vla_jepa`` policy (Qwen3-VL, whose action tokens condition a flow-matching DiT).

Noise: (chunk_size, action_dim), standard normal, in the normalised action space; nothing is padded.
``encode`` runs Qwen3-VL once; ``denoise`` runs LeRobot's own loop on the hidden states of its embodied-action
tokens, its single draw replaced. The world model takes part in training alone and is not built.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.adapters import Conditioning, PolicyConfig, UserError, policy_error
from trimtab.adapters.checkpoint.files import BACKBONE
from trimtab.adapters.errors import reason
from trimtab.adapters.lerobot.injection import injected
from trimtab.adapters.lerobot.vla import VLAAdapter

WORLD_MODEL = ("model.video_encoder.", "model.video_predictor.")


class VLAJEPAAdapter(VLAAdapter):
    """Features: mean of the embodied-action tokens' hidden states, and the normalised state."""

    policy_type: ClassVar[str] = "vla_jepa"
    takes_tokenizer = False
    backbone_fields = ("qwen_model_name",)
    loads_backbone = True
    steps_field = "num_inference_timesteps"
    noise_fields = ("chunk_size", "action_dim")
    recorded = ("denoise",)  # without its instruction, which is no tensor, it would encode LeRobot's own one

    @classmethod
    def prepare_config(cls, config: Any, options: PolicyConfig) -> list[str]:
        if not config.enable_world_model:
            return []
        config.enable_world_model = False
        return ["the world model, which acts in training alone, was left out"]

    @classmethod
    def build(cls, config: Any) -> Any:
        try:
            return super().build(config)
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and "qwen_model_name" not in str(error):
                raise  # about the policy's own numbers: the backbone's copy has this name
            raise UserError(
                BACKBONE,
                f"the config and processor of the backbone '{config.qwen_model_name}' cannot be loaded: "
                f"{reason(error)}; name a folder that holds them",
            ) from error

    @classmethod
    def prepare_weights(cls, saved: dict[str, Tensor], policy: Any) -> dict[str, Tensor]:
        """Leave out the world model's tensors, and refuse those that contradict the length of the prompt."""
        for name, tensor in saved.items():
            frames = policy.config.jepa_tubelet_size
            if name.startswith(WORLD_MODEL[0]) and tensor.ndim == 5 and tensor.shape[2] != frames:
                raise policy_error(
                    f"config.json says jepa_tubelet_size {frames}, the saved video encoder takes "
                    f"{tensor.shape[2]} frames; correct config.json"
                )
        return {name: tensor for name, tensor in saved.items() if not name.startswith(WORLD_MODEL)}

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

    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        state = conditioning.rows("state") if "state" in conditioning.tensors else None
        with injected(self, noise):
            chunk = self.policy.model.action_model.predict_action(conditioning.rows("tokens"), state)
        return self.executed(chunk).float()
