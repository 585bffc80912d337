"""What the policies at published size share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.adapters.base import PolicyAdapter
from trimtab.adapters.config import PolicyConfig
from trimtab.adapters.loading import quietly
from trimtab.adapters.registry import adapter_class
from trimtab.adapters.tiny.parts import statistics
from trimtab.recipes.full_size.weightless import WithoutMemory, to_fake

Built = tuple[PolicyAdapter, dict[str, Any]]
Sizes = dict[str, dict[str, Any]]
CAMERA = (480, 640)  # pixels, unless a policy was trained on others


def make_config(policy_type: str, features: dict[str, Any], device: str = "cpu", **fields: Any) -> Any:
    """LeRobot's config of a policy type with its default sizes, but for ``fields``."""
    from lerobot.policies.factory import make_policy_config

    config = make_policy_config(policy_type, **features, device="cpu", push_to_hub=False, **fields)
    config.device = device  # LeRobot would not take "meta" before
    return config


def assemble(config: Any, device: str, batch: Callable[[], dict[str, Tensor]]) -> Built:
    """The adapter, wholly on ``device``, and what ``batch`` makes there."""
    cls: Any = adapter_class(config.type)
    torch.manual_seed(0)
    with torch.device(device):
        policy = cls.build(config).eval().requires_grad_(False)
        return cls(policy, None, None), batch()


def assemble_weightless(
    config: Any,
    change: Callable[[Any], None] | None = None,
    batch: dict[str, Tensor] | None = None,
    words: int = 0,
) -> Built:
    """The adapter without its large weights, for counting alone.

    Args:
        config: the policy's, as ``make_config`` gives it.
        change: what to do with the preprocessor first.
        words: size of the vocabulary, where LeRobot cuts it to that of the (tiny) tokenizer.
        batch: a preprocessed observation; default: one that went through the policy's own preprocessor.
    """
    from lerobot.policies.factory import make_pre_post_processors

    cls: Any = adapter_class(config.type)
    cls.prepare_config(config, PolicyConfig(device="cpu"))
    with quietly(), WithoutMemory():
        policy = cls.build(config).eval().requires_grad_(False)
        if words:
            policy.model.resize_token_embeddings(words, mean_resizing=False)
    to_fake(policy)
    if batch is not None:
        return cls(policy, None, None), batch
    preprocessor, postprocessor = make_pre_post_processors(config, dataset_stats=statistics(config))
    if change:
        change(preprocessor)
    adapter = cls(policy, preprocessor, postprocessor)
    observation = adapter.example_observation(1, torch.Generator().manual_seed(0))
    return adapter, adapter.preprocess(observation)


def inputs(config: Any, tokens: int = 0, history: int = 0) -> dict[str, Tensor]:
    """A batch of one: every input feature, and language tokens."""
    lead = (1, history) if history else (1,)
    batch = {key: torch.rand(*lead, *feature.shape) for key, feature in config.input_features.items()}
    if tokens:
        batch["observation.language.tokens"] = torch.ones(*lead, tokens, dtype=torch.long)
        batch["observation.language.attention_mask"] = torch.ones(*lead, tokens, dtype=torch.bool)
    return batch


def empty_weights(path: Path) -> None:
    """A weights file that holds no weights: transformers then initialises them all."""
    from safetensors.torch import save_file

    save_file({}, path, metadata={"format": "pt"})
