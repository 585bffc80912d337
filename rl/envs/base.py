"""What a learner asks of environments that it acts in chunk by chunk: simulators, a robot, or none."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from trimtab.rl.envs.chunk import ChunkResult, Fault, RawObservation
from trimtab.rl.envs.examine import Description, Findings


class VectorEnv(contextlib.AbstractContextManager["VectorEnv"]):
    """``num_envs`` environments; what a kind of them has no use for stays as it is here.

    ``send`` and ``receive`` are apart so that the caller can do other work while they step.

    Attributes:
        descriptions: what each environment says of itself.
        repeatable: false where an environment says, or has been found, not to repeat an episode.
        busy: seconds for which the environments worked on what the last ``receive`` brought, and
        idle: from then until it was called.
        on_success_key: called once for each name under which environments report success.
        empty: there is no environment at all.
        attended: people start its episodes.
        stopping: asked while waiting for them: whether the run is to end.
        stopped: who of them has ended the run, if anyone.
        written: told of each episode of a robot that is on the disk, and whether a clock goes on.
        episodes: how many of a robot's have been handed on, to be learnt from or dropped.
        not_begun: faults of episodes that could not begin; who goes on without them takes them from here.
    """

    num_envs = 1
    descriptions: list[Description]
    repeatable = attended = empty = False
    busy = idle = 0.0
    stopped, episodes = "", 0

    def __init__(self) -> None:
        self.on_success_key: Callable[[str], None] = lambda key: None
        self.stopping: Callable[[], bool] = lambda: False
        self.written: Callable[[bool], None] = lambda clock: None
        self.not_begun: list[Fault] = []

    @property
    def task_descriptions(self) -> list[str]:
        return [one.instruction for one in self.descriptions]

    @property
    def task_names(self) -> list[str]:
        return [one.task for one in self.descriptions]

    def examine(self, chunk: np.ndarray, move: bool = True) -> Findings:
        """Whether an environment does what it must, and takes actions (T, action_dim)."""
        return Findings(repeatable=False)

    def reset(
        self, seeds: dict[int, int], render: dict[int, bool] | None = None
    ) -> dict[int, RawObservation]:
        """Begin episodes in the environments named in ``seeds``; the observation histories of those that did.

        Of those that people start it is empty where they end the run instead.
        """
        raise NotImplementedError

    def send(self, chunks: dict[int, np.ndarray], next_seeds: dict[int, int | None]) -> None:
        """Start stepping ``chunks`` (each (T, action_dim)). Where an episode ends, that of its next seed
        begins; with ``None``, none does.
        """
        raise NotImplementedError

    def receive(self) -> dict[int, ChunkResult]:
        """Wait for what ``send`` started."""
        raise NotImplementedError

    def keep(self, *where: Any) -> None:
        """Write a robot's episodes to files."""

    def note(self, **arrays: np.ndarray) -> None:
        """What the learner wants to find again in the file of the chunk that runs."""

    def announce(self) -> None:
        """Ask the people who start episodes to do so."""

    def calls(self, seconds: float) -> bool:
        """Whether something that cannot wait (a robot) needs the learner's next action within ``seconds``."""
        return False

    def timing(self) -> dict[str, float]:
        """How well a robot's clock was kept since the last call, for the metrics."""
        return {}

    def close(self) -> None:
        """Let go of everything. Safe to call twice."""

    def __exit__(self, *exc: object) -> None:
        self.close()
