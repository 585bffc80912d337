"""Episodes of a robot as folders: written whole, before anything is learnt from them.

episodes/000017/
    episode.json          outcome and why, who acted, times; the outcome may be corrected by hand
    steps.safetensors     of T steps: seen state (T + 1, n), asked and executed action (T, A), human (T,),
                          late (T,) in seconds
    chunks.safetensors    of C chunks: first step (C,), gap before it in seconds (C,), and what the
                          learner noted (u: (C, dim))
    CAMERA/000042.jpg     of each step; PNG, without loss, of those that the policy acted on
"""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from trimtab.adapters.errors import UserError, reason
from trimtab.rl.runs.checkpoint import sync_folder, write

EPISODES = "episodes"  # in a run's folder
OUTCOMES = ("success", "failure", "timeout", "abort")
RECORD = "episode.json"
CAMERAS = f"{OBS_IMAGES}."


@dataclass
class Chunk:
    """What came of one chunk at the robot.

    Attributes:
        asked, executed: (k, A) actions; what the robot says that it was sent.
        human: (k,) whether the person acted.
        late: (k,) seconds.
        seen: before each step, and after the last one: k + 1 observations by LeRobot's feature names, images
            as they are or as JPEG.
        gap: seconds since the chunk before.
        note: the learner's, arrays by name.
    """

    asked: np.ndarray
    executed: np.ndarray
    human: np.ndarray
    late: np.ndarray
    seen: list[dict[str, Any]]
    gap: float = 0.0
    note: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class EpisodeRecord:
    """An episode of a robot, running or over."""

    number: int
    chunks: list[Chunk] = field(default_factory=list)
    outcome: str = "running"
    why: str = ""

    @property
    def steps(self) -> int:
        return sum(len(chunk.executed) for chunk in self.chunks)

    def write(self, root: Path, facts: dict[str, Any]) -> Path:
        """Write it below ``root``: it appears whole, synced, or not at all.

        Raises:
            UserError: it cannot be written.
        """
        target, work = root / f"{self.number:06d}", root / f".{self.number:06d}.part"
        try:
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed here
            work.mkdir(parents=True)
            last = [self.chunks[-1].seen[-1]] if self.chunks else []
            seen = [one for chunk in self.chunks for one in chunk.seen[:-1]] + last
            joined = {
                name: np.concatenate([getattr(chunk, name) for chunk in self.chunks])
                for name in ("asked", "executed", "human", "late")
                if self.chunks
            }
            if seen:
                joined["state"] = np.stack([one[OBS_STATE] for one in seen])
            starts = np.cumsum([0, *(len(chunk.executed) for chunk in self.chunks)])[:-1]
            notes = {
                name: np.stack([chunk.note[name] for chunk in self.chunks])
                for name in (self.chunks[0].note if self.chunks else ())
            }
            gaps = {"start": starts, "gap": np.array([chunk.gap for chunk in self.chunks])}
            write(save(joined), work / "steps.safetensors")
            write(save(gaps | notes), work / "chunks.safetensors")
            for number, one in enumerate(seen):
                _write_images(work, number, one)
            record = {
                "outcome": self.outcome,
                "why": self.why,
                "steps": self.steps,
                "human_steps": int(sum(chunk.human.sum() for chunk in self.chunks)),
                "cameras": [
                    key.removeprefix(CAMERAS) for key in (seen[0] if seen else ()) if key != OBS_STATE
                ],
                **facts,
            }
            write((json.dumps(record, indent=2) + "\n").encode(), work / RECORD)
            sync_folder(work)
            os.replace(work, target)
            sync_folder(root)
        except OSError as error:
            raise UserError("--output_dir", f"the episode cannot be written: {reason(error)}") from error
        return target

    @staticmethod
    def read(folder: Path) -> EpisodeRecord:
        """The episode that ``write`` left in ``folder``.

        Raises:
            UserError: it is broken, or its outcome is none.
        """
        record = read_record(folder)
        try:
            steps, chunks = load_file(folder / "steps.safetensors"), load_file(folder / "chunks.safetensors")
            starts, gaps = chunks.pop("start"), chunks.pop("gap")
            outcome, why, count = record["outcome"], record["why"], record["steps"]
            seen = [{OBS_STATE: state} for state in steps.get("state", ())]
            for camera in record["cameras"]:
                for number, one in enumerate(seen):
                    one[f"{CAMERAS}{camera}"] = _read_image(folder / camera, number)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError("--output_dir", f"{folder} is no whole episode: {reason(error)}") from error
        ends = [*starts[1:], count][: len(starts)]
        found = EpisodeRecord(int(folder.name), [], outcome, why)
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            part = slice(start, end)
            asked, executed, human, late = (
                steps[name][part] for name in ("asked", "executed", "human", "late")
            )
            note = {name: values[index] for name, values in chunks.items()}
            found.chunks.append(
                Chunk(asked, executed, human, late, seen[start : end + 1], float(gaps[index]), note)
            )
        return found


def episode_folders(root: Path) -> list[Path]:
    """Folders of the whole episodes below ``root``, in order."""
    found = (path.parent for path in root.glob(f"*/{RECORD}") if path.parent.name.isdecimal())
    return sorted(found, key=lambda folder: int(folder.name))


def read_record(folder: Path) -> dict[str, Any]:
    """What ``RECORD`` in ``folder`` says.

    Raises:
        UserError: it is broken, or its outcome is none.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        outcome, _ = record["outcome"], record["steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("--output_dir", f"{folder} is no whole episode: {reason(error)}") from error
    if outcome not in OUTCOMES:
        raise UserError(str(folder / RECORD), f"the outcome is one of {', '.join(OUTCOMES)}")
    return record


def counted_episodes(root: Path) -> dict[Path, dict[str, Any]]:
    """Folders of the whole episodes below ``root`` that were not dropped, in order, and their records."""
    found = {folder: read_record(folder) for folder in episode_folders(root)}
    return {folder: one for folder, one in found.items() if one["outcome"] != "abort" and one["steps"]}


def jpeg(image: np.ndarray) -> bytes:
    """An image (H, W, 3) uint8, compressed."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def image_of(value: Any) -> np.ndarray:
    """The image (H, W, 3) uint8 of an observation's entry, which may be JPEG."""
    return np.array(Image.open(io.BytesIO(value))) if isinstance(value, bytes) else value


def _write_images(folder: Path, number: int, seen: dict[str, Any]) -> None:
    """Without loss, where it was not compressed before."""
    for key, image in seen.items():
        if key.startswith(CAMERAS):
            camera = folder / key.removeprefix(CAMERAS)
            camera.mkdir(exist_ok=True)
            if isinstance(image, bytes):
                (camera / f"{number:06d}.jpg").write_bytes(image)
            else:
                Image.fromarray(image).save(camera / f"{number:06d}.png")


def _read_image(folder: Path, number: int) -> np.ndarray:
    exact = folder / f"{number:06d}.png"
    return np.array(Image.open(exact if exact.is_file() else exact.with_suffix(".jpg")))
