"""What tiny instances share: features, statistics, a tokenizer, saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from torch import Tensor

STATE_DIM, ACTION_DIM = 5, 3
WORDS = ("pick", "up", "the", "red", "cube", "press", "button", "close", "drawer", "push", "to", "goal")
# Of molmoact2's and wall_x's prompts: one token each, as for a real tokenizer.
PROMPT_WORDS = (
    "a",
    "action",
    "are",
    "assistant",
    "camera",
    "complete",
    "control",
    "current",
    "expected",
    "helpful",
    "in",
    "is",
    "mode",
    "next",
    "of",
    "robot",
    "setup",
    "should",
    "state",
    "take",
    "task",
    "view",
    "what",
)


def camera_features(
    cameras: int = 1,
    size: int | tuple[int, int] = 64,
    state_dim: int = STATE_DIM,
    action_dim: int = ACTION_DIM,
) -> dict[str, dict[str, PolicyFeature]]:
    """``input_features`` (state and cameras) and ``output_features`` of a policy config."""
    inputs = {"observation.state": PolicyFeature(FeatureType.STATE, (state_dim,))}
    height, width = (size, size) if isinstance(size, int) else size
    for index in range(cameras):
        name = "observation.image" if cameras == 1 else f"observation.images.camera{index + 1}"
        inputs[name] = PolicyFeature(FeatureType.VISUAL, (3, height, width))
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (action_dim,))}
    return {"input_features": inputs, "output_features": outputs}


def statistics(config: Any) -> dict[str, dict[str, Tensor]]:
    """Dataset statistics for a config's features, none of them trivial."""
    generator = torch.Generator().manual_seed(1)
    stats = {}
    for key, feature in {**config.input_features, **config.output_features}.items():
        shape = (3, 1, 1) if feature.type is FeatureType.VISUAL else feature.shape
        low = -torch.rand(shape, generator=generator) - 0.5
        stats[key] = {
            "min": low,
            "max": 0.3 - low,
            "mean": torch.full(shape, 0.15),
            "std": 0.5 + torch.rand(shape, generator=generator),
            "q01": low,
            "q99": 0.3 - low,
        }
    return stats


def save(folder: Path, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
    """Write the folder that `lerobot-train` would."""
    policy.save_pretrained(folder)
    preprocessor.save_pretrained(folder)
    postprocessor.save_pretrained(folder)


def randomise(policy: torch.nn.Module, seed: int = 0, scale: float = 0.2) -> None:
    """Give every weight that was initialised to zero (gates, output layers) a random value.

    Otherwise a random network of such a type ignores its observation or its noise.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim > 1 and not parameter.any():
                values = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(values / parameter.shape[-1] ** 0.5)


def word_tokenizer(folder: Path, special: dict[str, str] | None = None, **fields: Any) -> Any:
    """Save a word-level tokenizer in ``folder`` and return it.

    Args:
        folder: where.
        special: extra special tokens by attribute name.
        fields: further arguments of ``PreTrainedTokenizerFast``.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", "<bos>", "<eos>", *(special or {}).values()]
    vocabulary = {word: index for index, word in enumerate([*names, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    base = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, extra_special_tokens=special or {}, **{**base, **fields}
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def byte_tokenizer(folder: Path, tokens: Sequence[str], **fields: Any) -> Any:
    """Save a Qwen2 tokenizer that knows single bytes, the words of prompts and ``tokens``, and return it.

    Args:
        folder: where.
        tokens: special tokens; the last ids.
        fields: further arguments of ``Qwen2Tokenizer``.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    names, merges = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"], []
    for word in sorted({*WORDS, *PROMPT_WORDS}):
        word = f"Ġ{word}"  # with the space before it
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            names.append(word[: end + 1])
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    merges = list(dict.fromkeys(merges))
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=list(tokens), **fields)
    tokenizer.save_pretrained(folder)
    return tokenizer
