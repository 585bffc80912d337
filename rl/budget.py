"""How much a steering run may spend, at which pace, and on which seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from trimtab.adapters.errors import UserError, at_least
from trimtab.rl.algorithms import AlgorithmConfig
from trimtab.rl.data.returns import REWARDS
from trimtab.rl.takeover import TakeoverConfig


@dataclass
class TrainConfig:
    """Budget and pace of a steering run; steps, transitions and capacities are those of all processes."""

    # Environment steps to collect; 0 learns from demonstrations alone.
    env_steps: int = 20_000
    # Episodes to collect, in the place of env_steps.
    episodes: int | None = None
    # Gradient steps on the demonstrations (--demos) alone, before the first environment step.
    offline_updates: int = 0
    # Transitions collected with what an untrained actor draws, before the actor takes over. Default of this
    # and the next two: the algorithm's own pace.
    warmup_transitions: int | None = None
    # Transitions in the replay before the first update.
    first_update: int | None = None
    # Gradient steps per collected transition (one transition per executed chunk). With several processes, per
    # transition of each process: each brings a batch of its own to every step.
    updates_per_transition: float | None = None
    # After the last transition everything that learns begins anew, and takes this share of the gradient steps
    # so far on the whole replay; 0: it does not. Default: the algorithm's own.
    restart: float | None = None
    # Whether the gradient steps of the transitions before the first update are made up for at once.
    catch_up: bool = True
    replay_capacity: int = 100_000
    # sparse: -1 a step until success, the lowest return for failing; env: the environment's own reward.
    reward: str = "sparse"
    # Of reward=env: the smallest and the largest reward of a step that the value must hold; the larger one is
    # what a reward is divided by. Default: twice those of the base's evaluation and of the demonstrations.
    reward_range: tuple[float, float] | None = None
    # Where the actor begins: the artefact of a constant noise, or best_constant.safetensors of a probe.
    warm_start: str | None = None
    # Lets the untrained actor act until the learner's policy is as good.
    gate: TakeoverConfig = field(default_factory=TakeoverConfig)
    # Environment steps between two lines of metrics.jsonl.
    log_every: int = 500
    # Largest norm of an optimiser's gradients; default: they are not clipped.
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if self.reward not in REWARDS:
            raise UserError("--train.reward", f"'{self.reward}' is none of {', '.join(REWARDS)}")
        if self.reward_range is not None:
            low, high = self.reward_range
            if self.reward != "env":
                raise UserError("--train.reward_range", "is of --train.reward=env; leave it out")
            if not -math.inf < low < high < math.inf:
                said = f"must be two numbers, the smaller first, got {low}, {high}"
                raise UserError("--train.reward_range", said)
        at_least(1, self, "--train.", "episodes", "first_update", "replay_capacity", "log_every")
        at_least(0 if self.offline_updates else 1, self, "--train.", "env_steps")
        at_least(0, self, "--train.", "warmup_transitions", "offline_updates", "restart")
        if self.restart == math.inf:
            raise UserError("--train.restart", "must be finite, got inf")
        if self.gate.enabled and self.warmup_transitions:
            raise UserError(
                "--train.warmup_transitions",
                "has no effect with --train.gate.enabled=true: the base acts first anyway; leave one out",
            )
        for name in ("updates_per_transition", "clip_norm"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"--train.{name}", f"must be positive, got {value}")
        if self.first_update is not None and self.replay_capacity < self.first_update:
            raise UserError("--train.replay_capacity", f"cannot be below first_update={self.first_update}")

    def share(self, env_steps: int, episodes: int, updates: int) -> float:
        """How much of the run is done, from 0 to 1."""
        if self.episodes:
            return episodes / self.episodes
        return env_steps / self.env_steps if self.env_steps else updates / self.offline_updates

    def check_enough(self) -> None:
        """Raise a ``UserError`` where even chunks of one step would be too few to learn from."""
        if not (self.episodes or self.offline_updates) and self.env_steps < (self.first_update or 0):
            raise UserError(
                "--train.env_steps",
                f"{self.env_steps} give no more transitions than that, learning starts at "
                f"{self.first_update}; raise it, or lower --train.first_update",
            )

    def check_learnt(self, updates: int, transitions: int, lost: int) -> None:
        """Raise a ``UserError`` where a run has ended before its first gradient step.

        ``lost``: episodes that faults have cost it.
        """
        if not updates:
            name = "episodes" if self.episodes else "env_steps"
            slow = transitions >= (self.first_update or 0)
            lower = "updates_per_transition" if slow else "first_update"
            mend = f"raise it, or {'raise' if slow else 'lower'} --train.{lower}"
            without = f" without the {lost} episodes lost to faults" if lost else ""
            raise UserError(
                f"--train.{name}",
                f"{getattr(self, name)} gave {transitions} transitions{without}, learning starts at "
                f"{self.first_update} with {self.updates_per_transition:g} updates for each; {mend}",
            )

    def within_rewards(self, *seen: tuple[float, float] | None) -> TrainConfig:
        """A copy that knows what the environment's rewards may be, by those ``seen`` in several places."""
        rewards = [0.0, *(reward for one in seen for reward in one or ())]
        if self.reward != "env" or self.reward_range or not any(rewards):
            return self
        return replace(self, reward_range=(2.0 * min(rewards), 2.0 * max(rewards)))

    def at_pace_of(self, rl: AlgorithmConfig) -> TrainConfig:
        """A copy whose pace is the algorithm's own wherever it was left open.

        Raises:
            UserError: the replay is too small for it.
        """
        # Without a warm-up where the actor has learnt before it acts, or must earn that it does.
        cold = not self.offline_updates and not self.gate.enabled
        pace = rl.pace | ({} if cold else {"warmup_transitions": 0})
        return replace(self, **{name: v for name, v in pace.items() if getattr(self, name) is None})
