"""An Evo-1 of 0.2 M weights: the real InternVL classes and action head, narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.tiny.parts import (
    TEXT,
    Sizes,
    camera_features,
    make_config,
    save_policy,
    word_tokenizer,
)

IMAGE_SIZE, WIDTH = 32, 32


def build(folder: Path, cameras: int = 2, **fields: Any) -> dict[str, Any]:
    """Save the policy; its backbone lies in ``folder/vlm``.

    Args:
        folder: where.
        cameras: number of cameras; the policy has room for three.
        fields: fields of ``Evo1Config`` that shall differ.
    """
    from transformers import InternVLModel

    torch.manual_seed(0)
    vlm = folder / "vlm"
    InternVLModel(make_vlm(vlm)).save_pretrained(vlm)  # LeRobot loads its weights, the adapter does not
    config = make_config(
        "evo1",
        fields,
        **camera_features(cameras, size=IMAGE_SIZE),
        use_amp=False,
        vlm_model_name=str(vlm),
        vlm_num_layers=2,
        vlm_dtype="float32",
        use_flash_attn=False,
        image_resolution=(IMAGE_SIZE, IMAGE_SIZE),
        max_text_length=64,
        max_state_dim=8,
        max_action_dim=6,
        chunk_size=8,
        n_action_steps=4,
        embed_dim=WIDTH,
        hidden_dim=48,
        state_hidden_dim=48,
        num_heads=2,
        num_layers=2,
        num_inference_timesteps=4,
    )
    save_policy(folder, config)
    return {"backbone": str(vlm)}


NARROW: Sizes = {
    "text": {**TEXT, "num_hidden_layers": 3},
    "vision": {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [IMAGE_SIZE, IMAGE_SIZE],
        "patch_size": [8, 8],
    },
}


def make_vlm(folder: Path, sizes: Sizes = NARROW) -> Any:
    """Save config and tokenizer of an InternVL without weights.

    Args:
        folder: where.
        sizes: fields of the text and vision configs.

    Returns:
        The ``InternVLConfig``.
    """
    from transformers import InternVLConfig

    special = {"start_image_token": "<img>", "end_image_token": "</img>", "image_token": "<IMG_CONTEXT>"}
    tokenizer = word_tokenizer(folder, special)
    side = sizes["vision"]["image_size"][0] // sizes["vision"]["patch_size"][0]
    config = InternVLConfig(
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), "pad_token_id": 0, **sizes["text"]},
        vision_config=sizes["vision"],
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(side // 2) ** 2,  # pixels are shuffled two by two
    )
    config.save_pretrained(folder)
    return config
