"""A pi0 or pi05 of 0.3 M weights: the real PaliGemma and Gemma classes, narrow.

LeRobot fixes their sizes in code and lets a config name only ``gemma_2b`` or ``gemma_300m``. A tiny config
names ``gemma_300m`` as the vision-language model, which LeRobot accepts but cannot run (its image embeddings
are 2048 wide, that model 1024), so no real checkpoint has it. ``narrow`` replaces the sizes while such a
policy is built, and only then; ``install`` lets ``load_adapter`` build it in this process. In a process that
did not make the folder, call ``install`` before loading.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from trimtab.adapters import register_adapter
from trimtab.adapters.registry import adapter_class
from trimtab.adapters.tiny.parts import camera_features, make_config, save_policy, word_tokenizer

MARK = "gemma_300m"
VOCABULARY = 512


def pi(policy_type: str, folder: Path, **fields: Any) -> dict[str, Any]:
    """Save a pi0 or pi05, and its tokenizer beside it; the saved processor names the published one."""
    from tokenizers import AddedToken

    tokenizer_folder = folder / "tokenizer"
    tokenizer = word_tokenizer(tokenizer_folder)
    # pi05 writes the state into the prompt, as bins.
    tokenizer.add_tokens([AddedToken(str(number), single_word=True) for number in range(256)])
    tokenizer.save_pretrained(tokenizer_folder)
    config = make_config(policy_type, fields, **camera_features(), paligemma_variant=MARK)
    processors = import_module(f"lerobot.policies.{policy_type}.processor_{policy_type}")
    step = processors.TokenizerProcessorStep

    def local(tokenizer_name: str, **arguments: Any) -> Any:
        made = step(tokenizer_name=str(tokenizer_folder), **arguments)
        made.tokenizer_name = tokenizer_name
        return made

    # The published tokenizer would be fetched from a gated repository.
    with narrow(config), patch.object(processors, "TokenizerProcessorStep", local):
        save_policy(folder, config, no_zeros=True)
    install(policy_type)
    return {"tokenizer": str(tokenizer_folder)}


@contextmanager
def narrow(config: Any) -> Iterator[None]:
    """Within it, LeRobot builds the policy of a tiny ``config`` narrow; any other config is left alone."""
    if config.paligemma_variant != MARK:
        yield
        return
    module = import_module(f"lerobot.policies.{config.type}.modeling_{config.type}")
    gemma = {"depth": 2, "mlp_dim": 96, "num_heads": 8, "num_kv_heads": 1, "head_dim": 16}
    sizes = {MARK: module.GemmaConfig(width=64, **gemma)}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision["projection_dim"] = sizes[MARK].width

    def resized(cls: Callable) -> Callable:
        def make(config: Any) -> Any:
            getattr(config, "text_config", config).vocab_size = VOCABULARY
            for name, value in vision.items():
                if hasattr(config, "vision_config"):
                    setattr(config.vision_config, name, value)
            return cls(config)

        return make

    classes = ("PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM")
    narrowed: dict[str, Any] = {name: resized(getattr(module, name)) for name in classes}
    with patch.multiple(module, get_gemma_config=sizes.__getitem__, **narrowed):
        yield


def install(policy_type: str) -> None:
    """Let ``load_adapter`` build tiny policies of this type in this process; real ones stay as they are."""
    plain: Any = adapter_class(policy_type)
    if plain.__name__ == "TinyAdapter":
        return

    class TinyAdapter(plain):
        @classmethod
        def build(cls, config: Any) -> Any:
            with narrow(config):
                return super().build(config)

    register_adapter(policy_type, lambda: TinyAdapter)
