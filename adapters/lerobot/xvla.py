"""Adapter of LeRobot's ``xvla`` policy (Florence-2 and a soft-prompted transformer).

Noise: (chunk_size, dim_action), standard normal; ``dim_action`` belongs to the policy's action space, padding
included. The padded dimensions are live; what the action space zeroes before every step (the grippers of
``ee6d`` and ``joint``) is inert. The policy predicts the clean chunk and mixes it with the same noise again
at each step, so this is no integration of an ODE, but it is deterministic given the noise all the same.
``encode`` runs vision and language through Florence-2 once; the transformer reads its tokens at every step.
"""

from typing import Any, ClassVar

import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK
from torch import Tensor

from trimtab.adapters import Conditioning, NoiseSpec, PolicyAdapter
from trimtab.adapters.lerobot.injection import injected
from trimtab.adapters.lerobot.vla import refuse_lengths

SHARED = "model.vlm.language_model.shared.weight"
EMBEDDING = "model.vlm.language_model.encoder.embed_tokens.weight"


class _Encoded:
    """The model with its VLM's answer at hand, so that LeRobot's own sampling loop runs on a kept one."""

    def __init__(self, model: Any, tokens: dict[str, Tensor]) -> None:
        self._model, self._tokens = model, tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward_vlm(self, *inputs: Any) -> dict[str, Tensor]:
        return self._tokens


class XVLAAdapter(PolicyAdapter):
    """Features: means of Florence-2's tokens and of the further cameras' tokens, and the padded state."""

    policy_type: ClassVar[str] = "xvla"
    steps_field = "num_denoising_steps"
    dtypes = ("float32", "bfloat16")
    reads_task = True
    fills_missing_cameras = True
    brightest = 2.7  # in LIBERO, LeRobot normalises its images by ImageNet's statistics before it sees them

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        super().__init__(policy, preprocessor, postprocessor)
        config, model = policy.config, policy.model
        space, shape = model.action_space, (config.chunk_size, model.dim_action)
        # The action space says itself which entries reach the transformer and how wide its actions are.
        _, seen = space.preprocess(torch.zeros(1, model.dim_proprio), torch.ones(1, *shape))
        live = seen[0] != 0
        self.noise_spec = NoiseSpec(shape, live=live)
        width = space.postprocess(torch.zeros(1, *shape)).shape[-1]
        self.chunk_shape = (config.n_action_steps, width)
        self.resizes_images = config.resize_imgs_with_padding is not None

    @classmethod
    def prepare_weights(cls, saved: dict[str, Tensor], policy: Any) -> dict[str, Tensor]:
        from lerobot.policies.xvla import modeling_xvla

        if modeling_xvla._is_vendored_florence_state_dict(saved):
            saved = modeling_xvla._remap_vendored_florence_state_dict(saved)
        aliases = {SHARED: EMBEDDING, EMBEDDING: SHARED}  # one tensor, of which a file may hold either name
        return {**{name: saved[other] for name, other in aliases.items() if other in saved}, **saved}

    def encode(self, batch: dict[str, Any]) -> Conditioning:
        model = self.policy.model
        if self.config.pad_language_to == "longest":
            refuse_lengths(self.policy_type, batch[OBS_LANGUAGE_ATTENTION_MASK])
        inputs = self.policy._build_model_inputs(batch)
        tokens = model.forward_vlm(
            inputs["input_ids"], inputs["image_input"].to(model._get_target_dtype()), inputs["image_mask"]
        )
        means = [entry.float().mean(1) for entry in tokens.values() if entry.shape[1]]
        features = torch.cat([*means, inputs["proprio"].float()], -1)
        return Conditioning(
            {"features": features, **tokens, "domain_id": inputs["domain_id"], "proprio": inputs["proprio"]}
        )

    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        model = self.policy.model
        tokens = {name: conditioning.rows(name) for name in ("vlm_features", "aux_visual_inputs")}
        domain, state = conditioning.rows("domain_id"), conditioning.rows("proprio")
        with injected(self, noise):
            # Only the VLM reads token ids and images: the loop takes a length and a dtype from what stands
            # in for them.
            chunk = type(model).generate_actions(
                _Encoded(model, tokens),
                input_ids=domain,
                image_input=state,
                image_mask=None,
                domain_id=domain,
                proprio=state,
                steps=self.config.num_denoising_steps,
            )
        return self.executed(chunk).float()
