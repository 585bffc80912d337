"""A Wall-X of 0.1 M weights: the real Qwen2.5-VL with experts, its processor and action head, narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.adapters.tiny._qwen3 import SPECIAL, WIDE_START
from trimtab.adapters.tiny.parts import (
    QWEN_VISION,
    TEXT,
    Sizes,
    byte_tokenizer,
    camera_features,
    make_config,
    save_policy,
    save_processor,
    token_ids,
)

TOKENS = ("<|im_start|>", "<|im_end|>", *SPECIAL.values(), "<|propri|>", "<|action|>", "<|action_fast|>")


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
    from trimtab.adapters.lerobot.wall_x import WallXAdapter

    backbone = folder / "backbone"
    config = make_config(
        "wall_x",
        fields,
        **camera_features(cameras),
        pretrained_name_or_path=str(backbone),
        chunk_size=6,
        n_action_steps=4,
        max_state_dim=8,
        max_action_dim=6,
    )
    make_backbone(backbone, padding_side, config.max_action_dim, config.max_state_dim)
    save_policy(folder, config, WallXAdapter.build, no_zeros=True)
    return {"backbone": str(backbone), "dtype": dtype}


NARROW: Sizes = {
    "text": {
        **TEXT,
        **WIDE_START,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "experts": [{"hidden_size": 32, "intermediate_size": 48, "hidden_act": "silu"}] * 2,
    },
    "vision": {**QWEN_VISION, **WIDE_START, "fullatt_block_indexes": [1]},
    "model": {"tie_word_embeddings": False},
}


def make_backbone(
    folder: Path, padding_side: str, action_dim: int, state_dim: int, sizes: Sizes = NARROW
) -> None:
    """Save config and processor of a Wall-X model, without weights.

    Args:
        folder: where.
        padding_side: where the tokenizer pads shorter texts.
        action_dim: width of an action, padding included.
        state_dim: width of a state, padding included.
        sizes: fields of the text, vision and whole config.
    """
    from lerobot.policies.wall_x.qwen_model import Qwen2_5_VLConfig

    tokenizer = byte_tokenizer(folder, TOKENS, padding_side)
    width, experts = sizes["text"]["hidden_size"], sizes["text"]["experts"]
    text = {
        "vocab_size": len(tokenizer),
        "mlp_moe": True,
        "num_experts": len(experts),
        "dim_inputs": [width] * len(experts),
        "dof_config": {"arm": action_dim},
        **sizes["text"],
    }
    Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**sizes["vision"], "out_hidden_size": width},
        agent_pos_config={"arm": state_dim},
        **sizes["model"],
        **token_ids(tokenizer, SPECIAL),
    ).save_pretrained(folder)
    processors = ("Qwen2VLImageProcessor", "Qwen2VLVideoProcessor")
    save_processor(folder, "Qwen2_5_VLProcessor", tokenizer, *processors)
