"""Adapters of LeRobot's ``pi0`` and ``pi05``: PaliGemma's prefix kept once, and the expert's Euler loop.

Noise: (chunk_size, max_action_dim), standard normal. All of it is live: the actions of a chunk attend to each
other, and the expert mixes the padded action dimensions with the real ones.

LeRobot's ``denoise_step`` clones the whole key-value cache at every step, so the loop here calls the parts of
it, with a cache that stores nothing new.
"""

from typing import Any, ClassVar

import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks, pad_vector, prepare_attention_masks_4d
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor

from trimtab.adapters import Conditioning
from trimtab.adapters.lerobot.inversion import Velocity
from trimtab.adapters.lerobot.vla import FlowAdapter, pooled, restore_prefix, store_prefix


class PiAdapter(FlowAdapter):
    """Features: mean of PaliGemma's last hidden states without padding, and the normalised, padded state.

    Nothing here reads a tensor's values, so it also runs on the meta device (to count operations).
    """

    state_in_suffix: ClassVar[bool]
    steps_field = "num_inference_steps"
    dtypes = ("float32", "bfloat16")
    fills_missing_cameras = True

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        super().__init__(policy, preprocessor, postprocessor)
        self._experts = policy.model.paligemma_with_expert
        # Only eager attention takes LeRobot's additive masks; LeRobot sets it at each call.
        for model in (self._experts.paligemma.model.language_model, self._experts.gemma_expert.model):
            model.config._attn_implementation = "eager"

    @classmethod
    def prepare_weights(cls, saved: dict[str, Tensor], policy: Any) -> dict[str, Tensor]:
        """LeRobot's key fixes for files of openpi and of older versions, and its prefix."""
        bare = {key: value.to("meta") for key, value in saved.items()}  # LeRobot copies the largest
        names = {id(value): key for key, value in bare.items()}
        head = next((key for key in saved if key.endswith("paligemma.lm_head.weight")), "")
        fixed = policy._fix_pytorch_state_dict_keys(bare, policy.config)
        return {
            key if key.startswith("model.") else f"model.{key}": saved[names.get(id(value), head)]
            for key, value in fixed.items()
        }

    def encode(self, batch: dict[str, Any]) -> Conditioning:
        images, image_masks = self.policy._preprocess_images(batch)
        embeddings, pad_mask, blocks = self.policy.model.embed_prefix(
            images, image_masks, batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
        )
        (hidden, _), cache = self._experts.forward(
            attention_mask=prepare_attention_masks_4d(make_att_2d_masks(pad_mask, blocks)),
            position_ids=torch.cumsum(pad_mask, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        state = pad_vector(batch[OBS_STATE], self.config.max_state_dim)
        features = torch.cat([pooled(hidden, pad_mask), state.float()], -1)
        small = {"state": state, "pad_mask": pad_mask, "features": features}
        return Conditioning({**small, **store_prefix(cache)})

    def velocity(self, conditioning: Conditioning) -> Velocity:
        cache, prefix_mask = restore_prefix(conditioning), conditioning.rows("pad_mask")
        start = prefix_mask.sum(-1, keepdim=True)
        state = [conditioning.rows("state")] if self.state_in_suffix else []

        def velocity(actions: Tensor, time: Tensor) -> Tensor:
            embeddings, suffix_mask, blocks, condition = self.policy.model.embed_suffix(*state, actions, time)
            to_prefix = prefix_mask.unsqueeze(1).expand(-1, suffix_mask.shape[1], -1)
            mask = torch.cat([to_prefix, make_att_2d_masks(suffix_mask, blocks)], -1)
            (_, hidden), _ = self._experts.forward(
                attention_mask=prepare_attention_masks_4d(mask),
                position_ids=start + torch.cumsum(suffix_mask, dim=1) - 1,
                past_key_values=cache,
                inputs_embeds=[None, embeddings],
                use_cache=False,
                adarms_cond=[None, condition],
            )
            return self.policy.model.action_out_proj(hidden[:, -actions.shape[1] :].float())

        return velocity


class PI0Adapter(PiAdapter):
    """The state is a token of the action expert."""

    policy_type: ClassVar[str] = "pi0"
    state_in_suffix = True


class PI05Adapter(PiAdapter):
    """The prompt states the robot's state, in 256 bins."""

    policy_type: ClassVar[str] = "pi05"
    state_in_suffix = False
