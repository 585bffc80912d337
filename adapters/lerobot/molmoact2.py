"""Adapter of LeRobot's ``molmoact2`` policy (Molmo with an action expert, flow matching).

Noise: (chunk_size, max_action_dim), standard normal; the policy zeroes the padded action dimensions before
and after every step, so they are inert. ``encode`` runs images, language and state (written as tokens)
through the VLM and projects its keys and values for the expert, once; ``denoise`` is LeRobot's own flow loop.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from lerobot.policies.molmoact2.modeling_molmoact2 import MolmoAct2Policy
from lerobot.policies.molmoact2.molmoact2_hf_model import modeling_molmoact2 as molmo
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from trimtab.adapters import Conditioning, NoiseSpec, PolicyAdapter, PolicyConfig, policy_error
from trimtab.adapters.checkpoint.folder import backbone_folder
from trimtab.adapters.lerobot.vla import pooled, restore_prefix, store_layers

PADDING = "action_dim_is_pad"


class _WithoutBackboneWeights(MolmoAct2Policy):
    """LeRobot's policy, its model built from the backbone's config: the checkpoint holds all weights."""

    def _load_hf_model(self) -> None:
        config = molmo.MolmoAct2Config.from_pretrained(self.config.checkpoint_path)
        dtype = getattr(torch, self.config.model_dtype)
        self.model = molmo.MolmoAct2ForConditionalGeneration._from_config(config, dtype=dtype)
        self._override_loaded_max_action_horizon(self.config.chunk_size)


class MolmoAct2Adapter(PolicyAdapter):
    """Features: mean of the VLM's prefix tokens, and the normalised state."""

    policy_type: ClassVar[str] = "molmoact2"
    takes_tokenizer = False
    backbone_fields = ("checkpoint_path",)
    steps_field = "num_inference_steps"
    dtype_field = "model_dtype"
    reads_task = True
    resizes_images = True

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        super().__init__(policy, preprocessor, postprocessor)
        config, self.backbone = policy.config, policy._backbone()
        self.expert = policy._action_expert()
        horizon, width = policy._generation_action_horizon(), self.backbone.config.max_action_dim
        action_dim = config.action_feature.shape[0]
        # The backbone's flag decides; LeRobot's own of that name serves training only.
        inert = self.backbone.config.mask_action_dim_padding
        live = (torch.arange(width) < (action_dim if inert else width)).expand(horizon, width).clone()
        self.noise_spec = NoiseSpec((horizon, width), live=live)
        self.chunk_shape = (config.n_action_steps, action_dim)
        # The first forward replaces the rotary buffer by its float32 value; better now than after a hash.
        self.backbone.transformer.prepare_rope_cache(device=self.device)

    @classmethod
    def prepare_config(cls, config: Any, options: PolicyConfig) -> list[str]:
        if "discrete" in (config.inference_action_mode, config.action_mode):
            raise policy_error(
                "this molmoact2 policy writes action tokens (mode 'discrete') and draws no noise; one "
                "trained with action_mode 'both' can be steered once its config.json says "
                "inference_action_mode 'continuous'"
            )
        config.inference_action_mode = "continuous"
        folder = backbone_folder(config.checkpoint_path, config.checkpoint_revision)
        config.checkpoint_path, config.checkpoint_force_download = str(folder), False
        return []

    @classmethod
    def build(cls, config: Any) -> Any:
        return _WithoutBackboneWeights(config)

    @classmethod
    def processor_overrides(cls, config: Any, options: PolicyConfig) -> dict[str, dict[str, Any]]:
        # Other modes load a tokenizer of actions, which is for training alone.
        pack = {
            "checkpoint_path": config.checkpoint_path,
            "checkpoint_force_download": False,
            "action_mode": "continuous",
        }
        return {"molmoact2_pack_inputs": pack}

    def _precision(self) -> AbstractContextManager:
        dtype = getattr(torch, self.config.model_dtype)
        if dtype == torch.float32 or self.device.type not in ("cuda", "cpu"):
            return nullcontext()
        return torch.autocast(self.device.type, dtype)

    def encode(self, batch: dict[str, Any]) -> Conditioning:
        backbone, inputs = self.backbone, self.policy._model_inputs(batch)
        ids = inputs["input_ids"]
        if (mask := inputs.get("attention_mask")) is not None:
            # LeRobot counts the padding on the left of shorter prompts, too: what an observation gives would
            # depend on the instructions beside it.
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        with self._precision():
            outputs = backbone(**inputs, use_cache=True)
            states = backbone._extract_kv_states(outputs.past_key_values)
            mask = backbone._get_encoder_attention_mask(ids, inputs.get("attention_mask"))
            gate, depth_mask = backbone._depth_gate_from_condition(
                input_ids=ids, encoder_attention_mask=mask, layer_kv_states=states
            )
            context = self.expert.prepare_context(
                encoder_kv_states=backbone._apply_depth_gate_to_layer_kv_states(states, depth_mask, gate),
                encoder_attention_mask=mask,
                batch_size=len(ids),
                seq_len=self.noise_spec.shape[0],
                device=ids.device,
                dtype=self.expert.action_embed.weight.dtype,
            )
        features = torch.cat([pooled(outputs.last_hidden_state, mask), batch[OBS_STATE].float()], -1)
        tensors = {"features": features, "cross_mask": context.cross_mask, PADDING: batch[PADDING]}
        return Conditioning({**tensors, **store_layers(context.kv_contexts)})

    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        backbone, expert, padding = self.backbone, self.expert, conditioning.rows(PADDING)
        horizon, dtype = self.noise_spec.shape[0], expert.action_embed.weight.dtype
        count, device = len(noise), noise.device
        steps = self.config.num_inference_steps or backbone.config.flow_matching_num_steps
        with self._precision():
            rope = expert.blocks[0].self_attn.rope
            context = molmo.ActionExpertContext(
                kv_contexts=restore_prefix(conditioning).layers,
                cross_mask=conditioning.rows("cross_mask"),
                self_mask=expert._build_self_attention_mask(None, horizon, device, dtype),
                valid_action=None,
                rope_cache=rope and rope.build_cache(seq_len=horizon, device=device, dtype=dtype),
            )
            times = [torch.full((count,), step / steps, device=device) for step in range(steps)]
            trajectory = backbone._mask_action_dim_tensor(
                noise.to(dtype), action_dim_is_pad=padding, enabled=backbone.config.mask_action_dim_padding
            )
            modulations = expert.prepare_modulation_cache(times)
            inputs = molmo._ActionFlowInputs(trajectory, context, modulations, padding)
            chunk = backbone._run_action_flow_loop(inputs, steps)
        return self.executed(chunk).float()
