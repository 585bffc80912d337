"""Adapter of LeRobot's ``groot`` policy (NVIDIA GR00T N1.7: Qwen3-VL and a flow-matching DiT).

Noise: (action_horizon, max_action_dim) of the GR00T checkpoint's config, standard normal; all of it is
live, for the DiT encodes the padded dimensions too. ``encode`` runs backbone, VL projector and state encoder
once; ``denoise`` runs LeRobot's own loop on those features, its single draw replaced.
"""

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config
from lerobot.policies.groot.modeling_groot import GrootPolicy
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature

from trimtab.adapters import Conditioning, NoiseSpec, PolicyAdapter, PolicyConfig, UserError
from trimtab.adapters.base import steps_with
from trimtab.adapters.checkpoint.files import BACKBONE
from trimtab.adapters.errors import reason
from trimtab.adapters.lerobot.injection import injected
from trimtab.adapters.lerobot.vla import pooled, refuse_lengths

ENCODE_STEP = "groot_n1_7_vlm_encode_v1"  # LeRobot's name of the step that tokenizes
TOKENS = ("backbone_features", "backbone_attention_mask", "image_mask")  # one entry per token of the prompt
RAW_STATE = "raw_state."  # prefix of the state groups that native relative actions are added to


class _UnloadedGrootPolicy(GrootPolicy):
    """A ``GrootPolicy`` that reads the base model's config but not its 6 GB of weights.

    A LeRobot checkpoint holds every weight; LeRobot loads the base model's first and replaces them.
    """

    def _create_groot_model(self) -> GR00TN17:
        config, names = self.config, ("num_inference_timesteps", "use_flash_attention")
        asked = {name: value for name in names if (value := getattr(config, name)) is not None}
        base = GR00TN17Config.from_pretrained(config.base_model_path, **asked)
        dtype = {"dtype": torch.float32} if config.model_params_fp32 else {}
        model = GR00TN17._from_config(base, load_backbone_weights=False, **dtype)
        if config.model_params_fp32:  # the backbone's own config may say otherwise
            self._cast_model_parameters_to_fp32(model)
        return model


