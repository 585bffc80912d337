"""The vision-language backbone that a policy names: its small files, without the gigabytes it brings along.

The policy's own checkpoint holds the backbone's weights, but LeRobot loads, or downloads, the original ones
first. Beside an empty weights file it builds the same model with random ones, which the checkpoint replaces;
``loading.load_weights`` then compares every tensor with the checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from trimtab.adapters.checkpoint.files import CONFIG, WEIGHTS
from trimtab.adapters.errors import UserError, reason

SMALL_FILES = (".json", ".txt", ".model", ".jinja")


def backbone_folder(name: str, revision: str | None = None) -> Path:
    """The folder with a backbone's config, tokenizer and processors; its weights are not fetched.

    Args:
        name: folder, or ``owner/name`` on the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: neither a folder nor a reachable Hub repository.
    """
    from huggingface_hub import snapshot_download

    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            "--policy.backbone",
            f"there is no folder {name}; name one with the backbone's config and processors",
        )
    try:
        patterns = [f"*{suffix}" for suffix in SMALL_FILES]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the Hub client has a dozen exceptions for "not available"
        raise UserError(
            "--policy.backbone",
            f"the backbone '{name}' that the policy names is neither a folder nor a reachable Hub repository "
            f"({reason(error)}); name a folder with its config and processors",
        ) from None


@contextmanager
def without_weights(name: str) -> Iterator[str]:
    """A temporary copy of a backbone's small files with an empty weights file, as a path.

    Args:
        name: folder, or ``owner/name`` on the Hub.

    Raises:
        UserError: the backbone has no config, or is not to be had.
    """
    from safetensors.torch import save_file

    folder = backbone_folder(name)
    if not (folder / CONFIG).is_file():
        raise UserError(
            "--policy.backbone", f"{folder} holds no {CONFIG}; name a folder with the backbone's config"
        )
    with TemporaryDirectory() as copy:
        for file in folder.iterdir():
            if file.suffix in SMALL_FILES and not file.name.endswith(".index.json"):
                shutil.copy(file, copy)
        save_file({}, Path(copy) / WEIGHTS, metadata={"format": "pt"})
        yield copy
