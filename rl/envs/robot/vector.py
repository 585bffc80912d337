"""The learner's side of a robot.

It cannot pause, repeat or reset itself. A person starts each episode; while they put the scene right the
learner pays its debt of gradient steps. Episodes go to files before anything is learnt from them, and a run
that goes on takes up from these what its checkpoint has not seen.
"""

import contextlib
import json
import math
import secrets
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import draccus
import numpy as np
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import OBS_IMAGE, OBS_IMAGES, OBS_STATE

from trimtab.adapters.errors import UserError
from trimtab.rl.envs.base import VectorEnv
from trimtab.rl.envs.chunk import ChunkResult, RawObservation, stack_observations
from trimtab.rl.envs.examine import Description, Findings
from trimtab.rl.envs.robot.config import RobotEnvConfig
from trimtab.rl.envs.robot.episodes import Chunk, EpisodeRecord, episode_folders, image_of
from trimtab.rl.envs.robot.pace import Pace
from trimtab.rl.envs.robot.reward_model import RewardModel
from trimtab.rl.envs.robot.wire import LearnerLink, Lost

START_S = 120.0  # for a station on this machine to connect its robot
POLL_S = 0.2
ANSWER_S = 20.0  # beyond what a chunk takes
SUCCESS = "outcome"  # where success is read
ABORTS = "drop", "stop", "Ctrl-C"  # what a person says; everything else is a fault


