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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise

from trimtab.adapters.checkpoint.identity import hash_files
from trimtab.adapters.errors import UserError, at_least, reason
from trimtab.rl.data.replay import Batch, ReplayBuffer
from trimtab.rl.runs.packing import pack, unpack
from trimtab.rl.runs.processes import ProcessGroup

FORMAT = 2
MANIFEST, LEARNER, REPLAY, LAST = "manifest.json", "learner", "replay", "last"


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
        names = [n for n in sorted(self.manifest["files"]) if n.startswith(f"{REPLAY}/{process}-")]
        return [(_start(name), load_file(self.folder / name)) for name in names]


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
    world: ProcessGroup
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
        main = self.world.main
        self._try(lambda: self._begin(work) if main else None, work)
        written: dict[str, dict[str, Any]] = {}
        self._try(lambda: written.update(self._write_own(work, own, replay)), work)
        parts = self.world.gather(written)
        self._try(lambda: self._finish(work, target, shared, parts) if main else None, work)
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
        why = reason(error) if error else "another process could not"
        last = next((f"the last whole one is {folder}" for folder in self._folders()), "there is none yet")
        raise UserError(
            "--output_dir",
            f"cannot write a checkpoint to {self.folder} ({why}); {last}; make room, then go on with "
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
            with contextlib.suppress(FileNotFoundError):  # somebody removed that checkpoint: all rows anew
                needed = {name: e for name, e in self._files.items() if _start(name) + e["rows"] > oldest}
                for name in needed:
                    link_or_copy(before / name, work / name)
                files, stop = needed, self._stop
        if stop < replay.added:
            name = f"{REPLAY}/{rank}-{stop:012d}.safetensors"
            rows = write(serialise(replay.rows(stop, replay.added)), work / name)
            files[name] = rows | {"rows": replay.added - stop}
        return files | write_tree(own, work, f"process-{rank}")

    def _finish(self, work: Path, target: Path, shared: dict, parts: list[dict]) -> None:
        files = write_tree(shared, work, LEARNER)
        for part in parts:
            files |= part
        files |= {name: write(text.encode(), work / name) for name, text in self.texts.items()}
        manifest = {
            "format": FORMAT,
            "env_steps": int(target.name),
            "processes": self.world.size,
            "belongs": self.belongs,
            "beside": self.beside(),
            "files": files,
        }
        write(f"{json.dumps(manifest, indent=1)}\n".encode(), work / MANIFEST)
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
    text = json.dumps({"state": pack(state, tensors)}) + "\n"
    parts = {f"{name}.json": text.encode(), f"{name}.safetensors": serialise(tensors)}
    return {name: write(content, folder / name) for name, content in parts.items()}


def write(content: bytes, path: Path) -> dict[str, Any]:
    """Write a file and bring it to the disk; returns its entry for the manifest.

    (safetensors' own writing maps the file, and a full disk then kills the process.)
    """
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hash_files([path])}


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
