"""A SmolVLA of 0.75 M weights: the real SmolVLM classes and processor, narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.tiny.parts import (
    Sizes,
    camera_features,
    make_config,
    save_policy,
    save_processor,
    word_tokenizer,
)


def build(folder: Path, **fields: Any) -> dict[str, Any]:
    """Save the policy; its backbone's config and processor lie in ``folder/vlm``."""
    vlm = make_vlm(folder / "vlm", weights=fields.get("load_vlm_weights", False))
    config = make_config(
        "smolvla",
        fields,
        **camera_features(),
        vlm_model_name=str(vlm),
        load_vlm_weights=False,
        num_vlm_layers=4,
        resize_imgs_with_padding=(64, 64),
        chunk_size=8,
        n_action_steps=4,
        max_state_dim=8,
        max_action_dim=6,
        num_steps=4,
        tokenizer_max_length=12,
    )
    save_policy(folder, config)
    return {"backbone": str(vlm)}


NARROW: Sizes = {
    "text": {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "vision": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    },
    "model": {"scale_factor": 2},
}


def make_vlm(folder: Path, sizes: Sizes = NARROW, weights: bool = False) -> Path:
    """Config and processor of a SmolVLM.

    Args:
        folder: where.
        sizes: fields of the text, vision and whole config.
        weights: save random weights too, for LeRobot to load.
    """
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    special = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tokenizer = word_tokenizer(folder, special)
    config = SmolVLMConfig(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0, **sizes["text"]},
        vision_config=sizes["vision"],
        image_token_id=5,
        **sizes["model"],
    )
    config.save_pretrained(folder)
    if weights:
        torch.manual_seed(0)
        SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    save_processor(folder, "SmolVLMProcessor", tokenizer, "SmolVLMImageProcessor", "SmolVLMVideoProcessor")
    return folder
