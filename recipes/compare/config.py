"""Options of `trimtab compare`, and the methods that can be named."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lerobot.configs.default import DatasetConfig
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import PolicyConfig, UserError
from trimtab.adapters.errors import at_least
from trimtab.policies.observe import ObserveConfig
from trimtab.recipes.support.option_dicts import Options
from trimtab.recipes.support.shared_configs import EVALUATION_SEED, EpisodesConfig, MachineConfig
from trimtab.rl.data.returns import REWARDS
from trimtab.rl.runs.checkpoint import CheckpointConfig
from trimtab.rl.seeds import MAX_SEED

# Options of each method, by its name; a plugin may add its own.
METHODS: dict[str, Options] = yaml.safe_load(Path(__file__).with_name("methods.yaml").read_text("utf-8"))
ALL = "base,zero_noise,golden_ticket,steered,lora,lora_rollouts,residual,dsrl_sac_paper_short"


@dataclass
class CompareConfig:
    """``trimtab compare``."""

    # Report on these folders of `trimtab adapt`, `lora`, `eval` or `demo`; nothing is run then.
    runs: list[Path] = field(default_factory=list)
    # The base policy, and its environment.
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    env: EnvConfig | None = None
    # What actors and critics look at.
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    # Comma-separated tasks to specialise on, one after the other; default: --env.task.
    tasks: str = ""
    # Comma-separated names; recipes/compare/README.md lists them.
    methods: str = ALL
    # Changes to a method's settings, by its name: {steered: {noise: {type: repeat}}}.
    settings: dict[str, Any] = field(default_factory=dict)
    # What all of them learn from, as --train.reward of `trimtab adapt`: sparse (success) or env.
    reward: str = "sparse"
    # Over all tasks and seeds: the method whose probability of improvement over each other is told.
    improved: str = "steered"
    # And the one whose final level the others are to reach, with how many of its steps.
    reach: str = ""
    # How many seeds (3: 0, 1 and 2), or which, separated by commas.
    seeds: str = "3"
    # Environment steps of each run, and between two evaluations (a round of lora_rollouts; default: a tenth).
    env_steps: int = 20_000
    grid: int | None = None
    # Episodes of each of these evaluations, and of others at the end.
    n_episodes: int = 100
    final_episodes: int = 200
    # Demonstrations for `lora`; default: those that an embedded base was made from.
    dataset: DatasetConfig | None = None
    # Comma-separated tasks on which forgetting is measured; default: an embedded base's other tasks.
    other_tasks: str | None = None
    # Episodes on each of them, before and after.
    other_episodes: int = 40
    # Environments of an evaluation, and of training.
    batch_size: int = 50
    num_envs: int = 8
    # Of what steers: the same command takes a run up that was stopped.
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    # Episodes in the video of each method.
    videos: int = 4
    # Run each method in a process of its own, so that its memory and its CPU time are its own.
    isolate: bool = True
    # Make this one run and no report: TASK,METHOD,SEED (what such a process is called with).
    only: str = ""
    # An earlier one's finished runs are kept. Default: outputs/compare/<date>/<time>.
    output_dir: Path | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "--", "env_steps", "grid", "n_episodes", "final_episodes", "batch_size", "num_envs")
        at_least(0, self, "--", "other_episodes", "videos")
        if self.reward not in REWARDS:
            raise UserError("--reward", f"'{self.reward}' is none of {', '.join(REWARDS)}")
        if self.grid is None:  # as many points, up to ten, as the budget has equal parts
            self.grid = self.env_steps // next(n for n in range(10, 0, -1) if self.env_steps % n == 0)
        if self.env_steps % self.grid:
            raise UserError(
                "--grid", f"--env_steps={self.env_steps} must be a multiple of it, for an equal budget"
            )
        for option, what, names in (
            ("--methods", "", self.names()),
            ("--settings", "method ", self.settings),
        ):
            for name in names:
                if name not in METHODS:
                    raise UserError(option, f"there is no {what}'{name}'; choose from {', '.join(METHODS)}")
        for option, name, default in (("--improved", self.improved, "steered"), ("--reach", self.reach, "")):
            if name not in (default, *self.names()) and not self.runs:
                raise UserError(option, f"'{name}' takes no part; choose from {', '.join(self.names())}")
        self.seed_list()

    def names(self) -> list[str]:
        """The methods, the base first: all others are compared with it."""
        return list(
            dict.fromkeys(["base", *(name.strip() for name in self.methods.split(",") if name.strip())])
        )

    def seed_list(self) -> list[int]:
        """The training seeds."""
        text = self.seeds.strip()
        if text.isdecimal() and 0 < int(text) <= MAX_SEED:
            return list(range(int(text)))
        try:
            seeds = [int(part) for part in text.split(",") if part.strip()]
        except ValueError:
            seeds = []
        if not seeds or not all(0 <= seed <= MAX_SEED for seed in seeds):
            raise UserError(
                "--seeds", f"is a list such as 0,1,2 of numbers from 0 to {MAX_SEED}, got '{self.seeds}'"
            )
        return list(dict.fromkeys(seeds))

    @property
    def episodes(self) -> EpisodesConfig:
        """The episodes of each point of the grid, and of the videos."""
        return EpisodesConfig(n_episodes=self.n_episodes, batch_size=self.batch_size, videos=self.videos)

    @property
    def final_seeds(self) -> list[int]:
        """Those of the end."""
        first = EVALUATION_SEED + self.n_episodes
        return list(range(first, first + self.final_episodes))
