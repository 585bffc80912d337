"""How a user names a base policy: the options under ``--policy.``."""

from __future__ import annotations

from dataclasses import dataclass, field

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class PolicyConfig:
    """The base policy: ``--policy.path`` and how to load it."""

    # Folder that `lerobot-train` or `trimtab base` wrote, or a Hub repository.
    path: str | None = None
    # Revision on the Hub: branch, tag or commit.
    revision: str | None = None
    # Device of the base policy (cpu, cuda, mps); default: the best there is.
    device: str | None = None
    # Precision of the base policy's weights (float32, bfloat16, float16); default: as its config says.
    dtype: str | None = None
    # Denoising steps; default: as saved (10 where a DDPM checkpoint is switched to DDIM).
    num_inference_steps: int | None = None
    # Folder of the tokenizer, where the one that the checkpoint names cannot be fetched.
    tokenizer: str | None = None
    # Folder of the vision-language backbone, where the one that the checkpoint names cannot be fetched.
    backbone: str | None = None
    # Base policy of a PEFT (LoRA) checkpoint, where it no longer lies where its adapter_config.json says.
    base_path: str | None = None
    # Other names for the environment's observations, as in `lerobot-eval --rename_map`.
    rename_map: dict[str, str] = field(default_factory=dict)
