"""Adapter of LeRobot's ``smolvla`` policy (a small VLM with an action expert, flow matching).

Noise: (chunk_size, max_action_dim), standard normal; the padded action dimensions are live too, for the
expert mixes them. ``encode`` runs vision, language and state through the VLM once; ``denoise`` integrates
the expert over the kept keys and values.
"""

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

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        super().__init__(policy, preprocessor, postprocessor)
        self._places: dict[torch.Size, Tensor] = {}  # of an image's patches, by its height and width

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
        experts = model.vlm_with_expert
        experts.embed_image = self._embed_image
        try:
            embeddings, pad_mask, attention = model.embed_prefix(
                *(images, image_masks, batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]),
                state=state,
            )
        finally:
            del experts.embed_image
        (hidden, _), cache = model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(pad_mask, attention),
            position_ids=torch.cumsum(pad_mask, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        features = torch.cat([pooled(hidden, pad_mask), state.float()], -1)
        return Conditioning({"features": features, "pad_mask": pad_mask, **store_prefix(cache)})

    def _embed_image(self, image: Tensor) -> Tensor:
        """LeRobot's ``embed_image`` of (B, 3, height, width).

        There, transformers places an image's patches by a mask, for which the host waits on a GPU. The places
        depend on the size alone: they are kept.
        """
        model = self.policy.model.vlm_with_expert.get_vlm_model()
        vision, pixels, size = model.vision_model, image.to(model.vision_model.dtype), image.shape[2:]
        embeddings = vision.embeddings
        if size not in self._places:
            whole = torch.ones(1, *(side // vision.patch_size for side in size), device=image.device)
            hook = embeddings.position_embedding.register_forward_pre_hook(
                lambda _, args: self._places.update({size: args[0]})
            )
            try:
                embeddings(pixels[:1], whole.bool())
            finally:
                hook.remove()
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        hidden = patches + embeddings.position_embedding(self._places[size])
        hidden = vision.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        return model.connector(vision.post_layernorm(hidden))

    @property
    def inverts(self) -> bool:  # type: ignore[override]
        return not self.config.adapt_to_pi_aloha  # which makes other actions of them

    def velocity(self, conditioning: Conditioning) -> Velocity:
        cache, pad_mask = restore_prefix(conditioning), conditioning.rows("pad_mask")
        return lambda x, time: self.policy.model.denoise_step(pad_mask, cache, x, time)

    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        chunk = super().denoise(conditioning, noise)
        return self.policy._pi_aloha_encode_actions(chunk) if self.config.adapt_to_pi_aloha else chunk
