"""Options that commands share: the episodes to evaluate policies on, and what of the machine to use."""

from dataclasses import dataclass

import torch

from trimtab.adapters.errors import UserError, at_least
from trimtab.recipes.support.console import default_threads

SEED_LIMIT = 50_000_000  # from here on seeds belong to demonstrations and training
EVALUATION_SEED = 1_000_000  # first episode seed of an evaluation
SELECTION_SEED = 2_000_000  # first episode seed on which constant noises compete


@dataclass
class EpisodesConfig:
    """Which episodes policies are evaluated on."""

    # Episodes per policy; all policies get the same ones.
    n_episodes: int = 200
    # How many of those zero noise, the best constant and the untrained actor get at most; default: all.
    baseline_episodes: int | None = None
    # Environments that run at the same time.
    batch_size: int = 40
    # First episode seed.
    seed: int = EVALUATION_SEED
    # Random constant noises to search for the best one (0: leave this baseline out).
    constant_candidates: int = 16
    # Episodes for each of them in that search, on seeds of their own.
    constant_episodes: int = 20
    # Episodes to render to a video (0: none).
    videos: int = 4

    def __post_init__(self) -> None:
        at_least(1, self, "--eval.", "n_episodes", "baseline_episodes", "batch_size", "constant_episodes")
        at_least(0, self, "--eval.", "constant_candidates", "videos", "seed")
        last, selection = self.seed + self.n_episodes, SELECTION_SEED + self.constant_episodes
        if self.constant_candidates and self.seed < selection and last > SELECTION_SEED:
            raise UserError(
                "--eval.seed", f"{SELECTION_SEED} to {selection} are the seeds on which constants are chosen"
            )
        if last > SEED_LIMIT:
            raise UserError("--eval.seed", f"stay below {SEED_LIMIT}, where demonstrations start")

    @property
    def seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.n_episodes))

    @property
    def baseline_seeds(self) -> list[int]:
        return self.seeds[: self.baseline_episodes]


@dataclass
class EvalConfig(EpisodesConfig):
    """How policies are evaluated."""

    # Take the mean of the actor instead of a sample.
    deterministic: bool = True


@dataclass
class MachineConfig:
    """How much of the machine a run may use."""

    # Simulator processes (0 steps the environments in the main process); default: one, and one on every core
    # where the policy has cameras, for rendering then takes most of the time.
    workers: int | None = None
    # Threads of torch; default: what OMP_NUM_THREADS says, else the cores that the workers leave, or all but
    # one where the number of workers is a default.
    threads: int | None = None

    def __post_init__(self) -> None:
        at_least(0, self, "--machine.", "workers")
        at_least(1, self, "--machine.", "threads")

    def apply(self) -> None:
        torch.set_num_threads(self.threads or default_threads(1 if self.workers is None else self.workers))
