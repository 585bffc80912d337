"""A MolmoAct2 of 0.15 M weights: LeRobot's own Molmo, image processor and action expert, narrow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.tiny.parts import (
    TEXT,
    Sizes,
    byte_tokenizer,
    camera_features,
    make_config,
    randomise,
    save_policy,
    token_ids,
    word_tokenizer,
)

IMAGE_TOKENS = {  # by the field of the model's config that holds their id
    "image_patch": "<im_patch>",
    "image_col": "<im_col>",
    "image_start_token": "<im_start>",
    "low_res_image_start_token": "<low_res_im_start>",
    "frame_start_token": "<frame_start>",
    "image_end_token": "<im_end>",
    "frame_end_token": "<frame_end>",
    "image_low_res": "<im_low>",
    "action_start_token": "<action_start>",
    "action_end_token": "<action_end>",
}
PLAIN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|image|>", "<|video|>", "<action_output>")
STATE_LEVELS = 16


def build(
    folder: Path, cameras: int = 1, model: dict[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    """Save the policy; its backbone's config, tokenizer and image processor lie in ``folder/backbone``.

    Args:
        folder: where.
        cameras: number of cameras.
        model: fields of the backbone's own config that shall differ.
        fields: fields of LeRobot's ``MolmoAct2Config`` that shall differ.
    """
    from lerobot.policies.molmoact2.molmoact2_hf_model.modeling_molmoact2 import (
        MolmoAct2ForConditionalGeneration,
    )

    backbone, fast = folder / "backbone", folder / "fast"
    hf_config = make_backbone(backbone, **(model or {}))
    torch.manual_seed(0)
    hf_model = MolmoAct2ForConditionalGeneration(hf_config)
    randomise(hf_model)
    hf_model.save_pretrained(backbone)
    (backbone / "configuration_molmoact2.py").unlink()  # the source of the config's class
    word_tokenizer(fast)
    config = make_config(
        "molmoact2",
        fields,
        **camera_features(cameras),
        checkpoint_path=str(backbone),
        discrete_action_tokenizer=str(fast),
        inference_action_mode="continuous",
        num_inference_steps=4,
        model_dtype="float32",
        chunk_size=8,
        n_action_steps=4,
        num_state_tokens=STATE_LEVELS,
        max_sequence_length=512,
    )
    save_policy(folder, config)
    (backbone / "model.safetensors").unlink()  # the policy holds these weights
    return {"backbone": str(backbone)}


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12}
NARROW: Sizes = {
    "vit": {
        **HEADS,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "image_default_input_size": (56, 56),
        "image_num_pos": 16,
    },
    "connector": {**HEADS, "vit_layers": (-1, -2), "hidden_size": 24, "intermediate_size": 32},
    "text": {
        **TEXT,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    },
    "expert": {"hidden_size": 32, "num_heads": 4, "ffn_multiple_of": 16, "timestep_embed_dim": 16},
}


def make_backbone(folder: Path, sizes: Sizes = NARROW, **fields: Any) -> Any:
    """Save config, tokenizer and image processor of a MolmoAct2 model without weights.

    Args:
        folder: where.
        sizes: fields of the configs of its parts.
        fields: fields of the whole config that shall differ.

    Returns:
        The model's own ``MolmoAct2Config``.
    """
    from lerobot.policies.molmoact2.molmoact2_hf_model import configuration_molmoact2 as configs

    edges = [f"<{kind}_{side}>" for kind in ("state", "setup", "control") for side in ("start", "end")]
    states = [f"<state_{level}>" for level in range(STATE_LEVELS)]
    tokens = [*IMAGE_TOKENS.values(), *PLAIN_TOKENS, *edges, *states]
    tokenizer = byte_tokenizer(folder, tokens)
    height, width = sizes["vit"]["image_default_input_size"]
    image = {"size": {"height": height, "width": width}, "patch_size": 14, "crop_mode": "resize"}
    processors = {"image_processor": image, "video_processor": {}}
    (folder / "processor_config.json").write_text(json.dumps(processors), encoding="utf-8")
    words = {"vocab_size": len(tokenizer) - len(tokens), "additional_vocab_size": len(tokens)}
    text = configs.MolmoAct2TextConfig(**{**words, **sizes["text"]})
    values = {"initializer_range": 0.2, "eos_token_id": tokenizer.eos_token_id}
    config = configs.MolmoAct2Config(
        configs.MolmoAct2VitConfig(**sizes["vit"]),
        configs.MolmoAct2AdapterConfig(**sizes["connector"], text_hidden_size=sizes["text"]["hidden_size"]),
        text,
        configs.MolmoAct2ActionExpertConfig(num_layers=text.num_hidden_layers, **sizes["expert"]),
        **{**values, **token_ids(tokenizer, IMAGE_TOKENS), **fields},
    )
    config.save_pretrained(folder)
    (folder / "configuration_molmoact2.py").unlink()  # transformers adds the source of the config's class
    return config
