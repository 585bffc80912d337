"""Frozen parts beside a checkpoint (Wan's) whose weights are broken."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from trimtab.adapters import PolicyConfig


def spoilt(options, folder, part, change):
    """The options with a copy of Wan's parts of which one has other weights."""
    backbone = Path(shutil.copytree(options.backbone, folder))
    file = next((backbone / part).glob("*.safetensors"))
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return PolicyConfig(**{**vars(options), "backbone": str(backbone)})


def a_third(weights):
    return {name: weights[name] for name in sorted(weights)[: len(weights) // 3]}


def poisoned(weights):
    return {name: value.clone().fill_(float("nan")) for name, value in weights.items()}
