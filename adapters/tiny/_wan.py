"""What ``fastwam`` and ``lingbot_va`` keep outside their checkpoints, narrow: Wan's VAE, UMT5's encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.tiny.parts import WORDS, Sizes

LATENT_CHANNELS = 48  # LeRobot's code names this number of Wan 2.2's VAE
TEXT_DIM = 16
NARROW: Sizes = {
    "vae": {
        "base_dim": 4,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
        "latents_mean": [0.02 * i - 0.5 for i in range(LATENT_CHANNELS)],
        "latents_std": [0.3 + 0.01 * i for i in range(LATENT_CHANNELS)],
    },
    "text": {"d_model": TEXT_DIM, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
}


def wan_parts(folder: Path, sizes: Sizes = NARROW) -> tuple[Any, Any]:
    """Save the tokenizer in ``folder/tokenizer`` and return Wan's VAE and text encoder, random.

    The VAE compresses as the real one: 16 times in height and width, 4 times in time, to 48 channels.

    Args:
        folder: where.
        sizes: arguments of the VAE and fields of the text encoder's config.
    """
    from diffusers import AutoencoderKLWan
    from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -3.0) for word in WORDS)]
    tokenizer = T5TokenizerFast(vocab=words, extra_ids=0)
    tokenizer.save_pretrained(folder / "tokenizer")
    vae = AutoencoderKLWan(
        z_dim=LATENT_CHANNELS,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        **sizes["vae"],
    )
    config = UMT5Config(**{"vocab_size": len(tokenizer), "pad_token_id": 0, **sizes["text"]})
    return vae, UMT5EncoderModel(config)


def save_wan_parts(folder: Path) -> None:
    """Save ``vae``, ``text_encoder`` and ``tokenizer`` in ``folder``, laid out as in Wan's Hub repository."""
    torch.manual_seed(0)
    vae, text_encoder = wan_parts(folder)
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
