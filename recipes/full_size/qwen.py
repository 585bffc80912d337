"""Policies on one of Qwen's vision-language models: eo1, wall_x, groot, vla_jepa."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from trimtab.adapters.tiny.parts import camera_features
from trimtab.recipes.full_size.common import CAMERA, Built, Sizes, assemble_weightless, make_config

# Qwen/Qwen2.5-VL-3B-Instruct, by its published config.
QWEN2_5_VL_3B: Sizes = {
    "text": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "model": {"tie_word_embeddings": True},
}

# Qwen/Qwen3-VL-2B-Instruct, by its published config; nvidia/Cosmos-Reason2-2B was trained from it.
QWEN3_VL_2B: Sizes = {
    "text": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    },
    "vision": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17],
    },
    "pixels": {"shortest_edge": 2**16, "longest_edge": 2**24},
}

# The second expert of Wall-X, for action tokens: workspace/models_config/qwen2_5_moe_flash.json in
# X-Square-Robot/wall-x; the first has the sizes of Qwen2.5-VL-3B.
WALL_X_EXPERTS = [
    {"hidden_size": 2048, "intermediate_size": size, "hidden_act": "silu"} for size in (11008, 2048)
]


def eo1(device: str, cameras: int) -> Built:
    """LeRobot's default head on Qwen2.5-VL-3B, as the config's ``vlm_base`` says."""
    from trimtab.adapters.tiny.eo1 import make_qwen2_5

    with tempfile.TemporaryDirectory() as folder:
        features = camera_features(cameras, CAMERA, state_dim=14, action_dim=14)
        model = make_qwen2_5(Path(folder), QWEN2_5_VL_3B)
        config = make_config("eo1", features, pretrained_path=folder, vlm_base=folder, vlm_config=model)
        return assemble_weightless(config)


def wall_x(device: str, cameras: int) -> Built:
    """x-square-robot/wall-oss-flow, with LeRobot's default head."""
    from trimtab.adapters.tiny.wall_x import make_backbone

    sizes = {**QWEN2_5_VL_3B, "text": {**QWEN2_5_VL_3B["text"], "experts": WALL_X_EXPERTS}}
    features = camera_features(cameras, CAMERA, state_dim=14, action_dim=14)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config("wall_x", features, pretrained_name_or_path=folder)
        make_backbone(Path(folder), "left", config.max_action_dim, config.max_state_dim, sizes)
        return assemble_weightless(config, words=QWEN2_5_VL_3B["text"]["vocab_size"])


def groot(device: str, cameras: int) -> Built:
    """GR00T N1.7 with the sizes that LeRobot gives as its defaults, on Cosmos-Reason2-2B."""
    from lerobot.policies.groot.groot_n1_7 import GR00TN17Config

    from trimtab.adapters.tiny._qwen3 import make_qwen3

    with tempfile.TemporaryDirectory() as folder:
        base, qwen = Path(folder) / "gr00t", Path(folder) / "Qwen" / "Qwen3-VL-2B"
        make_qwen3(qwen, QWEN3_VL_2B)
        GR00TN17Config(model_name=str(qwen)).save_pretrained(base)
        features = camera_features(cameras, CAMERA, state_dim=14, action_dim=14)

        def local(preprocessor: Any) -> None:
            for step in preprocessor.steps:
                if hasattr(step, "image_target_size"):
                    step.model_name = str(qwen)  # else NVIDIA's on the Hub

        return assemble_weightless(make_config("groot", features, base_model_path=str(base)), local)


def vla_jepa(device: str, cameras: int) -> Built:
    """LeRobot's default sizes on LIBERO's 7 actions; it does not shrink the images."""
    from trimtab.adapters.tiny._qwen3 import make_qwen3

    with tempfile.TemporaryDirectory() as folder:
        make_qwen3(Path(folder), QWEN3_VL_2B)
        features = camera_features(cameras, CAMERA, state_dim=8, action_dim=7)
        return assemble_weightless(make_config("vla_jepa", features, qwen_model_name=folder))
