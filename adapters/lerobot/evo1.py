"""Adapter of LeRobot's ``evo1`` policy (InternVL3 and a cross-attending flow-matching head).

The policy draws uniform noise in (-1, 1) and zeroes the padded action dimensions, before and after every
step: those entries are inert. The adapter takes standard normal noise (chunk_size, max_action_dim) and maps
it to the policy's by the normal distribution function. ``encode`` runs InternVL3 once; the head reads its
tokens at every step. The chunk keeps the padded dimensions: the policy's own postprocessor crops them.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.adapters import Conditioning, NoiseSpec, PolicyConfig
from trimtab.adapters.lerobot.injection import injected
from trimtab.adapters.lerobot.vla import VLAAdapter, pooled


class Evo1Adapter(VLAAdapter):
    """Features: mean of InternVL3's final tokens (or its one pooled token), and the padded state."""

    policy_type: ClassVar[str] = "evo1"
    takes_tokenizer = False
    backbone_fields = ("vlm_model_name",)
    loads_backbone = True
    steps_field = "num_inference_timesteps"
    dtype_field = "vlm_dtype"  # what the images are cast to

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        super().__init__(policy, preprocessor, postprocessor)
        shape = self.noise_spec.shape
        live = policy._prepare_inference_action_mask(1).cpu().expand(shape)
        self.noise_spec = NoiseSpec(shape, "uniform", live=live)
        self.chunk_shape = (policy.config.n_action_steps, policy.config.max_action_dim)

    @classmethod
    def prepare_config(cls, config: Any, options: PolicyConfig) -> list[str]:
        config.enable_gradient_checkpointing = False  # nothing is trained
        half = config.vlm_dtype in ("bfloat16", "float16")
        config.use_flash_attn = config.use_flash_attn and half and str(config.device).startswith("cuda")
        return []

    def encode(self, batch: dict[str, Any]) -> Conditioning:
        policy = self.policy
        images, image_masks = policy._collect_image_batches(batch)
        state, _ = policy._prepare_state(batch)
        embodiments = policy._get_embodiment_ids(batch, len(state))
        with policy._maybe_autocast():
            tokens, mask = policy._compute_fused_tokens(
                policy._normalize_task_batch(batch), images, image_masks
            )
        mean = tokens.float() if mask is None else pooled(tokens, mask)  # no mask: one token, (B, dim)
        masked = {} if mask is None else {"mask": mask}
        features = torch.cat([mean, state.float()], -1)
        return Conditioning(
            {"features": features, "tokens": tokens, "state": state, "embodiments": embodiments, **masked}
        )

    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        policy = self.policy
        # The head draws from (0, 1) and stretches that to (-1, 1).
        with policy._maybe_autocast(), injected(self, (self.native_noise(noise) + 1) / 2, (torch.rand,)):
            chunk = policy.model(
                conditioning.rows("tokens"),
                state=conditioning.rows("state"),
                action_mask=policy._prepare_inference_action_mask(len(noise)),
                embodiment_ids=conditioning.rows("embodiments"),
                context_mask=conditioning.rows("mask") if "mask" in conditioning.tensors else None,
            )
        return self.executed(chunk.unflatten(1, self.noise_spec.shape).float())

    def native_noise(self, noise: Tensor) -> Tensor:
        """Uniform in (-1, 1), flat: (B, chunk_size * max_action_dim)."""
        return torch.erf(noise / math.sqrt(2)).flatten(1)  # 2 * Phi(noise) - 1
