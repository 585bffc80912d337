"""The rival of all steering: filtered behaviour cloning, the base fine-tuned on its own successes."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lerobot.configs.default import DatasetConfig
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import PolicyAdapter, PolicyConfig, load_adapter
from trimtab.policies.noise_samplers import base_noise
from trimtab.recipes.finetune.data import REPO_ID, Recorder
from trimtab.recipes.finetune.rollouts import Rollouts
from trimtab.recipes.finetune.training import FineTuner, TuningConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.runner import PolicyRunner

ROUND_STEPS = 800


class FilteredBC:
    """Rounds of rolling out and of fine-tuning on all successes so far, as ``trimtab lora --from_rollouts``.

    Args:
        policy, folder: the base; loaded anew, because training changes the weights in memory.
        env: the task.
        vec: training environments that keep what was seen.
        config: how to fine-tune.
        seed: first of the training seeds.
        learner_seed: of batches and of the noise in the loss.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        folder: Path,
        env: EnvConfig,
        vec: ChunkVectorEnv,
        config: TuningConfig,
        seed: int,
        learner_seed: int,
    ) -> None:
        self.config, self.learner_seed, self.fps = config, learner_seed, env.fps
        self.tuner = FineTuner(load_adapter(policy), folder, policy, config)
        self.rollouts = Rollouts(PolicyRunner(self.adapter, env), vec, base_noise, seed)

    @property
    def adapter(self) -> PolicyAdapter:
        """The policy with the weights as they are now."""
        return self.tuner.adapter

    def learn(
        self, env_steps: int, grid: int, on_round: Callable[[int, list[tuple[bool, bool]]], None]
    ) -> None:
        """Spend ``env_steps`` environment steps, fine-tuning after every ``grid`` of them.

        Args:
            env_steps: budget.
            grid: environment steps of a round.
            on_round: called after each round with the steps so far and (success, True) of its episodes.
        """
        progress = sys.stderr.isatty()
        with tempfile.TemporaryDirectory(prefix="trimtab-bench-") as work:
            recorder = Recorder(Path(work) / "successes", self.fps)
            for number in range(1, env_steps // grid + 1):
                episodes = self.rollouts.collect(grid, progress=progress)
                successes = [episode for episode in episodes if episode.success]
                if successes:
                    recorder.add(successes)
                    data = DatasetConfig(REPO_ID, root=str(recorder.root))
                    self.tuner.fit(data, self.config.steps or ROUND_STEPS, self.learner_seed + number)
                on_round(self.rollouts.env_steps, [(episode.success, True) for episode in episodes])

    def result(self) -> dict[str, Any]:
        """What the run's record keeps."""
        return {"updates": self.tuner.updates, "trained_parameters": self.tuner.trained_parameters}
