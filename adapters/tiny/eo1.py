"""An EO-1 of 0.1 M weights: the real Qwen2.5-VL and its whole processor, narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.adapters.tiny._qwen3 import CHAT_TEMPLATE, SPECIAL
from trimtab.adapters.tiny.parts import (
    QWEN_VISION,
    TEXT,
    Sizes,
    camera_features,
    make_config,
    save_policy,
    save_processor,
    token_ids,
    word_tokenizer,
)


def build(folder: Path, **fields: Any) -> dict[str, Any]:
    """Save the policy; the processor of its backbone lies in ``folder/qwen``."""
    backbone = str(folder / "qwen")
    config = make_config(
        "eo1",
        fields,
        **camera_features(cameras=2),
        pretrained_path=str(folder),  # else LeRobot fetches the backbone's weights
        vlm_base=backbone,
        vlm_config=make_qwen2_5(Path(backbone)),
        image_min_pixels=4 * 28 * 28,
        image_max_pixels=6 * 28 * 28,
        chunk_size=6,
        n_action_steps=4,
        max_state_dim=8,
        max_action_dim=6,
        num_denoise_steps=4,
    )
    save_policy(folder, config)
    return {"backbone": backbone}


ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
NARROW: Sizes = {
    "text": {**TEXT, "rope_parameters": ROPE},
    "vision": {**QWEN_VISION, "fullatt_block_indexes": [1]},
    "model": {},
}


def make_qwen2_5(folder: Path, sizes: Sizes = NARROW) -> dict[str, Any]:
    """Save config and processor of a Qwen2.5-VL without weights; return the config, as a dictionary.

    Args:
        folder: where.
        sizes: fields of the text, vision and whole config.
    """
    from lerobot.policies.eo1.processor_eo1 import EO1_SPECIAL_TOKENS
    from transformers import Qwen2_5_VLConfig

    tokenizer = word_tokenizer(folder, SPECIAL)
    text = {"vocab_size": len(tokenizer) + len(EO1_SPECIAL_TOKENS), **sizes["text"]}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**sizes["vision"], "out_hidden_size": text["hidden_size"]},
        dtype="float32",
        **token_ids(tokenizer, SPECIAL),
        **sizes["model"],
    )
    config.save_pretrained(folder)
    processors = ("Qwen2VLImageProcessor", "Qwen2VLVideoProcessor")
    save_processor(folder, "Qwen2_5_VLProcessor", tokenizer, *processors, CHAT_TEMPLATE)
    return config.to_dict()
