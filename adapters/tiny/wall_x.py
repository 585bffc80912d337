"""A Wall-X of 0.1 M weights: the real Qwen2.5-VL with experts, its processor and action head, narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.tiny.parts import byte_tokenizer, camera_features, randomise, save, statistics

TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|propri|>",
    "<|action|>",
    "<|action_fast|>",
)


def build(
    folder: Path,
    cameras: int = 1,
    padding_side: str = "left",
    dtype: str | None = "float32",
    **fields: Any,
) -> dict[str, Any]:
    """Save the policy; its backbone's config and processor lie in ``folder/backbone``.

    Args:
        folder: where.
        cameras: number of cameras.
        padding_side: where the tokenizer pads shorter texts.
        dtype: precision to load the policy with; ``None`` for LeRobot's own mix of bfloat16 and float32.
        fields: fields of ``WallXConfig`` that shall differ.
    """
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.wall_x.configuration_wall_x import WallXConfig

    from trimtab.adapters.lerobot.wall_x import WallXAdapter

    values: dict[str, Any] = {
        **camera_features(cameras),
        "device": "cpu",
        "push_to_hub": False,
        "chunk_size": 6,
        "n_action_steps": 4,
        "max_state_dim": 8,
        "max_action_dim": 6,
    }
    config = WallXConfig(**{**values, **fields})
    backbone = make_backbone(folder / "backbone", padding_side, config.max_action_dim, config.max_state_dim)
    config.pretrained_name_or_path = str(backbone)
    torch.manual_seed(0)
    policy = WallXAdapter.build(config)
    randomise(policy)
    save(folder, policy, *make_pre_post_processors(config, dataset_stats=statistics(config)))
    return {"backbone": str(backbone), "dtype": dtype}


NARROW: dict[str, dict[str, Any]] = {
    "text": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "initializer_range": 0.2,
        "experts": [{"hidden_size": 32, "intermediate_size": 48, "hidden_act": "silu"}] * 2,
    },
    "vision": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 2,
        "num_heads": 2,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    },
    "model": {"tie_word_embeddings": False},
}


def make_backbone(
    folder: Path,
    padding_side: str,
    action_dim: int,
    state_dim: int,
    sizes: dict[str, dict[str, Any]] = NARROW,
) -> Path:
    """Config and processor of a Wall-X model, without weights.

    Args:
        folder: where.
        padding_side: where the tokenizer pads shorter texts.
        action_dim: width of an action, padding included.
        state_dim: width of a state, padding included.
        sizes: fields of the text, vision and whole config.
    """
    from lerobot.policies.wall_x.qwen_model import Qwen2_5_VLConfig
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = byte_tokenizer(folder, TOKENS, padding_side=padding_side)
    width, experts = sizes["text"]["hidden_size"], sizes["text"]["experts"]
    text = {
        "vocab_size": len(tokenizer),
        "mlp_moe": True,
        "num_experts": len(experts),
        "dim_inputs": [width] * len(experts),
        "dof_config": {"arm": action_dim},
        **sizes["text"],
    }
    vision = {**sizes["vision"], "out_hidden_size": width}
    ids = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        agent_pos_config={"arm": state_dim},
        **sizes["model"],
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
    ).save_pretrained(folder)
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template="{{ messages }}",
    ).save_pretrained(folder)
    return folder