class RobotVectorEnv(VectorEnv):
    """One robot; people start its episodes."""

    attended = True

    def __init__(self, config: RobotEnvConfig, n_obs_steps: int) -> None:
        super().__init__()
        self.config, self.n_obs_steps = config, n_obs_steps
        # Until when (``time.perf_counter``) the learner may work beside the chunk that runs.
        self._deadline: float | None = None
        self._announced, self._verdict = False, ""
        self._answer: dict[str, Any] | None = None  # of the person, to what was announced
        self.root: Path | None = None
        self.pace = Pace()
        self._recorded: deque[Path] = deque()
        self._playing: EpisodeRecord | None = None
        self._running = EpisodeRecord(0)
        self._history: deque[dict[str, Any]] = deque(maxlen=n_obs_steps)
        self._asked = np.zeros((0, 0), np.float32)
        self._note: dict[str, np.ndarray] = {}
        self._expected = 0.1  # seconds from a chunk's end to the next one's start, as measured
        self._returned = 0.0
        self._child: subprocess.Popen | None = None
        self._token = config.token or secrets.token_hex(8)
        self.link = LearnerLink(config.listen, self._token, config.silence_s, n_obs_steps)
        self.hello: dict[str, Any] = {}
        try:
            self.hello = self._connect()
            config.check_station(self.hello["options"])
            self._blank = {key: np.zeros(shape, np.uint8) for key, shape in self.hello["shapes"].items()}
            self._blank[OBS_STATE] = self._blank[OBS_STATE].astype(np.float32)
            judge = config.reward_model.path
            self._judge = RewardModel(judge, self._blank) if judge else None
        except BaseException:
            self.close()
            raise
        self._history.extend([self._blank] * n_obs_steps)
        task = config.task or ""
        self.descriptions = [Description(task, task or config.type, False, [], self._observation())]

    def _connect(self) -> dict[str, Any]:
        """A station, started here or waited for; what it says of its robot."""
        if self.config.listen:
            print(
                f"waiting for the station: trimtab station --connect={self.link.address} "
                f"--token={self._token} --robot.type=...",
                flush=True,
            )
        else:
            self._end_child()
            config = json.dumps(draccus.encode(self.config, EnvConfig))
            command = [sys.executable, "-m", "trimtab.rl.envs.robot.station"]
            self._child = subprocess.Popen([*command, config, self.link.address, self._token])
        until = time.monotonic() + START_S
        while (hello := self.link.wait(POLL_S)) is None:
            if self._child is not None and self._child.poll() is not None:
                raise UserError("--robot.type", "the station ended before it had connected the robot")
            if self._child is not None and time.monotonic() > until:
                raise UserError("--robot.type", f"the station has not connected the robot in {START_S:g} s")
            if self.stopping():
                return {}
        self._announced, self._answer = False, None  # a new station has not been asked
        if hello != (self.hello or hello):
            raise UserError("--robot.type", "the station that is back has another robot, or other options")
        return hello

    def keep(self, root: Path, learnt: int | None = None) -> None:
        """Write episodes to folders below ``root``; those from number ``learnt`` on are played first."""
        self.root, folders = root, episode_folders(root)
        self._running = EpisodeRecord(max(int(folders[-1].name) + 1 if folders else 0, learnt or 0))
        if learnt is not None:
            self._recorded.extend(folder for folder in folders if int(folder.name) >= learnt)

    @property
    def episodes(self) -> int:  # type: ignore[override]
        return int(self._recorded[0].name) if self._recorded else self._running.number

    def examine(self, chunk: np.ndarray, move: bool = True) -> Findings:
        """Whether actions (T, A) fit the robot; nothing moves."""
        names = self.hello["names"]
        if chunk.shape[1] != len(names):
            raise UserError(
                "--policy.path",
                f"the policy makes {chunk.shape[1]} numbers an action, the robot takes {len(names)}: "
                + ", ".join(names),
            )
        return Findings(repeatable=False, success_key=None)

    def reset(self, seeds: dict[int, int], render: Any = None) -> dict[int, RawObservation]:
        """Wait until the person has started the next episode; empty where the run is to end instead."""
        if self._recorded:
            self._playing = EpisodeRecord.read(self._recorded[0])
            return self._began(self._playing.chunks[0].seen[0] if self._playing.chunks else self._blank)
        if self.stopped:
            return {}
        while True:
            try:
                if not self.link.connected and not self._connect():
                    return {}
                self.announce()
                answer = self._wait_for_person(self._answer)
                self._announced, self._answer = False, None
                break
            except Lost as lost:
                self._announced = False
                print(f"\nthe station is gone ({lost})", flush=True)
        if "stop" in answer:
            self.stopped = answer["stop"]
            return {}
        self._answer = answer if "outcome" in answer else None  # the robot has failed: for `receive`
        return self._began(answer.get("seen", self._blank))

    def announce(self) -> None:
        """Ask the person to put the scene right for the next episode."""
        if not self._recorded and not self._announced and self.link.connected:
            number = self._running.number
            say = f"{self._verdict}episode {number + 1}"
            with contextlib.suppress(Lost):  # `reset` says so
                self.link.send({"kind": "episode", "number": number, "say": say})
                self._announced = True

    def calls(self, seconds: float) -> bool:
        """Whether the arm needs its next chunk within ``seconds``, or the person has started an episode.

        An arm that moves only when it is told to can wait.
        """
        if self._playing or self._recorded or not self.hello["period"]:
            return False
        if self._answer is None and (self._announced or self._deadline is not None):
            with contextlib.suppress(TimeoutError, Lost):
                self._answer = self.link.receive(0.0)  # a chunk's comes early where a person takes over
        late = self._deadline is not None and time.perf_counter() + seconds > self._deadline
        return late or self._answer is not None

    def _wait_for_person(self, answer: dict[str, Any] | None) -> dict[str, Any]:
        """What is seen once the person has started the episode; ``answer`` is what has been said so far."""
        asked, until = False, math.inf
        while answer is None or "ready" in answer:
            if answer:  # from here on nobody thinks
                until = time.monotonic() + self._move_s + ANSWER_S
            try:
                answer = self.link.receive(POLL_S)
            except TimeoutError:
                answer = None
                if time.monotonic() > until:
                    raise self._hung(self._move_s) from None
                if self.stopping() and not asked:
                    self.link.send({"kind": "withdraw"})
                    asked = True
        return answer

    def _began(self, seen: dict[str, Any]) -> dict[int, RawObservation]:
        self._history.extend([seen] * self.n_obs_steps)
        self._returned = time.perf_counter()
        return {0: self._observation()}

    def send(self, chunks: dict[int, np.ndarray], next_seeds: dict[int, int | None]) -> None:
        """Let the robot execute actions (T, A)."""
        now, self._asked = time.perf_counter(), chunks[0].astype(np.float32)
        self._deadline = None
        if self._playing or self._answer:
            return
        self._expected = max(0.9 * self._expected, now - self._returned)
        if period := self.hello["period"]:
            self._deadline = now + len(self._asked) * period - self._expected
        with contextlib.suppress(Lost):  # `receive` says so
            self.link.send({"kind": "chunk", "actions": self._asked})

    def note(self, **arrays: np.ndarray) -> None:
        self._note = arrays

    def receive(self) -> dict[int, ChunkResult]:
        """What came of the chunk; the next episode's observation is for ``reset`` to bring."""
        if self._playing:
            return {0: self._play(self._playing)}
        sent, record, self._deadline = time.perf_counter(), self._running, None
        try:
            answer = self._executed()
        except Lost as lost:
            print(f"\nthe station is gone ({lost}): the episode is dropped", flush=True)
            answer = {"outcome": "abort", "why": f"the station is gone ({lost})", "executed": ()}
        self._returned = time.perf_counter()
        self.busy, self.idle = self._returned - sent, 0.0
        self.stopped = self.stopped or answer.get("stop", "")
        record.outcome, record.why = answer["outcome"], answer["why"]
        count, result = len(answer["executed"]), None
        if count and self._judge and record.outcome in ("running", "timeout"):
            probability = self._judge(answer["seen"][-1])
            if probability > self.config.reward_model.threshold:
                record.outcome, record.why = "success", f"reward model: {probability:.2f}"
        if count:
            chunk = Chunk(
                answer["asked"],
                answer["executed"],
                human=np.full(count, answer["human"]),
                late=answer["late"],
                seen=[self._history[-1], *answer["seen"]],
                gap=answer["gap"],
                note=self._note,
            )
            record.chunks.append(chunk)
            self._history.extend(answer["seen"])
            self.pace.late += answer["late"].tolist()
            self.pace.gaps += [answer["gap"]] if len(record.chunks) > 1 else []
            result = self._result(chunk, record)
        if record.outcome == "running":
            return {0: result} if result else {}
        if self.root is not None:
            held_up = any(chunk.gap > self.config.max_gap_s for chunk in record.chunks)
            facts = {"held_up": held_up, "fps": self.config.fps, "task": self.config.task or ""}
            facts |= {name: self.hello[name] for name in ("names", "state_names")}
            record.write(self.root, {"steered": bool(self._note.get("steered", False)), **facts})
            self.written(bool(self.hello["period"]))
        self._running = EpisodeRecord(record.number + 1)
        self._verdict = f"success ({record.why}); " if record.outcome == "success" and record.why else ""
        return {0: result if result and not result.lost else self._dropped(record)}

    def _executed(self) -> dict[str, Any]:
        """The station's answer to a chunk."""
        answer, self._answer = self._answer, None
        longest = len(self._asked) * self.hello["period"] + self._move_s
        try:
            return answer or self.link.receive(longest + ANSWER_S)
        except TimeoutError:
            raise self._hung(longest) from None

    @property
    def _move_s(self) -> float:
        return self.hello["options"]["move_s"]

    def _hung(self, seconds: float) -> Lost:
        """An answer that should take ``seconds`` does not come: the robot hangs, and its station ends."""
        self.link.drop()
        if self._child is not None:
            self._child.kill()
        return Lost(f"the robot has hung for {seconds + ANSWER_S:.0f} s")

    def _play(self, record: EpisodeRecord) -> ChunkResult:
        """The next chunk of a recorded episode."""
        chunk = record.chunks.pop(0) if record.chunks else None
        self._history.extend(chunk.seen[1:] if chunk else ())
        if chunk and record.chunks:
            return self._result(chunk, EpisodeRecord(record.number))
        self._recorded.popleft()
        self._playing = None
        return self._result(chunk, record) if chunk else self._dropped(record)

    def _result(self, chunk: Chunk, record: EpisodeRecord) -> ChunkResult:
        """A chunk as an algorithm is told of it. A failure is as dear as a time limit: both bootstrap."""
        if record.outcome == "abort":
            return self._dropped(record)
        count, success = len(chunk.executed), record.outcome == "success"
        successes = np.zeros(count, bool)
        successes[-1] = success
        ended = record.outcome != "running"
        differs = self._playing is not None or not np.allclose(chunk.executed, self._asked[:count], atol=1e-4)
        return ChunkResult(
            observation=self._observation(),
            final_observation=self._observation() if ended else None,
            rewards=successes.astype(float),
            successes=successes,
            terminated=success,
            truncated=ended and not success,
            success_key=SUCCESS,
            executed=chunk.executed if differs or chunk.human.any() else None,
            human=bool(chunk.human.any()),
            note=chunk.note,
        )

    def _dropped(self, record: EpisodeRecord) -> ChunkResult:
        why = f"--robot: episode {record.number + 1} dropped: {record.why}"
        return ChunkResult(None, lost=("abort" if record.why in ABORTS else "crash", why))

    def _observation(self) -> RawObservation:
        """The history as LeRobot's environments name it, entries (n_obs_steps, ...)."""
        found = []
        for seen in self._history:
            one: RawObservation = {"agent_pos": np.array(seen[OBS_STATE])}
            prefix = f"{OBS_IMAGES}."
            images = {k.removeprefix(prefix): image_of(v) for k, v in seen.items() if k.startswith(prefix)}
            if images:
                alone = OBS_IMAGE in (self.config.wanted or ()) and len(images) == 1
                one["pixels"] = next(iter(images.values())) if alone else images
            found.append(one)
        return stack_observations(found)

    def timing(self) -> dict[str, float]:
        """See ``Pace.take``."""
        return self.pace.take(self.hello["period"])

    def close(self) -> None:
        """Let the station park and end."""
        if self.link.connected:
            with contextlib.suppress(Lost):
                self.link.send({"kind": "park"})
        self._end_child()
        self.link.close()

    def _end_child(self) -> None:
        """Wait until a station that was started here has parked and ended."""
        if self._child is None:
            return
        try:
            self._child.wait(self.config.move_s + self.config.park_after_s + 10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child = None
