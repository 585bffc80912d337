"""An X-VLA of 0.3 M weights: the real Florence-2 classes and soft-prompted transformer, narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.tiny.parts import camera_features, save, statistics, word_tokenizer


def build(folder: Path, cameras: int = 2, **fields: Any) -> dict[str, Any]:
    """Save the policy; its tokenizer lies in ``folder/tokenizer``.

    Args:
        folder: where.
        cameras: number of cameras.
        fields: fields of ``XVLAConfig`` that shall differ; ``ee6d`` has states and actions of 20 entries.
    """
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.xvla.configuration_xvla import XVLAConfig
    from lerobot.policies.xvla.modeling_xvla import XVLAPolicy

    tokenizer = word_tokenizer(folder / "tokenizer")
    values: dict[str, Any] = {
        "device": "cpu",
        "push_to_hub": False,
        "florence_config": florence(NARROW, len(tokenizer)),
        "tokenizer_name": str(folder / "tokenizer"),
        "tokenizer_max_length": 12,
        "hidden_size": NARROW["text"]["d_model"],
        "depth": 2,
        "num_heads": 2,
        "num_domains": 3,
        "len_soft_prompts": 2,
        "dim_time": 8,
        "max_len_seq": 64,
        "action_mode": "auto",
        "max_state_dim": 8,
        "max_action_dim": 6,
        "chunk_size": 8,
        "n_action_steps": 4,
        "num_denoising_steps": 3,
    }
    values.update(fields)
    sizes = {"state_dim": 20, "action_dim": 20} if values["action_mode"] == "ee6d" else {}
    features = camera_features(cameras, size=64, **sizes)
    # X-VLA's image steps look for keys below this prefix and leave any other image as it is.
    renamed = {"observation.image": "observation.images.camera1"}
    features["input_features"] = {
        renamed.get(key, key): feature for key, feature in features["input_features"].items()
    }
    values["max_state_dim"] = max(values["max_state_dim"], sizes.get("state_dim", 0))
    config = XVLAConfig(**{**features, **values})
    torch.manual_seed(0)
    policy = XVLAPolicy(config)
    save(folder, policy, *make_pre_post_processors(config, dataset_stats=statistics(config)))
    return {"tokenizer": str(folder / "tokenizer")}


NARROW: dict[str, dict[str, Any]] = {
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


def florence(sizes: dict[str, dict[str, Any]], words: int) -> dict[str, Any]:
    """Config of a Florence-2, as X-VLA's config holds it.

    Args:
        sizes: fields of the vision and text configs.
        words: size of the vocabulary.
    """
    text = {
        "model_type": "bart",
        "vocab_size": words,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        **sizes["text"],
    }
    vision = {**sizes["vision"], "projection_dim": text["d_model"]}
    return {"vision_config": vision, "text_config": text, "pad_token_id": 0, "image_token_id": 1}
