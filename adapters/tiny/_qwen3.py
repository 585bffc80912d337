"""A narrow Qwen3-VL with its whole processor: the backbone of the tiny groot and vla_jepa."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.adapters.tiny.parts import QWEN_VISION, TEXT, Sizes, token_ids, word_tokenizer

SPECIAL = {
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
ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [4, 2, 2],
    "mrope_interleaved": True,
}
WIDE_START = {"initializer_range": 0.2}  # 0.02 at this width: what it sees would hardly show
NARROW: Sizes = {
    "text": {**TEXT, **WIDE_START, "head_dim": 16, "rope_parameters": ROPE},
    "vision": {
        **QWEN_VISION,
        **WIDE_START,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    },
    "pixels": {"shortest_edge": 1024, "longest_edge": 16384},
}


def make_qwen3(folder: Path, sizes: Sizes = NARROW, **text: Any) -> Any:
    """Save config and processor of a Qwen3-VL without weights.

    Args:
        folder: where.
        sizes: fields of the text and vision configs, and the fewest and most ``pixels`` of an image.
        text: fields of the text config that shall differ.

    Returns:
        The ``Qwen3VLConfig``.
    """
    from transformers import Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = word_tokenizer(folder, SPECIAL)
    values = {"vocab_size": len(tokenizer), "pad_token_id": 0, **sizes["text"], **text}
    vision = {"patch_size": 16, **sizes["vision"], "out_hidden_size": values["hidden_size"]}
    config = Qwen3VLConfig(
        text_config=values, vision_config=vision, tie_word_embeddings=True, **token_ids(tokenizer, SPECIAL)
    )
    config.save_pretrained(folder)
    pixels = {"patch_size": vision["patch_size"], "merge_size": 2, "size": sizes["pixels"]}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return config
