"""Plays the person beside the arm: `--robot.person=trimtab.recipes.embedded_arm:ScriptedPerson`."""

import json
import time
from pathlib import Path

import numpy as np

from trimtab.recipes.embedded_arm.arm import MujocoArm
from trimtab.recipes.embedded_arm.pusher import polar

HANDED_BACK = 0.21  # metres from the base's axis: the cube is on its way


class ScriptedPerson:
    """Puts the cube down, says how episodes end, takes over where it was told to.

    Args:
        seed: of the cube's places; an episode's place is the same in every run.
        wrong_labels: share of the episodes whose success is called a failure, and the other way round.
        takeover_every: the last of so many episodes is taken over once its push has failed, and given back
            when the cube is on its way; 0: none is.
        delay_s: seconds that it takes to put the scene right.
        script: what it says instead at a step of an episode: `{"3": {"10": "drop"}}`.
        log: file that gets a line of JSON for each episode that it ended.
    """

    def __init__(
        self,
        seed: int = 0,
        wrong_labels: float = 0.0,
        takeover_every: int = 0,
        delay_s: float = 0.0,
        script: dict[str, dict[str, str]] | None = None,
        log: str | None = None,
    ) -> None:
        self.seed, self.wrong_labels, self.takeover_every = seed, wrong_labels, takeover_every
        self.delay_s, self.script, self.log = delay_s, script or {}, log
        self._episode, self._human, self._lies = 0, False, False
        self._ready_at: float | None = None

    def start(self, robot: MujocoArm, episode: int) -> bool:
        """Whether the scene of ``episode`` is ready; the cube lies there from the first call on."""
        if self._ready_at is None:
            robot.place_cube(self.seed * 1_000_000 + episode)
            self._lies = np.random.default_rng([self.seed, episode, 1]).random() < self.wrong_labels
            self._ready_at, self._episode, self._human = time.monotonic() + self.delay_s, episode, False
        ready = time.monotonic() >= self._ready_at
        if ready:
            self._ready_at = None
        return ready

    def said(self, robot: MujocoArm, step: int) -> str | None:
        """What it calls out after ``step`` actions of the episode."""
        ordered = self.script.get(str(self._episode), {}).get(str(step))
        if ordered or step < 0:
            return ordered
        tip, cube = map(polar, robot.places())
        missed, fallen = tip[1] > cube[1], cube[2] < 0
        if robot.succeeded():
            return self._judged(step, True)
        if self._human and cube[1] > HANDED_BACK and not missed:
            self._human = False
            return "release"
        if fallen or (missed and not self._human and not self._takes_over()):
            return self._judged(step, False)
        if missed and not self._human:
            self._human = True
            return "takeover"
        return None

    def close(self) -> None:
        """There is nothing to close."""

    def _takes_over(self) -> bool:
        return self.takeover_every > 0 and self._episode % self.takeover_every == self.takeover_every - 1

    def _judged(self, step: int, success: bool) -> str:
        said = "success" if success != self._lies else "failure"
        if self.log is not None:
            line = {"episode": self._episode, "step": step, "success": success, "said": said}
            with Path(self.log).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return said
