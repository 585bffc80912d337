"""Policies on other vision-language models: evo1, molmoact2, multi_task_dit, xvla."""

from __future__ import annotations

import tempfile
from pathlib import Path

from trimtab.adapters.tiny.parts import camera_features, word_tokenizer
from trimtab.recipes.full_size.common import CAMERA, Built, Sizes, assemble_weightless, make_config

# OpenGVLab/InternVL3-1B-hf, by its published config: Qwen2.5-0.5B and InternViT-300M.
INTERNVL3_1B: Sizes = {
    "text": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151674,
    },
    "vision": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": [448, 448],
        "patch_size": [14, 14],
    },
}

# allenai/Molmo2-4B, by its published config (Qwen3-4B and SigLIP 2): MolmoAct2's backbone has its sizes. The
# action expert has one block per layer; its other sizes are those that two ports of the released
# checkpoint give as defaults (LeRobot's code holds sizes of another model).
VIT_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72}
MOLMOACT2: Sizes = {
    "vit": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "image_default_input_size": (378, 378),
        "image_num_pos": 729,
        **VIT_HEADS,
    },
    "connector": {
        "vit_layers": (-3, -9),
        "hidden_size": 1152,
        "intermediate_size": 9728,
        "pooling_attention_mask": True,
        **VIT_HEADS,
    },
    "text": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "additional_vocab_size": 128,
        "qkv_bias": False,
        "use_qk_norm": True,
        "qk_norm_type": "qwen3",
        "max_position_embeddings": 36864,
    },
    "expert": {"hidden_size": 768, "num_heads": 8, "mlp_ratio": 4.0},
}

# openai/clip-vit-base-patch16, by its published config.
CLIP_B16: Sizes = {
    "text": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "projection_dim": 512,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
    },
    "vision": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 512,
        "image_size": 224,
        "patch_size": 16,
    },
}

# microsoft/Florence-2-large, by its published config.
FLORENCE_2_LARGE: Sizes = {
    "vision": {
        "depths": [1, 1, 9, 1],
        "embed_dim": [256, 512, 1024, 2048],
        "num_heads": [8, 16, 32, 64],
        "num_groups": [8, 16, 32, 64],
        "window_size": 12,
        "max_position_embeddings": 50,
        "max_temporal_embeddings": 100,
    },
    "text": {
        "d_model": 1024,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_attention_heads": 16,
        "decoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096,
        "max_position_embeddings": 4096,
    },
}
FLORENCE_2_WORDS = 51289


def evo1(device: str, cameras: int) -> Built:
    """LeRobot's default head on the first 14 layers of InternVL3-1B; images of 448 pixels."""
    from trimtab.adapters.tiny.evo1 import make_vlm

    with tempfile.TemporaryDirectory() as folder:
        make_vlm(Path(folder), INTERNVL3_1B)
        features = camera_features(cameras, CAMERA, state_dim=14, action_dim=14)
        return assemble_weightless(make_config("evo1", features, vlm_model_name=folder))


def molmoact2(device: str, cameras: int) -> Built:
    """LeRobot's default chunk, on a MolmoAct2 of the sizes above."""
    from trimtab.adapters.tiny.molmoact2 import STATE_LEVELS, make_backbone

    with tempfile.TemporaryDirectory() as folder:
        backbone, fast = Path(folder) / "backbone", Path(folder) / "fast"
        make_backbone(backbone, MOLMOACT2)
        word_tokenizer(fast)
        config = make_config(
            "molmoact2",
            camera_features(cameras, CAMERA, state_dim=14, action_dim=14),
            checkpoint_path=str(backbone),
            discrete_action_tokenizer=str(fast),
            inference_action_mode="continuous",
            num_state_tokens=STATE_LEVELS,
            max_sequence_length=4096,
        )
        return assemble_weightless(config)


def multi_task_dit(device: str, cameras: int) -> Built:
    """LeRobot's default sizes on CLIP ViT-B/16; the default objective, so DDIM."""
    from trimtab.adapters.tiny.multi_task_dit import make_clip

    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip"  # LeRobot insists on "clip" in the path
        make_clip(clip, CLIP_B16)
        features = camera_features(cameras, CAMERA, state_dim=14, action_dim=14)
        names = {"vision_encoder_name": str(clip), "text_encoder_name": str(clip)}
        return assemble_weightless(make_config("multi_task_dit", features, **names))


def xvla(device: str, cameras: int) -> Built:
    """LeRobot's default transformer on Florence-2-large; images of 224 pixels, as in its checkpoints."""
    from trimtab.adapters.tiny.xvla import florence

    with tempfile.TemporaryDirectory() as folder:
        word_tokenizer(Path(folder))
        config = make_config(
            "xvla",
            camera_features(cameras, CAMERA, state_dim=20, action_dim=20),
            florence_config=florence(FLORENCE_2_LARGE, FLORENCE_2_WORDS),
            tokenizer_name=folder,
            resize_imgs_with_padding=(224, 224),
        )
        return assemble_weightless(config)
