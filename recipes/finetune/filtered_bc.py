"""Filtered behaviour cloning, the baseline of all steering: the base fine-tuned on its own successes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from lerobot.configs.default import DatasetConfig

from trimtab.recipes.finetune.data import REPO_ID, Recorder
from trimtab.recipes.finetune.rollouts import RolloutEpisode, Rollouts
from trimtab.recipes.finetune.training import FineTuner

ROUND_STEPS = 800  # gradient steps of a round by default


@dataclass
class Round:
    """What a round did.

    Attributes:
        number: from 1.
        episodes: those that ended in it.
        losses: of its gradient steps; none where no episode succeeded, for nothing new is to be learnt.
        seconds: what its parts took.
    """

    number: int
    episodes: list[RolloutEpisode]
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def successes(self) -> int:
        return sum(episode.success for episode in self.episodes)


def rounds(
    tuner: FineTuner,
    rollouts: Rollouts,
    recorder: Recorder,
    env_steps: int,
    count: int,
    seed: int,
    progress: bool = True,
) -> Iterator[Round]:
    """Rounds of rolling out and of fine-tuning on all successes so far.

    Args:
        tuner: trains; ``rollouts`` act through its adapter.
        rollouts: of the task.
        recorder: of the successes.
        env_steps: of all rounds together, which share them evenly.
        count: how many rounds.
        seed: round r fine-tunes with the seed ``seed + r``.
        progress: show the bar of the rollouts.
    """
    for number in range(1, count + 1):
        label, marks = f"round {number}/{count}", [time.perf_counter()]
        share = env_steps * number // count - rollouts.env_steps
        this = Round(number, rollouts.collect(share, f"{label}: rollouts", progress))
        marks.append(time.perf_counter())
        if successes := [episode for episode in this.episodes if episode.success]:
            recorder.add(episode.frames() for episode in successes)
            marks.append(time.perf_counter())
            data = DatasetConfig(REPO_ID, root=str(recorder.root))
            steps = tuner.config.steps or ROUND_STEPS
            this.losses = tuner.fit(data, steps, seed + number, f"{label}: fine-tuning")
            marks.append(time.perf_counter())
        parts = ("rollouts", "recording", "training")
        this.seconds = {name: end - start for name, start, end in zip(parts, marks, marks[1:])}
        yield this
