"""The vision-language backbone that a policy names: its small files, without the gigabytes it brings along.

The policy's own checkpoint holds the backbone's weights, but LeRobot loads, or downloads, the original ones
first. Beside an empty weights file it builds the same model with random ones, which the checkpoint replaces.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trimtab.adapters.checkpoint.files import BACKBONE, CONFIG, WEIGHTS
from trimtab.adapters.checkpoint.folder import SMALL_FILES, find_folder
from trimtab.adapters.errors import UserError


def backbone_folder(name: str, revision: str | None = None) -> Path:
    """The folder with a backbone's config, tokenizer and processors; its weights are not fetched."""
    return find_folder(
        name, BACKBONE, revision, mend="; name a folder with the backbone's config and processors"
    )


@contextmanager
def without_weights(config: Any, *fields: str) -> Iterator[None]:
    """While entered, ``fields`` of a policy's config name copies of its backbones without weights."""
    from safetensors.torch import save_file

    names = {field: getattr(config, field) for field in fields}
    with TemporaryDirectory() as root:
        try:
            for field, name in names.items():
                folder = backbone_folder(name)
                if not (folder / CONFIG).is_file():
                    raise UserError(
                        BACKBONE, f"{folder} holds no {CONFIG}; name a folder with the backbone's config"
                    )
                copy = Path(root) / field
                copy.mkdir()
                for file in folder.iterdir():
                    if file.suffix in SMALL_FILES and not file.name.endswith(".index.json"):
                        shutil.copy(file, copy)
                save_file({}, copy / WEIGHTS, metadata={"format": "pt"})
                setattr(config, field, str(copy))
            yield
        finally:
            vars(config).update(names)
