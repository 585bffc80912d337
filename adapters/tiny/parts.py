"""What tiny instances share: features, statistics, tokenizers, narrow widths, building and saving."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from torch import Tensor

from trimtab.adapters.registry import adapter_class

STATE_DIM, ACTION_DIM = 5, 3
WORDS = ("pick", "up", "the", "red", "cube", "press", "button", "close", "drawer", "push", "to", "goal")

# Each message, its images before its text, as Qwen's own template orders them.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<bos> ' + message['role'] + ' ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos> assistant ' }}{% endif %}"
)

Sizes = dict[str, Any]  # a backbone: its classes in transformers, and the fields of their configs


def read_sizes(path: Path) -> dict[str, Any]:
    """Narrow sizes: the fields of each policy type's config (with tuples for lists), and of the backbones."""
    sizes = json.loads(path.read_text(encoding="utf-8"))
    for fields in sizes["policies"].values():
        fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return sizes


SIZES = read_sizes(Path(__file__).with_name("sizes.json"))


def camera_features(
    cameras: int = 1,
    size: int | tuple[int, int] = 64,
    state_dim: int = STATE_DIM,
    action_dim: int = ACTION_DIM,
    env_dim: int = 0,
    single: str = "observation.image",
) -> dict[str, dict[str, PolicyFeature]]:
    """``input_features`` (states and cameras) and ``output_features`` of a policy config.

    ``size`` is the side of an image, or (height, width); ``single`` the name of an only camera.
    """
    inputs = {"observation.state": PolicyFeature(FeatureType.STATE, (state_dim,))}
    if env_dim:
        inputs["observation.environment_state"] = PolicyFeature(FeatureType.ENV, (env_dim,))
    height, width = (size, size) if isinstance(size, int) else size
    for index in range(cameras):
        name = single if cameras == 1 else f"observation.images.camera{index + 1}"
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


def make_config(policy_type: str, fields: dict[str, Any], **defaults: Any) -> Any:
    """LeRobot's config of a policy type: its narrow sizes and ``defaults``, but for ``fields``."""
    from lerobot.policies.factory import make_policy_config

    sizes = SIZES["policies"].get(policy_type, {})
    values = {"device": "cpu", "push_to_hub": False, **sizes, **defaults, **fields}
    return make_policy_config(policy_type, **values)


def save_policy(
    folder: Path,
    config: Any,
    build: Callable[[Any], Any] | None = None,
    no_zeros: bool = False,
    change: Callable[[Any], None] | None = None,
) -> None:
    """Build the policy of a config, random, and write the folder that `lerobot-train` would.

    ``build`` makes the policy; by default its adapter does, which reads no weights of the backbone.
    ``no_zeros`` has it ``randomise``d, and ``change`` is called with the preprocessor before it is saved.
    """
    from lerobot.policies.factory import make_pre_post_processors

    adapter: Any = adapter_class(config.type)
    torch.manual_seed(0)
    policy = (build or adapter.build)(config)
    if no_zeros:
        randomise(policy)
    preprocessor, postprocessor = make_pre_post_processors(config, dataset_stats=statistics(config))
    if change:
        change(preprocessor)
    for saved in (policy, preprocessor, postprocessor):
        saved.save_pretrained(folder)


def randomise(policy: torch.nn.Module) -> None:
    """Give every weight that was initialised to zero (gates, output layers) a random value.

    Otherwise a random network of such a type ignores its observation or its noise.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim > 1 and not parameter.any():
                values = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(values / parameter.shape[-1] ** 0.5)


def make_backbone(folder: Path, sizes: Sizes, **text: Any) -> Any:
    """Save a backbone's config, tokenizer and processor, without weights; return the config.

    ``text`` are fields of its text config that shall differ.
    """
    import transformers

    tokenizer = word_tokenizer(folder, sizes.get("tokens"))
    words = {"vocab_size": len(tokenizer), "pad_token_id": 0, **sizes["text"], **text}
    config_class = getattr(transformers, sizes["config"])
    config = config_class(text_config=words, vision_config={**sizes["vision"]}, **sizes["model"])
    config.save_pretrained(folder)
    if "processor" in sizes:
        parts = {part: getattr(transformers, cls)(**fields) for part, (cls, fields) in sizes["parts"].items()}
        processor = getattr(transformers, sizes["processor"])
        processor(tokenizer=tokenizer, chat_template=CHAT_TEMPLATE, **parts).save_pretrained(folder)
    return config


def make_florence(folder: Path, sizes: Sizes = SIZES["florence"]) -> dict[str, Any]:
    """Florence-2, of xvla: saves the tokenizer, and returns the config as X-VLA's config holds it."""
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    text = {"model_type": "bart", "vocab_size": len(word_tokenizer(folder)), **ids, **sizes["text"]}
    vision = {**sizes["vision"], "projection_dim": text["d_model"]}
    return {"vision_config": vision, "text_config": text, "pad_token_id": 0, "image_token_id": 1}


def word_tokenizer(folder: Path, special: dict[str, str] | None = None) -> Any:
    """Save a word-level tokenizer and return it; ``special``: extra special tokens by attribute name."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", "<bos>", "<eos>", *(special or {}).values()]
    vocabulary = {word: index for index, word in enumerate([*names, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        extra_special_tokens=special or {},
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
