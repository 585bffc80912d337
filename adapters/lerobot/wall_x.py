"""Adapter of LeRobot's ``wall_x`` policy (Qwen2.5-VL with an expert for action tokens, flow matching).

Noise: (chunk_size, max_action_dim), standard normal; the padded action dimensions are live too, for the
action head embeds them. LeRobot runs the whole language model at each step. Attention is causal, and the
action tokens, which see each other, come last: nothing before them depends on the noise. So ``encode`` runs
images, language and state once and keeps keys and values; ``denoise`` integrates the action tokens alone.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchdiffeq import odeint

from trimtab.adapters import Conditioning, PolicyConfig, policy_error
from trimtab.adapters.checkpoint.folder import backbone_folder
from trimtab.adapters.lerobot.vla import VLAAdapter, pooled, restore_prefix, store_prefix

STEPS = 10  # LeRobot's default; its config has no field for it


class WallXAdapter(VLAAdapter):
    """Features: mean of the prompt's tokens after the last layer, and the normalised, padded state."""

    policy_type: ClassVar[str] = "wall_x"
    takes_tokenizer = False
    backbone_fields = ("pretrained_name_or_path",)
    loads_backbone = True

    @classmethod
    def prepare_config(cls, config: Any, options: PolicyConfig) -> list[str]:
        if config.prediction_mode != "diffusion":
            raise policy_error(
                f"this wall_x policy writes action tokens (prediction_mode '{config.prediction_mode}') and "
                "draws no noise; one trained with prediction_mode 'diffusion' can be steered"
            )
        config.pretrained_name_or_path = str(backbone_folder(config.pretrained_name_or_path))
        config.num_inference_steps = options.num_inference_steps or STEPS
        return []

    def encode(self, batch: dict[str, Any]) -> Conditioning:
        model = self.policy.model
        inputs = self.policy.preprocess_inputs(batch)
        ids, grid, state = inputs["input_ids"], inputs["image_grid_thw"], inputs["proprioception"]
        positions, _ = model.get_rope_index(ids, grid, attention_mask=inputs["attention_mask"])
        action = ids == model.action_token_id_set["action_token_id"]
        # No prompt is longer than this; a shorter one is followed by action tokens, which are masked.
        length = ids.shape[1] - self.noise_spec.shape[0]
        mask = (inputs["attention_mask"].bool() & ~action)[:, :length]

        embeddings = model.model.embed_tokens(ids)
        images = model.visual(inputs["pixel_values"].to(model.visual.dtype), grid_thw=grid).pooler_output
        is_image = (ids == model.config.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(is_image, images.to(embeddings.dtype))
        states = model.action_preprocessor.proprioception_proj(
            state.to(embeddings.dtype), inputs["agent_pos_mask"].to(embeddings.dtype)
        )
        is_state = (ids == model.action_token_id_set["propri_token_id"]).unsqueeze(-1)
        # LeRobot rounds the state's embedding to bfloat16 whatever the model's precision.
        states = states.to(torch.bfloat16).to(embeddings.dtype)
        embeddings = embeddings.masked_scatter(is_state, states)

        output = model.model(
            inputs_embeds=embeddings[:, :length],
            attention_mask=mask.long(),
            position_ids=positions[:, :, :length],
            moe_token_types=torch.zeros_like(ids[:, :length]),
            use_cache=True,
        )
        tensors = {
            "features": torch.cat([pooled(output.last_hidden_state, mask), state.flatten(1).float()], -1),
            "mask": mask.long(),
            "positions": positions[:, action].unflatten(1, (len(ids), -1)).transpose(0, 1),
            "dof_mask": inputs["dof_mask"].float(),
        }
        return Conditioning({**tensors, **store_prefix(output.past_key_values)})

    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        model, head = self.policy.model.model, self.policy.model.action_preprocessor
        cache, dof_mask = restore_prefix(conditioning), conditioning.rows("dof_mask")
        mask, positions = conditioning.rows("mask"), conditioning.rows("positions").transpose(0, 1)
        action = torch.ones(noise.shape[:2], dtype=mask.dtype, device=mask.device)  # the action expert's type
        mask = torch.cat([mask, action], 1)

        def velocity(time: Tensor, actions: Tensor) -> Tensor:
            embeddings = head.step(time.expand(len(actions)), actions, dof_mask)
            hidden = model(
                inputs_embeds=embeddings.to(model.embed_tokens.weight.dtype),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                moe_token_types=action,
                use_cache=True,
            ).last_hidden_state
            return head.action_proj_back(hidden.to(head.action_proj_back.weight.dtype)).float()

        times = torch.linspace(0, 1, self.config.num_inference_steps + 1, device=noise.device)
        return self.executed(odeint(velocity, noise, times, method="euler")[-1])
