"""Checkpoint folders: a whole run in safetensors and JSON, there whole or not at all.

    checkpoints/000500/            named by environment steps, as LeRobot names its own by updates
        config.json                    of the run, as `trimtab adapt` takes it
        learner.json, .safetensors     what all processes share: networks, optimisers, counters
        process-0.json, .safetensors   one process's own: environments, generators, its replay's place
        replay/0-000000000000.safetensors  rows of process 0's replay, from the 0th ever added
        manifest.json                  written last: length and SHA-256 of every file above
    checkpoints/last -> 000500

A folder is written under another name, brought to the disk and renamed. Files of the replay never change once
written; the next checkpoint links to them (a hard link, a copy where the disk has none) and adds a file with
the rows that are new, so that a checkpoint costs what is new and yet each folder is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from trimtab.adapters import UserError
from trimtab.adapters.checkpoint.identity import hash_files
from trimtab.adapters.errors import reason
from trimtab.rl.data.replay import Batch, ReplayBuffer
from trimtab.rl.runs.processes import World

FORMAT = 2
MANIFEST, LEARNER, REPLAY, LAST = "manifest.json", "learner", "replay", "last"
STORED = "$stored"


@dataclass
class CheckpointConfig:
    """``--checkpoint.*``."""

    # Environment steps between two checkpoints (0: none, not even at a signal).
    every: int = 5000
    # Newest checkpoints that are kept.
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError("--checkpoint.every", f"cannot be negative, got {self.every}")
        if self.keep < 1:
            raise UserError("--checkpoint.keep", f"must be at least 1, got {self.keep}")


def pack(tree: Any, tensors: Batch, place: str = "") -> Any:
    """The JSON form of nested dicts and lists; tensors and arrays in it go to ``tensors``.

    Raises:
        TypeError: a value that has no such form, so that nothing is left out unnoticed.
    """
    if isinstance(tree, Tensor | np.ndarray):
        value = torch.as_tensor(tree).detach().cpu()
        tensors[place] = value.clone(memory_format=torch.contiguous_format)
        return {STORED: "tensor" if isinstance(tree, Tensor) else "array"}
    if isinstance(tree, Mapping):
        return {str(key): pack(value, tensors, f"{place}.{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple | deque):
        return [pack(value, tensors, f"{place}.{index}") for index, value in enumerate(tree)]
    if isinstance(tree, np.generic):
        return tree.item()
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{place}: a {type(tree).__name__} has no place in a checkpoint")


def unpack(tree: Any, tensors: Batch, place: str = "") -> Any:
    """The inverse of ``pack``; tuples and deques come back as lists."""
    if isinstance(tree, dict):
        if STORED in tree:
            return tensors[place] if tree[STORED] == "tensor" else tensors[place].numpy()
        return {key: unpack(value, tensors, f"{place}.{key}") for key, value in tree.items()}
    if isinstance(tree, list):
        return [unpack(value, tensors, f"{place}.{index}") for index, value in enumerate(tree)]
    return tree


@dataclass
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        folder: where it lies.
        manifest: its manifest.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def env_steps(self) -> int:
        return self.manifest["env_steps"]

    @property
    def processes(self) -> int:
        """How many processes wrote it."""
        return self.manifest["processes"]

    @property
    def beside(self) -> dict[str, Any]:
        """What the recipe keeps in it."""
        return self.manifest["beside"]

    def read(self, name: str) -> dict[str, Any]:
        """``learner``, or ``process-0``."""
        content = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        return unpack(content["state"], load_file(self.folder / f"{name}.safetensors"))

    def rows(self, process: int) -> list[tuple[int, Batch]]:
        """The replay of a process, oldest first: number of the first row, and rows."""
        found = []
        for name in sorted(self.manifest["files"]):
            if name.startswith(f"{REPLAY}/{process}-"):
                found.append((_start(name), load_file(self.folder / name)))
        return found


def _start(name: str) -> int:
    return int(name.rpartition("-")[2].removesuffix(".safetensors"))


@dataclass
class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: holds them.
        config: how often, and how many.
        belongs: the run they belong to, as JSON values; kept in the manifest.
        world: the processes, each of which writes its own part.

    Attributes:
        beside: asked at each checkpoint for what the recipe wants to find in it again, as JSON values.
        texts: files to write into each checkpoint, by name (the run's config).
    """

    folder: Path
    config: CheckpointConfig
    belongs: dict[str, Any]
    world: World
    beside: Callable[[], dict[str, Any]] = dict
    texts: dict[str, str] = field(default_factory=dict)
    _saved: int = -1
    _files: dict[str, dict[str, Any]] = field(default_factory=dict)  # of this process's replay, by name
    _stop: int = 0  # rows of the replay in them

    def due(self, env_steps: int) -> bool:
        """Whether a checkpoint is due, by environment steps of all processes."""
        every = self.config.every
        return bool(every) and env_steps // every > max(self._saved, 0) // every

    def save(self, env_steps: int, shared: dict, own: dict, replay: ReplayBuffer) -> Path:
        """Write a checkpoint; all processes call it together.

        Args:
            env_steps: its name.
            shared: state that all processes share; the main one's is written.
            own: state of this process.
            replay: of this process; its new rows are written.

        Raises:
            UserError: it cannot be written. What was half-written is gone, earlier ones are as they were.
        """
        target = self.folder / f"{env_steps:06d}"
        if self._saved == env_steps and target.exists():
            return target
        work = self.folder / f".{target.name}.tmp"
        if self.world.main:
            self._try(lambda: self._begin(work), work)
        else:
            self._try(lambda: None, work)
        written: dict[str, dict[str, Any]] = {}
        self._try(lambda: written.update(self._write_own(work, own, replay)), work)
        parts = self.world.gather(written)
        finish = (lambda: self._finish(work, target, shared, parts)) if self.world.main else (lambda: None)
        self._try(finish, work)
        self._saved = env_steps
        self._files = {name: entry for name, entry in written.items() if name.startswith(REPLAY)}
        self._stop = replay.added
        return target

    def _try(self, part: Callable[[], Any], work: Path) -> None:
        """Do this process's share of a part; should any process fail, all give up together."""
        error: Exception | None = None
        try:
            part()
        except (OSError, SafetensorError) as caught:
            error = caught
        if self.world.all(error is None):
            return
        if self.world.main:
            shutil.rmtree(work, ignore_errors=True)
        said = reason(error) if error else "another process could not"
        whole = [place.name for place in self._folders()]
        kept = f"the last whole one is {self.folder / whole[0]}" if whole else "there is none yet"
        raise UserError(
            "--output_dir",
            f"cannot write a checkpoint to {self.folder} ({said}); {kept}; make room, then go on with "
            "--resume=true",
        )

    def _begin(self, work: Path) -> None:
        for left in self.folder.glob(".*.tmp"):  # of runs that were killed while they wrote
            left.unlink() if left.is_symlink() else shutil.rmtree(left, ignore_errors=True)
        (work / REPLAY).mkdir(parents=True)

    def _write_own(self, work: Path, own: dict, replay: ReplayBuffer) -> dict[str, dict[str, Any]]:
        """Write this process's part and return its files."""
        rank, oldest = self.world.rank, replay.added - len(replay)
        before = self.folder / f"{self._saved:06d}"
        files: dict[str, dict[str, Any]] = {}
        stop = oldest
        if self._saved >= 0 and self._stop > oldest:
            needed = {name: e for name, e in self._files.items() if _start(name) + e["rows"] > oldest}
            try:
                for name in needed:
                    link_or_copy(before / name, work / name)
                files, stop = dict(needed), self._stop
            except FileNotFoundError:  # somebody removed that checkpoint: all rows anew
                files, stop = {}, oldest
        if stop < replay.added:
            name = f"{REPLAY}/{rank}-{stop:012d}.safetensors"
            write(replay.rows(stop, replay.added), work / name)
            files[name] = entry(work / name) | {"rows": replay.added - stop}
        return files | write_tree(own, work, f"process-{rank}")

    def _finish(self, work: Path, target: Path, shared: dict, parts: list[dict]) -> None:
        files = write_tree(shared, work, LEARNER)
        for part in parts:
            files |= part
        for name, text in self.texts.items():
            write_text(text, work / name)
            files[name] = entry(work / name)
        manifest = {
            "format": FORMAT,
            "env_steps": int(target.name),
            "processes": self.world.size,
            "belongs": self.belongs,
            "beside": self.beside(),
            "files": files,
        }
        write_text(json.dumps(manifest, indent=1) + "\n", work / MANIFEST)
        sync_folder(work / REPLAY)
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
        for place in self._folders():
            if int(place.name) > int(target.name):
                shutil.rmtree(place, ignore_errors=True)
        for place in self._folders()[self.config.keep :]:
            shutil.rmtree(place, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        if not self.folder.is_dir():
            return []
        found = [place for place in self.folder.iterdir() if place.name.isdigit() and not place.is_symlink()]
        return sorted(found, key=lambda place: int(place.name), reverse=True)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, if any, and a line about each newer one that is not whole.

        Half-written folders of a run that was killed are left for the next ``save`` to replace.
        """
        notes: list[str] = []
        for folder in self._folders():
            try:
                return Checkpoint(folder, check(folder)), notes
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                notes.append(
                    f"checkpoint {folder.name} is not whole ({reason(error)}); trying the one before"
                )
        return None, notes

    def go_on(self, checkpoint: Checkpoint, replay: ReplayBuffer) -> None:
        """Take up a checkpoint of as many processes: later ones link to the rows that it holds."""
        self._saved = checkpoint.env_steps
        if checkpoint.processes == self.world.size:
            prefix = f"{REPLAY}/{self.world.rank}-"
            files = checkpoint.manifest["files"].items()
            self._files = {name: dict(held) for name, held in files if name.startswith(prefix)}
            self._stop = replay.added


def check(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint all of whose files are as they were written.

    Raises:
        ValueError: a file is missing, of another length or content; or the manifest is broken.
        UserError: it is of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"it lacks {MANIFEST}")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise UserError(
            "--resume",
            f"{folder} was written by another version (format {manifest['format']}, this one reads "
            f"{FORMAT}); begin the run anew in another --output_dir",
        )
    for name in ("env_steps", "processes", "belongs", "beside"):
        manifest[name]
    for name, held in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"it lacks {name}")
        if file.stat().st_size != held["bytes"]:
            raise ValueError(f"{name} has {file.stat().st_size} bytes, {held['bytes']} were written")
        if hash_files([file]) != held["sha256"]:
            raise ValueError(f"{name} has another content than was written")
    return manifest


def write_tree(state: dict, folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Write nested state as a JSON and a safetensors file; returns both files' entries."""
    tensors: Batch = {}
    content = {"state": pack(state, tensors)}
    write(tensors, folder / f"{name}.safetensors")
    write_text(json.dumps(content) + "\n", folder / f"{name}.json")
    names = (f"{name}.json", f"{name}.safetensors")
    return {name: entry(folder / name) for name in names}


def write(tensors: Batch, path: Path) -> None:
    """Save tensors and bring them to the disk.

    By way of a string: safetensors' own writing maps the file, and a full disk then kills the process.
    """
    with open(path, "wb") as file:
        file.write(serialise(tensors))
        file.flush()
        os.fsync(file.fileno())


def write_text(text: str, path: Path) -> None:
    """Write a text and bring it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hash_files([path])}


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
