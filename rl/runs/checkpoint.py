"""Checkpoint folders: a whole run in safetensors and JSON, there whole or not at all.

    checkpoints/000500/            named by environment steps, as LeRobot names its own by updates
        config.json                    of the run, as `trimtab adapt` takes it
        process-0.json, .safetensors   state of a process: networks, optimisers, replay, episodes, generators
        manifest.json                  written last: SHA-256 of every file above
    checkpoints/last -> 000500

A folder is written under another name, brought to the disk and renamed.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, as_tensor, contiguous_format

from trimtab.adapters.checkpoint.identity import hash_files
from trimtab.adapters.errors import UserError, at_least, reason
from trimtab.rl.runs.processes import ProcessGroup

FORMAT = 3
MANIFEST, LAST = "manifest.json", "last"
STORED = "$stored"


@dataclass
class CheckpointConfig:
    """``--checkpoint.*``."""

    # Environment steps between two checkpoints (0: none, not even at a signal).
    every: int = 5000
    # Newest checkpoints that are kept.
    keep: int = 2

    def __post_init__(self) -> None:
        at_least(0, self, "--checkpoint.", "every")
        at_least(1, self, "--checkpoint.", "keep")


@dataclass
class Checkpoint:
    """A whole checkpoint in ``folder``.

    ``processes`` have written it, ``belongs`` and ``beside`` are as for ``Checkpoints``, and ``files`` holds
    the SHA-256 of each.
    """

    folder: Path
    env_steps: int
    processes: int
    belongs: dict[str, Any]
    beside: dict[str, Any]
    files: dict[str, str]

    def read(self, rank: int) -> dict[str, Any]:
        """The state of a process."""
        path = self.folder / f"process-{rank}"
        content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return unpack(content, load_file(path.with_suffix(".safetensors")))


@dataclass
class Checkpoints:
    """The checkpoints of a run, each process writing its own part.

    Attributes:
        folder: holds them.
        config: how often, and how many.
        belongs: the run they belong to, as JSON values.
        world: the processes.
        beside: asked at each checkpoint for what the recipe wants to find in it again, as JSON values.
        texts: files to write into each checkpoint, by name (the run's config).
        resumed_by: what goes on from the newest, for messages.
    """

    folder: Path
    config: CheckpointConfig
    belongs: dict[str, Any]
    world: ProcessGroup
    beside: Callable[[], dict[str, Any]] = dict
    texts: dict[str, str] = field(default_factory=dict)
    resumed_by: str = "--resume=true"
    _latest: int = -1

    def due(self, env_steps: int) -> bool:
        """Whether a checkpoint is due, by environment steps of all processes."""
        every = self.config.every
        return bool(every) and env_steps // every > max(self._latest, 0) // every

    def save(self, env_steps: int, state: dict[str, Any]) -> None:
        """Write a checkpoint named ``env_steps`` of each process's ``state``; all call it together.

        Raises:
            UserError: it cannot be written. What was half-written is gone, earlier ones are as they were.
        """
        target = self.folder / f"{env_steps:06d}"
        work, main = self.folder / f".{target.name}.tmp", self.world.main
        with self._together(work):
            if main:
                for left in self.folder.glob(".*.tmp"):  # of runs that were killed while they wrote
                    left.unlink() if left.is_symlink() else shutil.rmtree(left, ignore_errors=True)
                work.mkdir(parents=True)
        files: dict[str, str] = {}
        with self._together(work):
            files = write_tree(state, work, f"process-{self.world.rank}")
        everyones = self.world.gather(files)
        with self._together(work):
            if main:
                for part in everyones:
                    files |= part
                files |= {name: write(text.encode(), work / name) for name, text in self.texts.items()}
                self._finish(work, target, files)
        self._latest = env_steps

    @contextlib.contextmanager
    def _together(self, work: Path) -> Iterator[None]:
        """Should any process fail within, all give up."""
        error: Exception | None = None
        try:
            yield
        except (OSError, SafetensorError) as caught:
            error = caught
        if self.world.all(error is None):
            return
        if self.world.main:
            shutil.rmtree(work, ignore_errors=True)
        why = reason(error) if error else "another process could not"
        last = next((f"the last whole one is {folder}" for folder in self._folders()), "there is none yet")
        raise UserError(
            "--output_dir",
            f"cannot write a checkpoint to {self.folder} ({why}); {last}; make room, then go on with "
            f"{self.resumed_by}",
        ) from error

    def _finish(self, work: Path, target: Path, files: dict[str, str]) -> None:
        """Write the manifest, make the folder a checkpoint, and remove those that are no longer kept."""
        manifest = {
            "format": FORMAT,
            "env_steps": int(target.name),
            "processes": self.world.size,
            "belongs": self.belongs,
            "beside": self.beside(),
            "files": files,
        }
        write(f"{json.dumps(manifest, indent=1)}\n".encode(), work / MANIFEST)
        sync_folder(work)
        if target.exists():  # a broken one of this name, or one from before a resumed run fell back
            shutil.rmtree(target)
        work.rename(target)
        link = self.folder / f".{LAST}.tmp"
        with contextlib.suppress(OSError):  # a convenience, which some file systems lack
            link.unlink(missing_ok=True)
            link.symlink_to(target.name)
            os.replace(link, self.folder / LAST)
        sync_folder(self.folder)
        # A run that fell back to an older checkpoint makes those after it obsolete.
        older = [folder for folder in self._folders() if int(folder.name) <= int(target.name)]
        for folder in {*self._folders()} - {*older[: self.config.keep]}:
            shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        if not self.folder.is_dir():
            return []
        folders = [path for path in self.folder.iterdir() if path.name.isdigit() and not path.is_symlink()]
        return sorted(folders, key=lambda path: int(path.name), reverse=True)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, if any, and a line about each newer one that is not whole.

        The next one is due so many steps after it. Half-written folders are left for ``save`` to replace.
        """
        notes: list[str] = []
        for folder in self._folders():
            try:
                found = check(folder)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                notes.append(
                    f"checkpoint {folder.name} is not whole ({reason(error)}); trying the one before"
                )
            else:
                self._latest = found.env_steps
                return found, notes
        return None, notes


def check(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, all of whose files are as they were written.

    Raises:
        ValueError: a file is missing or has another content; or the manifest is broken.
        UserError: it is of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"it lacks {MANIFEST}")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if (found := manifest.pop("format")) != FORMAT:
        raise UserError(
            "--resume",
            f"{folder} was written by another version (format {found}, this one reads {FORMAT}); begin the "
            "run anew in another --output_dir",
        )
    checkpoint = Checkpoint(folder, **manifest)
    for name, digest in checkpoint.files.items():
        if not (folder / name).is_file():
            raise ValueError(f"it lacks {name}")
        if hash_files([folder / name]) != digest:
            raise ValueError(f"{name} is not as it was written")
    return checkpoint


def write_tree(state: dict, folder: Path, name: str) -> dict[str, str]:
    """Write nested state as a JSON and a safetensors file; returns the hashes of both."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(pack(state, tensors)) + "\n"
    parts = {f"{name}.json": text.encode(), f"{name}.safetensors": serialise(tensors)}
    return {name: write(content, folder / name) for name, content in parts.items()}


def write(content: bytes, path: Path) -> str:
    """Write a file and bring it to the disk; returns its SHA-256.

    (safetensors' own writing maps the file, and a full disk then kills the process.)
    """
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def pack(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """The JSON form of nested dicts and lists; tensors and arrays in it go to ``tensors``, by their path.

    Raises:
        TypeError: a value that has no such form, so that nothing is left out unnoticed.
    """
    if isinstance(tree, Tensor | np.ndarray):
        value = as_tensor(tree).detach().cpu()
        tensors[path] = value.clone(memory_format=contiguous_format)
        return {STORED: "tensor" if isinstance(tree, Tensor) else "array"}
    if isinstance(tree, Mapping):
        return {str(key): pack(value, tensors, f"{path}.{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple | deque):
        return [pack(value, tensors, f"{path}.{index}") for index, value in enumerate(tree)]
    if isinstance(tree, np.generic):
        return tree.item()
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{path}: a {type(tree).__name__} has no place in a checkpoint")


def unpack(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """The inverse of ``pack``; tuples and deques come back as lists."""
    if isinstance(tree, dict):
        if STORED in tree:
            return tensors[path] if tree[STORED] == "tensor" else tensors[path].numpy()
        return {key: unpack(value, tensors, f"{path}.{key}") for key, value in tree.items()}
    if isinstance(tree, list):
        return [unpack(value, tensors, f"{path}.{index}") for index, value in enumerate(tree)]
    return tree
