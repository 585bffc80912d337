"""Adapter of LeRobot's ``eo1`` policy: Qwen2.5-VL turns a span of noisy action tokens into actions.

Noise: (chunk_size, max_action_dim), standard normal. Attention is causal within the span too, so the rows
after the executed steps are inert; the padded action dimensions are live. ``encode`` runs all that stands
before the span (images, task, state) through Qwen once. LeRobot's ``sample_actions`` does so for every noise,
hence a loop of its own here.
"""

from typing import Any, ClassVar

import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from trimtab.adapters import Conditioning, NoiseSpec, PolicyConfig
from trimtab.adapters.lerobot.inversion import Velocity
from trimtab.adapters.lerobot.vla import FlowAdapter, pooled, restore_prefix, store_prefix


class EO1Adapter(FlowAdapter):
    """Features: mean of Qwen's hidden states before the action span, and the normalised, padded state."""

    policy_type: ClassVar[str] = "eo1"
    backbone_fields = ("vlm_base",)
    steps_field = "num_denoise_steps"
    tokenizer_step = ("eo1_qwen_processor", "processor_name")

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        super().__init__(policy, preprocessor, postprocessor)
        live = torch.ones(self.noise_spec.shape, dtype=torch.bool)
        live[policy.config.n_action_steps :] = False
        self.noise_spec = NoiseSpec(self.noise_spec.shape, live=live)

    @classmethod
    def prepare_config(cls, config: Any, options: PolicyConfig) -> list[str]:
        from transformers.utils import is_flash_attn_2_available

        if config.attn_implementation != "flash_attention_2" or is_flash_attn_2_available():
            return []
        config.attn_implementation = None
        return ["flash_attention_2 is not available here: attention as PyTorch has it"]

    def encode(self, batch: dict[str, Any]) -> Conditioning:
        model, qwen = self.policy.model, self.policy.model.vlm_backbone.model
        state = self.policy.prepare_state(batch[OBS_STATE])
        tokens, mask, types = batch["input_ids"], batch["attention_mask"], batch["mm_token_type_ids"]
        span = self._action_span(tokens == batch["action_token_id"])
        position_ids, _ = qwen.get_rope_index(
            tokens, image_grid_thw=batch["image_grid_thw"], attention_mask=mask, mm_token_type_ids=types
        )
        before = slice(span.start)
        ids = {name: batch[name] for name in ("state_token_id", "action_token_id")}
        outputs = qwen(
            input_ids=tokens[:, before],
            attention_mask=mask[:, before],
            position_ids=position_ids[..., before],
            inputs_embeds=model.embed_prefix(tokens, state, **ids)[:, before],
            pixel_values=batch["pixel_values"],
            image_grid_thw=batch["image_grid_thw"],
            mm_token_type_ids=types[:, before],
            use_cache=True,
        )
        small = {
            "mask": mask[:, : span.stop],
            "positions": position_ids[..., span].transpose(0, 1),
            "features": torch.cat([pooled(outputs.last_hidden_state, mask[:, before]), state.float()], -1),
        }
        return Conditioning({**small, **store_prefix(outputs.past_key_values)})

    def _action_span(self, is_action: Tensor) -> slice:
        """Where the action tokens stand; padding on the left puts them at the same place in every row."""
        size = self.config.chunk_size
        start = int(is_action[0].to(torch.int64).argmax())
        span = slice(start, start + size)
        if not is_action[:, span].all() or int(is_action.sum()) != len(is_action) * size:
            raise ValueError(
                f"the prompt must hold one span of {size} action tokens, at the same place in every row"
            )
        return span

    def velocity(self, conditioning: Conditioning) -> Velocity:
        model, qwen = self.policy.model, self.policy.model.vlm_backbone.model
        cache, mask = restore_prefix(conditioning), conditioning.rows("mask")
        position_ids = conditioning.rows("positions").transpose(0, 1)
        dtype = qwen.get_input_embeddings().weight.dtype

        def velocity(actions: Tensor, time: Tensor) -> Tensor:
            hidden = qwen(
                attention_mask=mask,
                past_key_values=cache,
                inputs_embeds=model.embed_suffix(time, actions).to(dtype),
                position_ids=position_ids,
                use_cache=True,
            ).last_hidden_state
            with model.flow_head_autocast_context():
                return model.action_out_proj(hidden.to(model.action_out_proj.dtype)).to(actions.dtype)

        return velocity
