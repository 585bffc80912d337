"""Adapter of LeRobot's ``smolvla`` policy (a small VLM with an action expert, flow matching).

Noise: (chunk_size, max_action_dim), standard normal; the padded action dimensions are live too, for the
expert mixes them. ``encode`` runs vision, language and state through the VLM once; ``denoise`` integrates
the expert over the kept keys and values.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor

from trimtab.adapters import Conditioning, PolicyConfig
from trimtab.adapters.lerobot.inversion import Velocity
from trimtab.adapters.lerobot.vla import FlowAdapter, pooled, restore_prefix, store_prefix


class SmolVLAAdapter(FlowAdapter):
    """Features: mean of the VLM's prefix tokens, and the normalised, padded state."""

    policy_type: ClassVar[str] = "smolvla"
    backbone_fields = ("vlm_model_name",)
    loads_backbone = True
    steps_field = "num_steps"
    dtypes = ("float32", "bfloat16")
    fills_missing_cameras = True

    @classmethod
    def prepare_config(cls, config: Any, options: PolicyConfig) -> list[str]:
        if options.dtype:
            config.load_vlm_weights = options.dtype == "bfloat16"
        if config.use_cache:
            return []
        config.use_cache = True
        return ["use_cache is on here: without it LeRobot cannot sample"]

    @classmethod
    def cast(cls, policy: Any, dtype: torch.dtype) -> None:
        """LeRobot runs the VLM and most of the expert in bfloat16 where ``load_vlm_weights`` is set."""

    def encode(self, batch: dict[str, Any]) -> Conditioning:
        from lerobot.policies.smolvla.modeling_smolvla import make_att_2d_masks

        policy, model = self.policy, self.policy.model
        # LeRobot flips joints of the aloha robot in place.
        batch = policy._prepare_batch({**batch, OBS_STATE: batch[OBS_STATE].clone()})
        images, image_masks = policy.prepare_images(batch)
        state = policy.prepare_state(batch)
        embeddings, pad_mask, attention = model.embed_prefix(
            images, image_masks, batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK], state=state
        )
        (hidden, _), cache = model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(pad_mask, attention),
            position_ids=torch.cumsum(pad_mask, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        features = torch.cat([pooled(hidden, pad_mask), state.float()], -1)
        return Conditioning({"features": features, "pad_mask": pad_mask, **store_prefix(cache)})

    @property
    def inverts(self) -> bool:  # type: ignore[override]
        return not self.config.adapt_to_pi_aloha  # which makes other actions of them

    def velocity(self, conditioning: Conditioning) -> Velocity:
        cache, pad_mask = restore_prefix(conditioning), conditioning.rows("pad_mask")
        return lambda x, time: self.policy.model.denoise_step(pad_mask, cache, x, time)

    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        chunk = super().denoise(conditioning, noise)
        return self.policy._pi_aloha_encode_actions(chunk) if self.config.adapt_to_pi_aloha else chunk
