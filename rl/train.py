"""The training loop: collect chunks with the noise actor, learn while the simulators step."""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported
    from trimtab.rl.runs.threads import spin_briefly

    spin_briefly()

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from trimtab.adapters import UserError
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpaceConfig
from trimtab.rl.algorithms import Algorithm, AlgorithmConfig, DSRLSACConfig, Problem
from trimtab.rl.budget import TrainConfig
from trimtab.rl.collector import Collector, Episode, SuccessWindow
from trimtab.rl.data.decoder import ConditioningSpec, Decoder
from trimtab.rl.data.demonstration_data import DemosConfig, rate_warning, read_demonstrations
from trimtab.rl.data.demonstrations import Demonstrations, TransitionMaker
from trimtab.rl.data.memory import check_replay
from trimtab.rl.data.replay import Batch, ReplayBuffer
from trimtab.rl.diagnostics import calibration
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.checkpoint import Checkpoint, Checkpoints
from trimtab.rl.runs.faults import KINDS, FaultLog, FaultsConfig, Stopped, StopSignals
from trimtab.rl.runs.processes import StepGuard, World, count_outcomes, list_outcomes
from trimtab.rl.runs.progress import Progress
from trimtab.rl.runs.resume import load_trainer, trainer_state
from trimtab.rl.seeds import training_seed
from trimtab.rl.takeover import Gate
from trimtab.rl.warm_start import read_constant

WINDOW = 50  # episodes in the running success rate


