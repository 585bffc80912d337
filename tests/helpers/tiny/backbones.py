"""Backbones of the policies whose tiny instances only the tests use.

Every function saves into ``folder``. ``sizes`` are fields of the configs of its parts, narrow by default.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.tiny.parts import CHAT_TEMPLATE, WORDS, Sizes, read_sizes, word_tokenizer
from trimtab.adapters.tiny.parts import SIZES as SHIPPED

QWEN_TOKENS = SHIPPED["qwen3"]["tokens"]
SIZES = read_sizes(Path(__file__).with_name("sizes.json"))
# Of molmoact2's and wall_x's prompts: one token each, as for a real tokenizer.
PROMPT_WORDS = (
    "a action are assistant camera complete control current expected helpful in is mode next of robot setup "
    "should state take task view what"
)
WALL_X_TOKENS = ("<|im_start|>", "<|im_end|>", *QWEN_TOKENS.values())
WALL_X_TOKENS += ("<|propri|>", "<|action|>", "<|action_fast|>")
MOLMO_TOKENS = {  # by the field of the model's config that holds their id
    "image_patch": "<im_patch>",
    "image_col": "<im_col>",
    "image_start_token": "<im_start>",
    "low_res_image_start_token": "<low_res_im_start>",
    "frame_start_token": "<frame_start>",
    "image_end_token": "<im_end>",
    "frame_end_token": "<frame_end>",
    "image_low_res": "<im_low>",
    "action_start_token": "<action_start>",
    "action_end_token": "<action_end>",
}
MOLMO_PLAIN = ("<|im_start|>", "<|im_end|>", "<|image|>", "<|video|>", "<action_output>")
STATE_LEVELS = 16
LATENT_CHANNELS = 48  # LeRobot's code names this number of Wan 2.2's VAE


def token_ids(tokenizer: Any, tokens: dict[str, str]) -> dict[str, int]:
    """The ids of special tokens, by the name of the config's field without ``_id``."""
    return {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def byte_tokenizer(folder: Path, tokens: Sequence[str], padding_side: str = "left") -> Any:
    """Save a Qwen2 tokenizer that knows single bytes, the words of prompts and ``tokens``; return it."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    names, merges = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"], []
    for word in sorted({*WORDS, *PROMPT_WORDS.split()}):
        word = f"Ġ{word}"  # with the space before it
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            names.append(word[: end + 1])
    tokenizer = Qwen2Tokenizer(
        vocab={name: index for index, name in enumerate(dict.fromkeys(names))},
        merges=list(dict.fromkeys(merges)),
        extra_special_tokens=list(tokens),
        padding_side=padding_side,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _save_qwen_processor(folder: Path, tokenizer: Any, template: str) -> None:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=template,
    ).save_pretrained(folder)


def make_qwen2_5(folder: Path, sizes: Sizes = SIZES["qwen2_5"]) -> dict[str, Any]:
    """Qwen2.5-VL, of eo1; returns the config as a dictionary."""
    from lerobot.policies.eo1.processor_eo1 import EO1_SPECIAL_TOKENS
    from transformers import Qwen2_5_VLConfig

    tokenizer = word_tokenizer(folder, QWEN_TOKENS)
    text = {"vocab_size": len(tokenizer) + len(EO1_SPECIAL_TOKENS), **sizes["text"]}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**sizes["vision"], "out_hidden_size": text["hidden_size"]},
        dtype="float32",
        **token_ids(tokenizer, QWEN_TOKENS),
        **sizes["model"],
    )
    config.save_pretrained(folder)
    _save_qwen_processor(folder, tokenizer, CHAT_TEMPLATE)
    return config.to_dict()


def make_wall_x(
    folder: Path, padding_side: str, action_dim: int, state_dim: int, sizes: Sizes = SIZES["wall_x"]
) -> None:
    """Qwen2.5-VL with experts, of wall_x; the widths of action and state with their padding."""
    from lerobot.policies.wall_x.qwen_model import Qwen2_5_VLConfig

    tokenizer = byte_tokenizer(folder, WALL_X_TOKENS, padding_side)
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
        **token_ids(tokenizer, QWEN_TOKENS),
    ).save_pretrained(folder)
    _save_qwen_processor(folder, tokenizer, "{{ messages }}")


def make_internvl(folder: Path, sizes: Sizes = SIZES["internvl"]) -> Any:
    """InternVL, of evo1; returns its config."""
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


def make_molmo(folder: Path, sizes: Sizes = SIZES["molmo"], **fields: Any) -> Any:
    """Molmo with its action expert, of molmoact2; returns its config, in which ``fields`` differ."""
    from lerobot.policies.molmoact2.molmoact2_hf_model import configuration_molmoact2 as configs

    edges = [f"<{kind}_{side}>" for kind in ("state", "setup", "control") for side in ("start", "end")]
    states = [f"<state_{level}>" for level in range(STATE_LEVELS)]
    tokens = [*MOLMO_TOKENS.values(), *MOLMO_PLAIN, *edges, *states]
    tokenizer = byte_tokenizer(folder, tokens)
    height, width = sizes["vit"]["image_default_input_size"]
    image = {"size": {"height": height, "width": width}, "patch_size": 14, "crop_mode": "resize"}
    processors = {"image_processor": image, "video_processor": {}}
    (folder / "processor_config.json").write_text(json.dumps(processors), encoding="utf-8")
    words = {"vocab_size": len(tokenizer) - len(tokens), "additional_vocab_size": len(tokens)}
    text = configs.MolmoAct2TextConfig(**{**words, **sizes["text"]})
    values = {"initializer_range": 0.2, "eos_token_id": tokenizer.eos_token_id}
    config = configs.MolmoAct2Config(
        configs.MolmoAct2VitConfig(**sizes["vit"]),
        configs.MolmoAct2AdapterConfig(**sizes["connector"], text_hidden_size=sizes["text"]["hidden_size"]),
        text,
        configs.MolmoAct2ActionExpertConfig(num_layers=text.num_hidden_layers, **sizes["expert"]),
        **{**values, **token_ids(tokenizer, MOLMO_TOKENS), **fields},
    )
    config.save_pretrained(folder)
    (folder / "configuration_molmoact2.py").unlink()  # transformers adds the source of the config's class
    return config


def make_wan(folder: Path, sizes: Sizes = SIZES["wan"]) -> tuple[Any, Any]:
    """Wan's tokenizer, of fastwam and lingbot_va; returns its VAE and its UMT5 text encoder, random.

    The VAE compresses as the real one: 16 times in height and width, 4 times in time, to 48 channels.
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
        latents_mean=[0.02 * i - 0.5 for i in range(LATENT_CHANNELS)],
        latents_std=[0.3 + 0.01 * i for i in range(LATENT_CHANNELS)],
        **sizes["vae"],
    )
    config = UMT5Config(**{"vocab_size": len(tokenizer), "pad_token_id": 0, **sizes["text"]})
    return vae, UMT5EncoderModel(config)


def save_wan(folder: Path) -> Path:
    """Save ``vae``, ``text_encoder`` and ``tokenizer``, laid out as in Wan's Hub repository."""
    torch.manual_seed(0)
    vae, text_encoder = make_wan(folder)
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    return folder
