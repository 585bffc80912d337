"""``golden_ticket``: the best constant noise, by successive halving within a budget of episodes.

Some frozen policies succeed far more often under one well-chosen noise than under fresh draws. No gradient
and no critic: constants compete on paired episodes, and those that do worst drop out, round by round
(successive halving: Jamieson and Talwalkar, arXiv 1502.07943; Karnin et al., ICML 2013).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trimtab.adapters.errors import UserError, at_least
from trimtab.policies.actor import ActorConfig, NoiseActor, constant_actor
from trimtab.policies.noise_space import ConstantNoiseConfig, NoiseSpace, NoiseSpaceConfig
from trimtab.rl.algorithms.acting import PLAIN_RUN, RunRequest, TrainingResult
from trimtab.rl.algorithms.base import AlgorithmConfig, Problem
from trimtab.rl.envs.base import VectorEnv
from trimtab.rl.evaluation import evaluate
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.seeds import SEEDS_PER_RUN, training_seed
from trimtab.rl.statistics import wilson_interval


@AlgorithmConfig.register_subclass("golden_ticket")
@dataclass
class GoldenTicketConfig(AlgorithmConfig):
    """Settings of the search. It takes none of the settings that all other algorithms share."""

    # Constant noises drawn from the prior.
    candidates: int = 32
    # Episodes in all.
    budget: int = 500
    # Share of the constants that each round leaves in.
    keep: float = 0.5
    actor: ActorConfig = field(default_factory=ActorConfig)

    pace: ClassVar[dict[str, Any]] = {}
    replayed = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(2, self, "--rl.", "candidates")
        if not 0.0 < self.keep < 1.0:
            raise UserError("--rl.keep", f"is a share, above 0 and below 1, got {self.keep}")
        if self.budget > SEEDS_PER_RUN:
            raise UserError("--rl.budget", f"must be at most {SEEDS_PER_RUN}, got {self.budget}")
        least = sum(sizes(self.candidates, self.keep))
        if self.budget < least:
            raise UserError(
                "--rl.budget",
                f"{self.candidates} constants take at least {least} episodes, got {self.budget}; raise it, "
                "or lower --rl.candidates or --rl.keep",
            )

    def check(self, space: NoiseSpace, run: RunRequest = PLAIN_RUN) -> None:
        refused = (
            (space.uses_features, "--noise.type", "seeks one noise for all observations; use constant"),
            (run.tasks > 1, "--env.task", "seeks a noise for one task at a time; name one"),
            (run.processes > 1, "--rl.type", "runs in one process; launch it with --num_processes=1"),
            (run.resume, "--resume", "keeps no checkpoints; begin it anew"),
            (run.warm_start, "--train.warm_start", "draws all of its constants itself"),
            (run.attended, "--rl.type", "tries constants on the same starts, which a robot cannot repeat"),
        )
        for asked, option, why in refused:
            if asked:
                raise UserError(option, f"golden_ticket {why}")

    def without_success(self, reward: str) -> tuple[str, str]:
        return "--rl.type", "golden_ticket counts successes; take another --rl.type, with --train.reward=env"

    def within(self, env_steps: int, episode_steps: Callable[[], int]) -> GoldenTicketConfig:
        budget, candidates = max(2, env_steps // episode_steps()), self.candidates
        while candidates > 2 and 2 * sum(sizes(candidates, self.keep)) > budget:
            candidates //= 2
        return replace(self, budget=budget, candidates=candidates)

    def make_trainer(self, runner: Any, vec: Any, noise: NoiseSpaceConfig, seed: int, **options: Any) -> Any:
        return TicketSearch(runner, vec, self, noise, seed, **options)

    def build(self, problem: Problem) -> NoReturn:
        raise TypeError("golden_ticket is run by TicketSearch")


def sizes(candidates: int, keep: float) -> list[int]:
    """How many constants are in each round: 8 at a half -> [8, 4, 2]."""
    found, left = [], candidates
    while left > 1:
        found.append(left)
        left = min(left - 1, math.ceil(left * keep))
    return found


def episodes_each(counts: list[int], budget: int) -> list[int]:
    """Episodes of each constant in each round: what is left, shared equally among the rounds left.

    ``counts`` are the constants in each round; ``budget`` is at least their sum.
    """
    each = []
    for index, count in enumerate(counts):
        each.append(max(1, budget // (len(counts) - index) // count))
        budget -= each[-1] * count
    return each


@dataclass
class Ticket(TrainingResult):
    """What a search found: the best constant, ``noise`` (*spec.shape), and an actor that always takes it.

    ``successes`` and ``episodes`` (candidates,) are those of the search. The winner's rate there is biased
    upwards, for it is the best of many: evaluate it on other episodes.
    """

    actor: NoiseActor
    noise: Tensor
    successes: np.ndarray
    episodes: np.ndarray


@dataclass
class TicketSearch:
    """Runs the search; to recipes it is what ``Trainer`` is for the other algorithms.

    Every round, the constants left meet the same new episodes, and all of their episodes so far decide who
    stays. (They have met the same ones, so that luck of the draw counts for all alike.) ``seed`` seeds
    constants and episodes; ``on_metrics`` gets a line per round; ``env_steps`` and ``episodes`` are spent.
    """

    runner: PolicyRunner
    vec: VectorEnv
    rl: GoldenTicketConfig = field(default_factory=GoldenTicketConfig)
    noise: NoiseSpaceConfig = field(default_factory=ConstantNoiseConfig)
    seed: int = 0
    on_metrics: Callable[[dict[str, Any]], None] = lambda line: None
    progress: bool = True
    env_steps: int = field(init=False, default=0)
    episodes: int = field(init=False, default=0)
    updates: ClassVar[int] = 0  # of gradient
    checkpoints: ClassVar[None] = None

    def __post_init__(self) -> None:
        self.space = self.noise.build(self.runner.adapter.noise_spec)
        self.rl.check(self.space)

    def draw(self) -> Tensor:
        """The constants, (candidates, *spec.shape): prior draws, clipped to what an actor can make."""
        prior = self.runner.prior(self.rl.candidates, torch.Generator().manual_seed(self.seed))
        reach = 0.999 * self.rl.actor.mean_limit * self.space.bound
        return self.space.expand(self.space.project(prior).clamp(-reach, reach), prior)

    def run(self) -> Ticket:
        """Spend the budget and return the best constant."""
        started, noises = time.perf_counter(), self.draw()
        counts = sizes(self.rl.candidates, self.rl.keep)
        successes = np.zeros(self.rl.candidates, dtype=np.int64)
        episodes = np.zeros_like(successes)
        left, first = np.arange(self.rl.candidates), training_seed(self.seed)
        each = episodes_each(counts, self.rl.budget)
        for number, (count, share) in enumerate(zip(counts, each, strict=True), 1):
            left = _best(left, successes, episodes, count)
            seeds = list(range(first, first + share))
            first += share
            label = f"round {number} of {len(counts)}: {count} constants"
            fed = noises[left].repeat_interleave(share, 0)
            outcome = evaluate(self.runner, self.vec, fed, seeds * count, label, progress=self.progress)
            successes[left] += outcome.successes.reshape(count, share).sum(1)
            episodes[left] += share
            self.env_steps += int(outcome.steps.sum())
            self.episodes += share * count
            best = int(_best(left, successes, episodes, 1)[0])
            low, high = wilson_interval(int(successes[best]), int(episodes[best]))
            if self.progress:
                tqdm.write(
                    f"{label}, episodes each: {share}; best {successes[best]}/{episodes[best]} "
                    f"[{100 * low:.1f}, {100 * high:.1f}] %, all {outcome.successes.sum()}/{share * count}"
                )
            self.on_metrics(
                {
                    "env_steps": self.env_steps,
                    "episodes": self.episodes,
                    "updates": self.updates,
                    "round": number,
                    "candidates": count,
                    "success_rate": float(outcome.successes.sum() / (share * count)),
                    "success_window": share * count,
                    "return_mean": float(outcome.returns.mean()),
                    "acting": "constants",
                    "best_success": float(successes[best] / episodes[best]),
                    "best_episodes": int(episodes[best]),
                    "best_ci95": [low, high],
                    "seconds_total": round(time.perf_counter() - started, 3),
                }
            )
        actor = constant_actor(noises[best], self.space, self.rl.actor)
        return Ticket(actor, noises[best], successes, episodes)


def _best(left: np.ndarray, successes: np.ndarray, episodes: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` of the candidates ``left`` with the highest rates; of equals, the first drawn."""
    rates = successes[left] / np.maximum(episodes[left], 1)
    return left[np.sort(np.argsort(-rates, kind="stable")[:count])]
