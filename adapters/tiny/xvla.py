"""An X-VLA of 0.3 M weights: the real Florence-2 classes and soft-prompted transformer, narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.adapters.tiny.parts import Sizes, camera_features, make_config, save_policy, word_tokenizer


def build(folder: Path, cameras: int = 2, **fields: Any) -> dict[str, Any]:
    """Save the policy; its tokenizer lies in ``folder/tokenizer``.

    Args:
        folder: where.
        cameras: number of cameras.
        fields: fields of ``XVLAConfig`` that shall differ; ``ee6d`` has states and actions of 20 entries.
    """
    tokenizer = folder / "tokenizer"
    words = len(word_tokenizer(tokenizer))
    ee6d = fields.get("action_mode") == "ee6d"
    sizes = {"state_dim": 20, "action_dim": 20} if ee6d else {}
    config = make_config(
        "xvla",
        fields,
        # X-VLA's image steps look for keys below this prefix and leave any other image as it is.
        **camera_features(cameras, single="observation.images.camera1", **sizes),
        florence_config=florence(NARROW, words),
        tokenizer_name=str(tokenizer),
        tokenizer_max_length=12,
        hidden_size=NARROW["text"]["d_model"],
        depth=2,
        num_heads=2,
        num_domains=3,
        len_soft_prompts=2,
        dim_time=8,
        max_len_seq=64,
        action_mode="auto",
        max_state_dim=20 if ee6d else 8,
        max_action_dim=6,
        chunk_size=8,
        n_action_steps=4,
        num_denoising_steps=3,
    )
    save_policy(folder, config)
    return {"tokenizer": str(tokenizer)}


NARROW: Sizes = {
    "vision": {
        "depths": [1, 1, 1, 1],
        "embed_dim": [8, 8, 16, 16],
        "num_heads": [1, 1, 2, 2],
        "num_groups": [1, 1, 2, 2],
        "window_size": 2,
        "max_position_embeddings": 4,
        "max_temporal_embeddings": 4,
    },
    "text": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 32,
    },
}


def florence(sizes: Sizes, words: int) -> dict[str, Any]:
    """Config of a Florence-2, as X-VLA's config holds it.

    Args:
        sizes: fields of the vision and text configs.
        words: size of the vocabulary.
    """
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    text = {"model_type": "bart", "vocab_size": words, **ids, **sizes["text"]}
    vision = {**sizes["vision"], "projection_dim": text["d_model"]}
    return {"vision_config": vision, "text_config": text, "pad_token_id": 0, "image_token_id": 1}
