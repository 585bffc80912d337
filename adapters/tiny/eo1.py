"""An EO-1 of 0.1 M weights: the real Qwen2.5-VL and its whole processor, narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.tiny._qwen3 import CHAT_TEMPLATE, SPECIAL
from trimtab.adapters.tiny.parts import camera_features, save, statistics, word_tokenizer


def build(folder: Path, **fields: Any) -> dict[str, Any]:
    """Save the policy; the processor of its backbone lies in ``folder/qwen``."""
    from lerobot.policies.eo1.configuration_eo1 import EO1Config
    from lerobot.policies.eo1.modeling_eo1 import EO1Policy
    from lerobot.policies.factory import make_pre_post_processors

    backbone = folder / "qwen"
    values: dict[str, Any] = {
        **camera_features(cameras=2),
        "device": "cpu",
        "push_to_hub": False,
        "pretrained_path": str(folder),  # else LeRobot fetches the backbone's weights
        "vlm_base": str(backbone),
        "vlm_config": make_qwen2_5(backbone),
        "image_min_pixels": 4 * 28 * 28,
        "image_max_pixels": 6 * 28 * 28,
        "chunk_size": 6,
        "n_action_steps": 4,
        "max_state_dim": 8,
        "max_action_dim": 6,
        "num_denoise_steps": 4,
    }
    config = EO1Config(**{**values, **fields})
    torch.manual_seed(0)
    policy = EO1Policy(config)
    save(folder, policy, *make_pre_post_processors(config, dataset_stats=statistics(config)))
    return {"backbone": str(backbone)}


NARROW: dict[str, dict[str, Any]] = {
    "text": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    },
    "vision": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "fullatt_block_indexes": [1],
    },
    "model": {},
}


def make_qwen2_5(folder: Path, sizes: dict[str, dict[str, Any]] = NARROW) -> dict[str, Any]:
    """Save config and processor of a Qwen2.5-VL without weights; return the config, as a dictionary.

    Args:
        folder: where.
        sizes: fields of the text, vision and whole config.
    """
    from lerobot.policies.eo1.processor_eo1 import EO1_SPECIAL_TOKENS
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = word_tokenizer(folder, SPECIAL)
    text = {"vocab_size": len(tokenizer) + len(EO1_SPECIAL_TOKENS), **sizes["text"]}
    vision = {**sizes["vision"], "out_hidden_size": text["hidden_size"]}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        dtype="float32",
        **{f"{name}_id": index for name, index in ids.items()},
        **sizes["model"],
    )
    config.save_pretrained(folder)
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return config.to_dict()