@dataclass
class Trainer:
    """One steering run; one of several processes' share of it, where there are several.

    Attributes:
        runner: the frozen policy with the environment's processors.
        vec: training environments.
        accelerator: an ``accelerate.Accelerator``.
        train, rl, noise: configs.
        seed: seeds the networks, the replay, the noise and the episodes.
        on_metrics: called with each line of metrics.
        on_step: called after each chunk with the episodes that ended in it.
        demos: demonstrations that join the replay, if any.
        checkpoints: where to keep what it takes to go on, if anywhere.
        faults_config: how much may go wrong.
        stop: signals that end the run.
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
    checkpoints: Checkpoints | None = None
    faults_config: FaultsConfig = field(default_factory=FaultsConfig)
    stop: StopSignals = field(default_factory=StopSignals)

    def __post_init__(self) -> None:
        self.train = self.train.at_pace_of(self.rl)
        self.demos.check(self.rl)
        self.world = World(self.accelerator)
        rank, size = self.world.rank, self.world.size
        self.progress = self.progress and self.world.main
        torch.manual_seed(self.seed)
        self.space = self.noise.build(self.runner.adapter.noise_spec)
        self.collector = Collector(
            self.runner,
            self.vec,
            self.rl,
            self.train.reward,
            training_seed(self.seed),
            rank,
            size,
            record=self.checkpoints is not None,
        )
        self.gate = Gate(self.train.gate, self.seed + rank)
        if self.train.gate.enabled:
            self.collector.assign = lambda: self.updates > 0 and self.gate()
            self.collector.unsteer()
        feature_dim, observer = self.collector.feature_dim, self.runner.adapter.observer
        observe = observer.config if observer else None
        pixels = observe.pixels if observe else 0
        steps, action_dim = self.runner.adapter.chunk_shape
        self.algorithm: Algorithm = self.rl.build(
            Problem(
                feature_dim - pixels,
                self.space,
                self.accelerator,
                self.collector.returns.bounds,
                steps * action_dim,
                observe,
            )
        )
        spec = self.collector.spec
        if spec:
            spec.check_memory(self.train.replay_capacity, self.rl.conditioning_limit)
            self.algorithm.decode = Decoder(self.runner.adapter, self.space, spec)
        kept = {
            "feature_dim": feature_dim,
            "action_dim": self.space.dim,
            "extra": replay_extra(self.rl, steps * action_dim, self.space.dim, spec),
            "precise": spec.replayed if spec else (),
            "pixels": pixels,
        }
        check_replay(self.train.replay_capacity, **kept)
        stored = kept | {"seed": self.seed + rank, "device": self.accelerator.device}
        self.replay = ReplayBuffer(-(-self.train.replay_capacity // size), **stored)
        self.collector.start(self.algorithm)
        self.demonstrations = self._demonstrate(stored) if self.demos.enabled else None
        if self.train.warm_start:
            self.algorithm.warm_start(read_constant(self.train.warm_start, self.runner.adapter.noise_spec))
        self.world.share(self.algorithm)
        self.guard = StepGuard(self.world, self.train.clip_norm)
        self.guard.attach(self.algorithm)
        if rank:
            torch.manual_seed(self.seed + 1_000_003 * rank)  # from here on, each draws its own
        self.env_steps = self.transitions = self.episodes = self.updates = self.dropped = 0
        self.faults = FaultLog()
        self.tasks = list(dict.fromkeys(self.vec.task_names))
        self.windows = {"": SuccessWindow(WINDOW)}
        if len(self.tasks) > 1:
            self.windows |= {task: SuccessWindow(WINDOW) for task in self.tasks}
        self.returns: deque[float] = deque(maxlen=WINDOW)
        self.reported = False
        self.recent: deque[Episode] = deque(maxlen=20)
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.update_seconds = self.seconds = 0.0
        self._owed, self._logged = 0.0, 0
        self._ready = self._stopping = False
        self._warming = True

    def resume(self, checkpoint: Checkpoint) -> list[str]:
        """Go on where ``checkpoint`` was written; returns lines about what could not be as it was.

        Raises:
            UserError: it does not fit this run.
        """
        notes = load_trainer(self, checkpoint)
        self._ready = self.world.all(len(self.replay) > 0)
        if self.checkpoints:
            self.checkpoints.go_on(checkpoint, self.replay)
        return notes

    def _demonstrate(self, stored: dict[str, Any]) -> Demonstrations:
        """Turn the demonstrations into transitions, as ``stored`` in the replay."""
        task, adapter = self.vec.task_descriptions[0], self.runner.adapter
        data = read_demonstrations(self.demos, adapter, self.train.reward, task)
        spec, size = self.collector.spec, self.demos.batch_size
        make = TransitionMaker(self.runner, self.algorithm, self.train.reward, spec, self.seed, size)
        found = Demonstrations(self.demos, make(data, self.progress), **stored)
        won = sum(episode.succeeded for episode in data.episodes)
        count = f"demonstrations: {len(data.episodes)} episodes, {won} succeed; {len(found)} transitions; "
        told = f"success told by {data.rule}" + ("" if won else " (else: --demos.success=end)")
        notes = [*data.notes, count + told, *rate_warning(data.dataset, self.runner.fps)]
        for note in notes if self.progress else ():
            tqdm.write(note)
        return found

    def run(self) -> Algorithm:
        """Collect ``env_steps`` environment steps, learning meanwhile; return the trained algorithm.

        Raises:
            Stopped: a signal ended it, after a checkpoint.
            UserError: more faults than the limit, after a checkpoint; or the checkpoint cannot be written.
        """
        bar = Progress(
            total=self.train.env_steps,
            initial=min(self.env_steps, self.train.env_steps),
            desc="steering",
            unit="step",
            disable=not self.progress,
        )
        started = time.perf_counter() - self.seconds
        while self.env_steps < self.train.env_steps:
            warming = self.transitions < self.train.warmup_transitions and not self.train.gate.enabled
            self._warming = warming
            self.collector.begin(steering=self.updates > 0 and not warming)
            self._learn()
            before = self.collector.env_steps
            transitions, episodes = self.collector.finish()
            self._store(transitions, episodes, self.collector.env_steps - before)
            self.on_step(episodes)
            self.seconds = time.perf_counter() - started
            bar.update(min(self.env_steps, self.train.env_steps) - bar.n)
            if episodes:
                phase, window = "untrained actor" if warming else "steered", self.windows[""]
                how = f"success {window.rate:.2f}" if self.reported else f"return {self._return():.4g}"
                bar.set_postfix_str(f"{how} (last {len(window)}), {phase}")
            if self.env_steps - self._logged >= self.train.log_every:
                self._log()
            self._keep()
        if self._logged != self.env_steps:
            self._log()
        bar.close()
        if not self.updates:
            raise UserError(
                "--train.env_steps",
                f"{self.train.env_steps} steps gave {self.transitions} transitions, learning starts at "
                f"{self.train.first_update}; raise it, or lower --train.first_update",
            )
        self._save()
        return self.algorithm

    def _log(self) -> None:
        self._logged = self.env_steps
        line = self._metrics(self.seconds)
        if self.world.main:
            self.on_metrics(line)

    def _keep(self) -> None:
        """Write a checkpoint where one is due, or the run has to end; all processes do so together."""
        too_many = self.faults.total > self.faults_config.limit
        if self.checkpoints and (too_many or self._stopping or self.checkpoints.due(self.env_steps)):
            self._save()
        if too_many:
            option, _, message = (self.faults.last or "--faults.limit: on another process").partition(": ")
            raise UserError(
                option,
                f"{message}; stopped after {self.faults.total} faults ({self.faults}), more than "
                f"--faults.limit={self.faults_config.limit}",
            )
        if self._stopping:
            raise Stopped(self.stop.name or "a signal to another process", self.env_steps)

    def _save(self) -> None:
        if self.checkpoints:
            self.checkpoints.save(self.env_steps, *trainer_state(self), self.replay)

    def _learn(self) -> None:
        """Pay the gradient steps owed for the transitions collected so far."""
        if self.transitions < self.train.first_update or not self._ready:
            return
        if self.updates == 0:
            features = [self.world.rows(self.replay.all_features())]
            features += [self.demonstrations.all_features()] if self.demonstrations else []
            self.algorithm.fit_normalizer(torch.cat(features))
        started = time.perf_counter()
        self.algorithm.progress(self.env_steps / self.train.env_steps)
        while self._owed >= 1.0:
            for name, value in self.algorithm.update(self._batch()).items():
                # A step that is left out for NaN or Inf leaves its figures out, too.
                finite = torch.isfinite(value)
                held = torch.where(finite, value, torch.zeros_like(value))
                self.sums[name] = self.sums.get(name, 0.0) + held
                self.counts[name] = self.counts.get(name, 0) + finite.int()
            self.updates += 1
            self._owed -= 1.0
        self.update_seconds += time.perf_counter() - started

    def _batch(self) -> Batch:
        """A batch of the replay, mixed with demonstrations where there are any."""
        if self.demonstrations is None:
            return self.replay.sample(self.rl.batch_size)
        return self.demonstrations.mix(self.replay, self.rl.batch_size, self.env_steps / self.train.env_steps)

    def _store(self, transitions: list, episodes: list[Episode], steps: int) -> None:
        """Take up what a chunk has brought, here and on the other processes."""
        stored = 0
        for transition in transitions:
            try:
                self.replay.add(transition)
                stored += 1
            except ValueError as error:
                self.faults.add("transition", f"--policy.path: {error}")
        for fault in self.collector.lost:
            self.faults.add(*fault)
        skipped = int(self.guard.skipped)
        if skipped:
            self.guard.skipped.zero_()
            # Every process leaves the same steps out.
            count = skipped if self.world.main else 0
            self.faults.add("loss", "--rl.learning_rate: NaN or Inf in a gradient; lower it", count)
        outcomes = [(self.tasks.index(e.task) if e.task else 0, e.steered, e.success) for e in episodes]
        told = [stored, steps, len(self.collector.lost), self.stop(), not len(self.replay)]
        told += [self.collector.reported, sum(episode.total for episode in episodes)]
        numbers = self.world.sum(
            [*map(float, told), *self.faults.take(), *count_outcomes(outcomes, self.tasks)]
        )
        self.collector.lost = []
        if self.world.size > 1:
            outcomes = list_outcomes(numbers[len(told) + len(KINDS) :])
        self.faults.put(numbers[len(told) : len(told) + len(KINDS)])
        added = int(numbers[0])
        self.transitions += added
        self.env_steps += int(numbers[1])
        self.dropped += int(numbers[2])
        self._stopping, self._ready = numbers[3] > 0, numbers[4] == 0
        self.reported |= numbers[5] > 0
        if self.world.size == 1:
            self.returns.extend(episode.total for episode in episodes)
        else:  # of the others only their sum is known
            self.returns.extend([numbers[6] / max(len(outcomes), 1)] * len(outcomes))
        if self.train.catch_up or self.transitions > self.train.first_update:
            self._owed += added * self.train.updates_per_transition / self.world.size
        self.recent.extend(episodes)
        for task, steered, success in outcomes:
            self.windows[""].add(success)
            if len(self.tasks) > 1:
                self.windows[self.tasks[task]].add(success)
            self.gate.add(steered, success)
            self.episodes += 1

    def _metrics(self, elapsed: float) -> dict[str, Any]:
        line: dict[str, Any] = {
            "env_steps": self.env_steps,
            "episodes": self.episodes,
            "transitions": self.transitions,
            "updates": self.updates,
            "success_rate": self.windows[""].rate if self.reported else None,
            "return_mean": self._return() if self.returns else None,
            "success_window": len(self.windows[""]),
            "acting": "untrained" if self._warming else "actor",
        }
        line |= {f"success_rate/{task}": window.rate for task, window in self.windows.items() if task}
        if self.demonstrations is not None:
            line["demo_share"] = self.demonstrations.share(self.env_steps / self.train.env_steps)
        if self.train.gate.enabled:
            line["gate_share"] = self.gate.share if self.updates else 0.0
        if self.faults.total:
            line |= {"faults": self.faults.total, "episodes_dropped": self.dropped}
        line |= self._means()
        line |= calibration(self.algorithm, list(self.recent)) if self.updates and self.world.main else {}
        seconds = {**self.collector.seconds, "update": self.update_seconds}
        if self.world.size > 1:
            seconds["processes_wait"] = self.world.waited
        line |= {f"seconds_{name}": round(value, 3) for name, value in seconds.items()}
        line["seconds_total"] = round(elapsed, 3)
        line |= self._shares(seconds, elapsed)
        return line

    def _return(self) -> float:
        """Mean of the environment's own undiscounted return over the last episodes."""
        return sum(self.returns) / len(self.returns)

    def _shares(self, seconds: dict[str, float], elapsed: float) -> dict[str, float]:
        """Shares of the wall-clock, averaged over the processes, in which one part waited for another."""
        parts = {"learner_waits": "env_wait", "envs_wait": "env_idle", "denoise": "denoise"}
        parts |= {"processes_wait": "processes_wait"} if self.world.size > 1 else {}
        found = self.world.sum([seconds[name] / max(elapsed, 1e-9) for name in parts.values()])
        return {f"seconds_share/{name}": round(v / self.world.size, 4) for name, v in zip(parts, found)}

    def _means(self) -> dict[str, float]:
        """What the updates since the last line reported, averaged over them and the processes."""
        names = sorted(self.sums) if self.world.size > 1 else list(self.sums)
        numbers = [float(self.sums[name]) for name in names] + [float(self.counts[name]) for name in names]
        numbers = self.world.sum(numbers)
        self.sums, self.counts = {}, {}
        pairs = zip(names, numbers[: len(names)], numbers[len(names) :], strict=True)
        return {name: total / count for name, total, count in pairs if count}


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


def main(args: list[str]) -> int:
    """Run ``trimtab adapt``: ``accelerate launch -m trimtab.rl.train`` is the same program.

    It is looked up as the installed command, for this layer knows nothing of recipes.
    """
    (command,) = entry_points(group="console_scripts", name="trimtab")
    return command.load()(["adapt", *args])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