class GrootAdapter(PolicyAdapter):
    """Features: mean of the projected backbone tokens, and the normalised, padded state."""

    policy_type: ClassVar[str] = "groot"
    # The name stays as saved unless asked: LeRobot reads the horizon from the sidecars of a folder.
    backbone_fields = ("base_model_path",)
    steps_field = "num_inference_timesteps"
    reads_task = True
    resizes_images = True

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        super().__init__(policy, preprocessor, postprocessor)
        head = policy._groot_model.action_head
        self.noise_spec = NoiseSpec((head.action_horizon, head.action_dim))
        # What `predict_action_chunk` returns of the head's horizon, and `select_action` executes of that.
        predicted = policy._resolve_prediction_horizon(torch.empty(1, head.action_horizon, head.action_dim))
        steps = min(predicted, policy._action_queue_steps)
        self.chunk_shape = (steps, policy.config.output_features["action"].shape[0])

    @classmethod
    def build(cls, config: Any) -> GrootPolicy:
        try:
            return _UnloadedGrootPolicy(config)
        except OSError as error:
            raise UserError(
                BACKBONE,
                f"the config of the GR00T model {config.base_model_path} cannot be read; name a folder that "
                f"holds its config.json ({reason(error)})",
            ) from error

    @classmethod
    def processor_overrides(cls, config: Any, options: PolicyConfig) -> dict[str, dict[str, Any]]:
        step = {"device": config.device}  # LeRobot's own override of the device leaves this step out
        if options.tokenizer:
            step["model_name"] = options.tokenizer
        return {ENCODE_STEP: step}

    def cameras_used(self, given: Collection[str]) -> set[str]:
        """Those that the checkpoint names; all there are where it names none of these."""
        for step in steps_with("_ordered_image_keys", self.preprocessor):
            return set(step._ordered_image_keys(dict.fromkeys(given)))
        return super().cameras_used(given)

    @property
    def relative_actions(self) -> bool:
        return self._relative_pack_step() is not None or super().relative_actions

    def _relative_pack_step(self) -> Any:
        """The preprocessor's step that holds the state which native relative actions are added to."""
        steps = steps_with("use_relative_action", self.postprocessor)
        return next((step.pack_step for step in steps if step.use_relative_action), None)

    def observe(
        self, observation: dict[str, Any], before: tuple[Conditioning, Tensor] | None = None
    ) -> Conditioning:
        """As the base class, with the raw state for checkpoints with native relative actions."""
        conditioning = super().observe(observation, before)
        pack = self._relative_pack_step()
        if pack is not None:
            for name, value in pack.get_cached_raw_state().items():
                conditioning.tensors[RAW_STATE + name] = torch.from_numpy(value)
        return conditioning

    def postprocess(self, chunk: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        """As the base class; with native relative actions, for the state in ``conditioning``."""
        pack = self._relative_pack_step()
        if pack is not None and conditioning is not None:
            names = [name for name in conditioning.tensors if name.startswith(RAW_STATE)]
            if names:
                pack._last_raw_state = {
                    name.removeprefix(RAW_STATE): conditioning.rows(name).numpy() for name in names
                }
        return super().postprocess(chunk, conditioning)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.policy.config.use_bf16)

    def encode(self, batch: dict[str, Any]) -> Conditioning:
        inputs = self.policy._filter_groot_inputs(batch, include_action=False)
        lengths = inputs["attention_mask"].sum(1)
        head = self.policy._groot_model.action_head
        if not head.config.use_alternate_vl_dit:  # LeRobot's plain DiT takes no mask
            refuse_lengths(self.policy_type, inputs["attention_mask"])
        if len(lengths.unique()) == 1:
            return Conditioning(self._encode(inputs))
        # LeRobot's projector attends to the padding of shorter instructions: what an observation gives would
        # depend on its neighbours. Those of one length go together, and the padding is put back after.
        parts, order = [], []
        for length in lengths.unique().tolist():
            rows = torch.nonzero(lengths == length).flatten()
            part = self._encode(_take(inputs, rows, length))
            missing = int(lengths.max()) - length
            for name in TOKENS:
                value = part[name]
                part[name] = torch.cat([value.new_zeros(len(value), missing, *value.shape[2:]), value], 1)
            parts.append(part)
            order.append(rows)
        back = torch.cat(order).argsort()
        return Conditioning({name: torch.cat([part[name] for part in parts])[back] for name in parts[0]})

    def _encode(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        model = self.policy._groot_model
        with self._autocast():
            inputs, action_inputs = model.prepare_input(inputs)
            output = model.backbone(inputs)
            encoded = model.action_head._encode_features(output, action_inputs)
        tokens, mask = encoded["backbone_features"], output["backbone_attention_mask"]
        return {
            "backbone_features": tokens,
            "state_features": encoded["state_features"],
            "embodiment_id": action_inputs["embodiment_id"],
            "backbone_attention_mask": mask,
            "image_mask": output["image_mask"],
            "features": torch.cat([pooled(tokens, mask), action_inputs["state"].flatten(1).float()], -1),
        }

    def denoise(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        masks = {name: conditioning.rows(name) for name in ("backbone_attention_mask", "image_mask")}
        inputs = {
            name: conditioning.rows(name) for name in ("backbone_features", "state_features", "embodiment_id")
        }
        with self._autocast(), injected(self, noise):
            output = self.policy._groot_model.action_head.get_action_with_features(
                **inputs, backbone_output=BatchFeature(masks), action_input=BatchFeature({})
            )
        return self.executed(output["action_pred"])


def _take(inputs: dict[str, Tensor], rows: Tensor, length: int) -> dict[str, Tensor]:
    """The observations ``rows``, of ``length`` tokens each, without the padding on their left."""
    total, taken = len(inputs["attention_mask"]), {}
    for name, value in inputs.items():
        if name in ("pixel_values", "image_grid_thw"):  # as many images, of one size, in each observation
            taken[name] = value.unflatten(0, (total, -1))[rows].flatten(0, 1)
        elif name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            taken[name] = value[rows, -length:]
        else:
            taken[name] = value[rows]
    return taken
