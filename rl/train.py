"""The training loop: collect chunks with the noise actor, learn while the simulators step."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from trimtab.adapters import UserError
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpaceConfig
from trimtab.policies.sources import prior_noise, steered_noise
from trimtab.rl.algorithms import Algorithm, AlgorithmConfig, DSRLSACConfig
from trimtab.rl.collector import Collector, Episode, SuccessWindow
from trimtab.rl.decoder import ConditioningSpec, Decoder
from trimtab.rl.demonstration_data import DemosConfig, read_demonstrations
from trimtab.rl.demonstrations import Demonstrations, TransitionMaker
from trimtab.rl.diagnostics import calibration
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.gate import Gate, GateConfig
from trimtab.rl.replay import Batch, ReplayBuffer
from trimtab.rl.returns import REWARDS, value_bounds
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.warm_start import begin_at, read_constant

MAX_SEED = 20_000  # keeps environment seeds below 2^31
WINDOW = 50  # episodes in the running success rate


@dataclass
class TrainConfig:
    """Budget and pace of a steering run."""

    # Environment steps to collect.
    env_steps: int = 20_000
    # Transitions collected with what an untrained actor draws, before the actor takes over.
    warmup_transitions: int = 800
    # Transitions in the replay before the first update.
    first_update: int = 256
    # Gradient steps per collected transition (one transition per executed chunk).
    updates_per_transition: float = 2.0
    # Whether those of the transitions before the first update are made up for at once.
    catch_up: bool = True
    replay_capacity: int = 100_000
    # sparse: -1 for each step until success; env: the environment's own reward.
    reward: str = "sparse"
    # Where the actor begins: the artefact of a constant noise, or best_constant.safetensors of a probe.
    warm_start: str | None = None
    # Lets the untrained actor act until the learner's policy is as good.
    gate: GateConfig = field(default_factory=GateConfig)
    # Environment steps between two lines of metrics.jsonl.
    log_every: int = 500

    def __post_init__(self) -> None:
        if self.reward not in REWARDS:
            raise UserError("--train.reward", f"'{self.reward}' is none of {', '.join(REWARDS)}")
        for name in ("env_steps", "first_update", "replay_capacity", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--train.{name}", f"must be at least 1, got {getattr(self, name)}")
        if not self.updates_per_transition > 0:
            raise UserError(
                "--train.updates_per_transition", f"must be positive, got {self.updates_per_transition}"
            )
        if self.warmup_transitions < 0:
            raise UserError(
                "--train.warmup_transitions", f"cannot be negative, got {self.warmup_transitions}"
            )
        if self.replay_capacity < self.first_update:
            raise UserError("--train.replay_capacity", f"cannot be below first_update={self.first_update}")


@dataclass
class Trainer:
    """One steering run.

    Attributes:
        runner: the frozen policy with the environment's processors.
        vec: training environments.
        accelerator: an ``accelerate.Accelerator``.
        train, rl, noise: configs.
        seed: seeds the networks, the replay, the noise and the episodes.
        on_metrics: called with each line of metrics.
        on_step: called after each chunk with the episodes that ended in it.
        demos: demonstrations that join the replay, if any.
    """

    runner: PolicyRunner
    vec: ChunkVectorEnv
    accelerator: Any
    train: TrainConfig = field(default_factory=TrainConfig)
    rl: AlgorithmConfig = field(default_factory=DSRLSACConfig)
    noise: NoiseSpaceConfig = field(default_factory=FullNoiseConfig)
    seed: int = 0
    on_metrics: Callable[[dict[str, Any]], None] = lambda line: None
    progress: bool = True
    on_step: Callable[[list[Episode]], None] = lambda episodes: None
    demos: DemosConfig = field(default_factory=DemosConfig)

    def __post_init__(self) -> None:
        self.demos.check(self.rl)
        torch.manual_seed(self.seed)
        self.space = self.noise.build(self.runner.adapter.noise_spec)
        self.collector = Collector(
            self.runner,
            self.vec,
            self.space,
            self.rl.gamma,
            self.rl.n_step,
            self.train.reward,
            seed=training_seed(self.seed),
            candidates=self.rl.candidates,
            discount_per=self.rl.discount_per,
            bootstrap_at_time_limit=self.rl.bootstrap_at_time_limit,
            conditioning="conditioning" in self.rl.replayed,
        )
        self.gate = Gate(self.train.gate, self.seed)
        if self.train.gate.enabled:
            self.collector.assign = lambda: self.updates > 0 and self.gate()
            self.collector.unsteer()
        feature_dim, observer = self.collector.feature_dim, self.runner.adapter.observer
        observe = observer.config if observer else None
        pixels = observe.pixels if observe else 0
        steps, action_dim = self.runner.adapter.chunk_shape
        self.algorithm: Algorithm = self.rl.build(
            feature_dim - pixels,
            self.space,
            self.accelerator,
            value_bounds(self.train.reward, self.rl.gamma, self.rl.discount_per, steps),
            steps * action_dim,
            observe,
        )
        spec = self.collector.spec
        if spec:
            spec.check_memory(self.train.replay_capacity, self.rl.conditioning_limit)
            self.algorithm.decode = Decoder(self.runner.adapter, self.space, spec)
        stored = {
            "feature_dim": feature_dim,
            "action_dim": self.space.dim,
            "seed": self.seed,
            "device": self.accelerator.device,
            "extra": replay_extra(self.rl, steps * action_dim, self.space.dim, spec),
            "precise": spec.replayed if spec else (),
            "pixels": pixels,
        }
        self.replay = ReplayBuffer(self.train.replay_capacity, **stored)
        self.demonstrations = self._demonstrate(stored) if self.demos.enabled else None
        if self.train.warm_start:
            noise = read_constant(self.train.warm_start, self.runner.adapter.noise_spec)
            begin_at(self.algorithm.actor, noise)
        self.transitions = self.episodes = self.updates = 0
        self._owed = 0.0
        self._window = SuccessWindow(WINDOW)
        self._recent: deque[Episode] = deque(maxlen=20)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._update_seconds = 0.0

    @property
    def env_steps(self) -> int:
        """Environment steps collected so far."""
        return self.collector.env_steps

    def _demonstrate(self, stored: dict[str, Any]) -> Demonstrations:
        """Turn the demonstrations into transitions, as ``stored`` in the replay."""
        task, adapter = self.vec.task_descriptions[0], self.runner.adapter
        data = read_demonstrations(self.demos, adapter, self.train.reward, task)
        spec, size = self.collector.spec, self.demos.batch_size
        make = TransitionMaker(self.runner, self.space, self.rl, self.train.reward, spec, self.seed, size)
        found = Demonstrations(self.demos, make(data, self.progress), **stored)
        won = sum(episode.succeeded for episode in data.episodes)
        count = f"demonstrations: {len(data.episodes)} episodes, {won} succeed; {len(found)} transitions"
        for note in [*data.notes, count] if self.progress else ():
            tqdm.write(note)
        return found

    def run(self) -> Algorithm:
        """Collect ``env_steps`` environment steps, learning meanwhile; return the trained algorithm."""
        warmup, actor = prior_noise(self.space), steered_noise(self.algorithm.actor)
        if self.train.warm_start:  # the untrained actor as it is now: it goes on to learn while this acts
            warmup = steered_noise(copy.deepcopy(self.algorithm.actor))
        bar = tqdm(
            total=self.train.env_steps,
            desc="steering",
            unit="step",
            dynamic_ncols=True,
            disable=not self.progress,
        )
        started, logged, warming = time.perf_counter(), 0, True
        while self.collector.env_steps < self.train.env_steps:
            warming = self.transitions < self.train.warmup_transitions and not self.train.gate.enabled
            if self.algorithm.selects:
                self.collector.begin_among(None if warming or not self.updates else self.algorithm.select)
            else:
                self.collector.begin(warmup if warming else actor, warmup)
            self._learn()
            transitions, episodes = self.collector.finish()
            self._store(transitions, episodes)
            self.on_step(episodes)
            bar.update(min(self.collector.env_steps, self.train.env_steps) - bar.n)
            if episodes:
                phase = "untrained actor" if warming else "steered"
                bar.set_postfix_str(f"success {self._window.rate:.2f} (last {len(self._window)}), {phase}")
            if self.collector.env_steps - logged >= self.train.log_every:
                logged = self.collector.env_steps
                self.on_metrics(self._metrics(time.perf_counter() - started, warming))
        self.on_metrics(self._metrics(time.perf_counter() - started, warming))
        bar.close()
        if not self.updates:
            raise UserError(
                "--train.env_steps",
                f"{self.train.env_steps} steps gave {len(self.replay)} transitions, learning starts at "
                f"{self.train.first_update}; raise it, or lower --train.first_update",
            )
        return self.algorithm

    def _learn(self) -> None:
        """Pay the gradient steps owed for the transitions collected so far."""
        if len(self.replay) < self.train.first_update:
            return
        if self.updates == 0:
            features = [self.replay.all_features()]
            features += [self.demonstrations.all_features()] if self.demonstrations else []
            self.algorithm.fit_normalizer(torch.cat(features))
        started = time.perf_counter()
        while self._owed >= 1.0:
            metrics = self.algorithm.update(self._batch())
            for name, value in metrics.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1
            self.updates += 1
            self._owed -= 1.0
        self._update_seconds += time.perf_counter() - started

    def _batch(self) -> Batch:
        """A batch of the replay, mixed with demonstrations where there are any."""
        if self.demonstrations is None:
            return self.replay.sample(self.rl.batch_size)
        return self.demonstrations.mix(self.replay, self.rl.batch_size, self.env_steps / self.train.env_steps)

    def _store(self, transitions: list, episodes: list[Episode]) -> None:
        for transition in transitions:
            self.replay.add(transition)
        self.transitions += len(transitions)
        if self.train.catch_up or len(self.replay) > self.train.first_update:
            self._owed += len(transitions) * self.train.updates_per_transition
        for episode in episodes:
            self._window.add(episode.success)
            self._recent.append(episode)
            self.gate.add(episode.steered, episode.success)
            self.episodes += 1

    def _metrics(self, elapsed: float, warming: bool) -> dict[str, Any]:
        line: dict[str, Any] = {
            "env_steps": self.collector.env_steps,
            "episodes": self.episodes,
            "transitions": self.transitions,
            "updates": self.updates,
            "success_rate": self._window.rate,
            "success_window": len(self._window),
            "acting": "untrained" if warming else "actor",
        }
        if self.demonstrations is not None:
            line["demo_share"] = self.demonstrations.share(self.env_steps / self.train.env_steps)
        if self.train.gate.enabled:
            line["gate_share"] = self.gate.share if self.updates else 0.0
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        for name, value in means.items():
            if value != value or value in (float("inf"), float("-inf")):
                raise UserError(
                    "--rl.learning_rate",
                    f"{name} became {value} after {self.updates} updates; no artefact was written; lower it",
                )
        line |= means
        self._sums, self._counts = {}, {}
        line |= calibration(self.algorithm, list(self._recent)) if self.updates else {}
        seconds = {**self.collector.seconds, "update": self._update_seconds}
        line |= {f"seconds_{name}": round(value, 3) for name, value in seconds.items()}
        line["seconds_total"] = round(elapsed, 3)
        return line


def replay_extra(
    rl: AlgorithmConfig, chunk_size: int, dim: int, spec: ConditioningSpec | None = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of what the replay keeps for an algorithm beside the transition, by name.

    Args:
        rl: names it in ``replayed``: ``chunk`` (what was executed), ``candidates`` and ``candidates_u``
            (pairs of the state), the same with ``next_``, and ``conditioning`` (of both states).
        chunk_size: numbers in a chunk, steps * action_dim.
        dim: of the noise space.
        spec: of the conditioning, where it is kept.
    """
    shapes: dict[str, tuple[int, ...]] = {"chunk": (chunk_size,)}
    for before in ("", "next_"):
        shapes[f"{before}candidates"] = (rl.candidates, chunk_size)
        shapes[f"{before}candidates_u"] = (rl.candidates, dim)
    kept = {name: shapes[name] for name in rl.replayed if name != "conditioning"}
    return kept | (spec.replayed if spec else {})


def training_seed(seed: int) -> int:
    """First environment seed of a run: far from those of evaluation, demonstration and other runs."""
    return 100_000_000 + seed * 100_000
