"""fastwam, on Wan 2.2's video model.

lingbot_va is left out: its 40 passes for the video and 50 for the actions take minutes to count.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from trimtab.adapters.tiny.parts import camera_features
from trimtab.recipes.full_size.common import (
    Built,
    Sizes,
    assemble_weightless,
    empty_weights,
    make_config,
)
from trimtab.recipes.full_size.weightless import WithoutMemory

# VAE and UMT5-XXL encoder of Wan-AI/Wan2.2-TI2V-5B-Diffusers, by their published configs; the latents'
# means and deviations change no count.
WAN_2_2: Sizes = {
    "vae": {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
    "text": {
        "vocab_size": 256384,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
    },
}


def _save_wan(folder: Path) -> None:
    from trimtab.adapters.tiny._wan import wan_parts

    with WithoutMemory():
        vae, text_encoder = wan_parts(folder, WAN_2_2)
    vae.save_config(folder / "vae")
    text_encoder.config.save_pretrained(folder / "text_encoder")
    empty_weights(folder / "vae" / "diffusion_pytorch_model.safetensors")
    empty_weights(folder / "text_encoder" / "model.safetensors")


def fastwam(device: str, cameras: int) -> Built:
    """LeRobot's default sizes, on LIBERO's cameras of 224 pixels, which it puts side by side."""
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it would name each weight that the empty file lacks
    with tempfile.TemporaryDirectory() as folder:
        _save_wan(Path(folder))
        config = make_config(
            "fastwam",
            camera_features(cameras, 224, state_dim=8, action_dim=7),
            text_encoder_model_id=folder,
            tokenizer_model_id=str(Path(folder) / "tokenizer"),
            image_size=(224, 224 * cameras),
        )
        return assemble_weightless(config)
