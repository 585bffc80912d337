"""Config, tokenizer and processor of each backbone that a policy names; most without weights.

Every function saves into ``folder``. ``sizes`` are fields of the configs of its parts, narrow by default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.adapters.tiny.parts import SIZES, Sizes, token_ids, word_tokenizer

QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
# Each message, its images before its text, as Qwen's own template orders them.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<bos> ' + message['role'] + ' ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos> assistant ' }}{% endif %}"
)
SMOLVLM_TOKENS = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def make_qwen3(folder: Path, sizes: Sizes = SIZES["qwen3"], **text: Any) -> Any:
    """Qwen3-VL, of groot and vla_jepa; returns its config, whose text config differs in ``text``."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = word_tokenizer(folder, QWEN_TOKENS)
    values = {"vocab_size": len(tokenizer), "pad_token_id": 0, **sizes["text"], **text}
    vision = {"patch_size": 16, **sizes["vision"], "out_hidden_size": values["hidden_size"]}
    ids = token_ids(tokenizer, QWEN_TOKENS)
    config = Qwen3VLConfig(text_config=values, vision_config=vision, tie_word_embeddings=True, **ids)
    config.save_pretrained(folder)
    pixels = {"patch_size": vision["patch_size"], "merge_size": 2, "size": sizes["pixels"]}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return config


def make_clip(folder: Path, sizes: Sizes = SIZES["clip"]) -> Any:
    """CLIP, of multi_task_dit; returns its config."""
    from transformers import CLIPConfig

    # The end as OpenAI's configs have it: CLIP then pools at the largest token id.
    ids = {"vocab_size": len(word_tokenizer(folder)), "eos_token_id": 2, "pad_token_id": 0}
    text = {**ids, **sizes["text"]}
    width = text["projection_dim"]
    config = CLIPConfig(text_config=text, vision_config=sizes["vision"], projection_dim=width)
    config.save_pretrained(folder)
    return config


def make_smolvlm(folder: Path, sizes: Sizes = SIZES["smolvlm"]) -> None:
    """SmolVLM, of smolvla."""
    from transformers import SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    tokenizer = word_tokenizer(folder, SMOLVLM_TOKENS)
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0, **sizes["text"]}
    SmolVLMConfig(
        text_config=text, vision_config=sizes["vision"], image_token_id=5, **sizes["model"]
    ).save_pretrained(folder)
    SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(),
        chat_template="{{ messages }}",
    ).save_pretrained(folder)


def make_florence(folder: Path, sizes: Sizes = SIZES["florence"]) -> dict[str, Any]:
    """Florence-2, of xvla: saves the tokenizer, and returns the config as X-VLA's config holds it."""
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    text = {"model_type": "bart", "vocab_size": len(word_tokenizer(folder)), **ids, **sizes["text"]}
    vision = {**sizes["vision"], "projection_dim": text["d_model"]}
    return {"vision_config": vision, "text_config": text, "pad_token_id": 0, "image_token_id": 1}
