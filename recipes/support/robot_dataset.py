"""The episodes of a robot as a LeRobotDataset, to learn from or to train on: whole after each episode.

LeRobot's own recording is lost where it is killed. So what is appended to is a copy, made of links, which
then takes the dataset's place.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from filelock import FileLock
from lerobot.utils.constants import ACTION, OBS_STATE

import trimtab.rl.envs  # noqa: F401 - first, for it imports LeRobot in less time
from trimtab.adapters.errors import UserError, reason
from trimtab.recipes.finetune.data import Recorder
from trimtab.recipes.support.console import say
from trimtab.recipes.support.reporting import read_json, write_json
from trimtab.rl.envs.robot.config import RobotEnvConfig
from trimtab.rl.envs.robot.episodes import EPISODES, EpisodeRecord, counted_episodes, image_of, read_record

REPO_ID = "trimtab/robot_episodes"
DATASET = "dataset"  # in a run's folder
OF_EPISODES = "robot_episodes.json"  # in the dataset: which folders it holds, in order, and as what


class DatasetKeeper:
    """Keeps the dataset of a run under ``output`` up to date, from one ``written`` episode to the next.

    Where the robot follows the clock, which learning must not miss, a process of low priority does it. That
    one ends by itself where the run is killed.
    """

    def __init__(self, env: Any, output: Path) -> None:
        self.made = output / EPISODES, output / DATASET, env.fps, env.task or ""
        self.process: subprocess.Popen[bytes] | None = None

    def written(self, clock: bool) -> None:
        """An episode is; a ``clock`` goes on meanwhile."""
        if not clock:
            update_dataset(*self.made)
            return
        if self.process is None:
            command = [sys.executable, "-m", __name__, *map(str, self.made)]
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what fails is said at the end
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the run
            )
            os.setpriority(os.PRIO_PROCESS, self.process.pid, 19)
        with contextlib.suppress(BrokenPipeError):
            self._pipe.write(b"\n")
            self._pipe.flush()

    @property
    def _pipe(self) -> IO[bytes]:
        assert self.process and self.process.stdin
        return self.process.stdin

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process is not None:  # it may be starved; nothing is half-written, and the rest is done here
            self.process.kill()
            self.process.communicate()
        episodes, target, fps, _ = self.made
        if count := update_dataset(*self.made):
            minutes = sum(record["steps"] for record in counted_episodes(episodes).values()) / fps / 60
            say(f"{count} episodes, {minutes:.1f} minutes of robot time: {target}")


def write_dataset(episodes: Path, env: Any, output: Path) -> Path:
    """Write the episodes that count below ``episodes`` as a dataset under ``output``, and return it.

    Raises:
        UserError: ``env`` is a robot, whose own episodes would take their place; there are none; or as for
            ``update_dataset``.
    """
    if isinstance(env, RobotEnvConfig):
        mend = "learns without a robot; beside one name the dataset of that run, --demos.root=RUN/dataset"
        raise UserError("--from_episodes", mend)
    target = output / DATASET
    first = next(iter(counted_episodes(episodes).values()), None)
    if first is None:
        raise UserError("--from_episodes", f"{episodes} holds no episode that counts")
    try:
        said = first.get("fps", env.fps), env.task or first.get("task", "")
        count = update_dataset(episodes, target, *said)
    except UserError:
        with contextlib.suppress(OSError):  # a run that begins leaves nothing, so that it may begin again
            _lock(target).unlink()
            output.rmdir()
        raise
    say(f"{count} episodes of {episodes} are the dataset {target}")
    return target


def update_dataset(episodes: Path, target: Path, fps: int, task: str) -> int:
    """Bring the dataset ``target`` up to date with the episodes that count below ``episodes``.

    It is written anew where an outcome was corrected, or an episode recorded once more. It appears whole; one
    process at a time writes it.

    Returns:
        how many episodes it has; 0: there is none

    Raises:
        UserError: an episode is broken, or it cannot be written.
    """
    wanted = {folder.name: _told(folder, record) for folder, record in counted_episodes(episodes).items()}
    if not wanted:
        return 0
    work, before = (target.with_name(f".{target.name}.{name}") for name in ("part", "before"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock(target)), contextlib.ExitStack() as ends:
        ends.callback(shutil.rmtree, work, ignore_errors=True)
        if before.exists() and not target.exists():  # killed between two renames
            before.rename(target)
        for leftover in (work, before):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            held = list(read_json(target / OF_EPISODES).items())
        except (OSError, ValueError):  # there is none, or it was spoilt
            held = []
        if held == [*wanted.items()]:
            return len(held)
        if held != [*wanted.items()][: len(held)]:
            held = []
        elif held:
            shutil.copytree(target, work, copy_function=_link)
        _append(work, fps, task, [episodes / name for name in wanted][len(held) :], len(held))
        write_json(work / OF_EPISODES, wanted)
        if target.exists():
            target.rename(before)
        work.rename(target)
        shutil.rmtree(before, ignore_errors=True)
    return len(wanted)


def _lock(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _told(folder: Path, record: dict[str, Any]) -> dict[str, str]:
    """What tells that an episode is still the one that a dataset has."""
    try:
        content = (folder / "steps.safetensors").read_bytes()
    except OSError as error:
        raise UserError("--output_dir", f"{folder} is no whole episode: {reason(error)}") from error
    return {"outcome": record["outcome"], "sha256": hashlib.sha256(content).hexdigest()}


def _append(dataset: Path, fps: int, task: str, folders: list[Path], held: int) -> None:
    import datasets

    datasets.disable_progress_bars()
    said = read_record(folders[0])
    names = {ACTION: said.get("names"), OBS_STATE: said.get("state_names")}
    try:
        Recorder(dataset, fps, REPO_ID, {key: one for key, one in names.items() if one}, held).add(
            frames(EpisodeRecord.read(folder), task) for folder in folders
        )
    except OSError as error:
        raise UserError("--output_dir", f"the dataset cannot be written: {error}") from error


def _link(source: str, target: str) -> None:
    """LeRobot writes anew only what is JSON; and some disks know no links."""
    if not source.endswith(".json"):
        with contextlib.suppress(OSError):
            return os.link(source, target)
    shutil.copyfile(source, target)


def frames(record: EpisodeRecord, task: str) -> Iterator[dict[str, Any]]:
    """The frames of an episode: what was seen, and the action that the robot says it was sent.

    Where it does not succeed, the last frame is what was seen after the last action.
    """
    steps = [
        (seen, action, bool(human))
        for chunk in record.chunks
        for seen, action, human in zip(chunk.seen[:-1], chunk.executed, chunk.human, strict=True)
    ]
    if record.outcome != "success":
        steps.append((record.chunks[-1].seen[-1], *steps[-1][1:]))
    for number, (seen, action, human) in enumerate(steps, 1):
        last = number == len(steps)
        success = last and record.outcome == "success"
        images = {key: image_of(value) for key, value in seen.items() if key != OBS_STATE}
        yield {
            OBS_STATE: np.asarray(seen[OBS_STATE], np.float32),
            **images,
            ACTION: np.asarray(action, np.float32),
            "next.reward": np.array([float(success)], np.float32),
            "next.success": np.array([success]),
            "next.done": np.array([last]),
            "intervention": np.array([human]),
            "task": task,
        }


def main(episodes: str, target: str, fps: str, task: str) -> None:
    """Update the dataset for each line on stdin, and once more at its end: the run is over, or was killed."""
    made = Path(episodes), Path(target), int(fps), task
    for _ in sys.stdin:
        with contextlib.suppress(UserError):  # the run itself says it, at its end
            update_dataset(*made)
    update_dataset(*made)


if __name__ == "__main__":
    main(*sys.argv[1:])
