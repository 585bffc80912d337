"""The training loop: collect chunks under what is learnt, learn while the simulators step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from trimtab.adapters import UserError
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpaceConfig
from trimtab.rl.algorithms import Algorithm, AlgorithmConfig, DSRLSACConfig, Problem
from trimtab.rl.budget import TrainConfig
from trimtab.rl.collector import Collector, Episode
from trimtab.rl.data.decoder import Decoder
from trimtab.rl.data.demonstration_data import DemosConfig, read_demonstrations
from trimtab.rl.data.demonstrations import Demonstrations, make_transitions
from trimtab.rl.data.memory import check_replay, replay_layout
from trimtab.rl.data.replay import ReplayBuffer
from trimtab.rl.diagnostics import calibration
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.metrics import RunMetrics
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.checkpoint import LEARNER, Checkpoint, Checkpoints
from trimtab.rl.runs.faults import FaultLog, FaultsConfig, Stopped, StopSignals, lost_notes
from trimtab.rl.runs.processes import ProcessGroup, StepGuard, weights_digest
from trimtab.rl.runs.progress import Progress
from trimtab.rl.runs.reshard import reshard
from trimtab.rl.seeds import rng_state, set_rng_state, training_seed
from trimtab.rl.takeover import Takeover
from trimtab.rl.warm_start import read_constant

# Counters that all processes share.
COUNTERS = ("transitions", "episodes", "updates", "env_steps", "dropped", "_owed", "_logged", "_warming")


@dataclass
class Trainer:
    """One steering run; one of several processes' share of it, where there are several.

    Attributes:
        runner: the frozen policy with the environment's processors.
        vec: training environments.
        accelerator: an ``accelerate.Accelerator``.
        train, rl, noise, demos, faults_config: configs.
        seed: seeds the networks, the replay, the noise and the episodes.
        on_metrics: called with each line of metrics.
        on_step: called after each chunk with the episodes that ended in it.
        checkpoints: where to keep what it takes to go on, if anywhere.
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
        self.world = world = ProcessGroup(self.accelerator)
        self.progress = self.progress and world.main
        torch.manual_seed(self.seed)
        self.space = self.noise.build(self.runner.adapter.noise_spec)
        run = self.runner, self.vec, self.rl, self.train.reward, training_seed(self.seed)
        self.collector = Collector(*run, world.rank, world.size, record=self.checkpoints is not None)
        self.takeover = Takeover(self.train.gate, self.seed + world.rank)
        if self.train.gate.enabled:
            self.collector.assign = lambda: self.updates > 0 and self.takeover()
            self.collector.unsteer()
        self.algorithm = self._build()
        self._make_replay()
        if self.train.warm_start:
            self.algorithm.warm_start(read_constant(self.train.warm_start, self.runner.adapter.noise_spec))
        world.share(self.algorithm)
        self.guard = StepGuard(world, self.train.clip_norm)
        self.guard.attach(self.algorithm)
        if world.rank:
            torch.manual_seed(self.seed + 1_000_003 * world.rank)  # from here on, each draws its own
        self.env_steps = self.transitions = self.episodes = self.updates = self.dropped = 0
        self.faults = FaultLog()
        self.metrics = RunMetrics(world, list(dict.fromkeys(self.vec.task_names)))
        self.recent: deque[Episode] = deque(maxlen=20)
        self.update_seconds = self.seconds = 0.0
        self._owed, self._logged, self._warming = 0.0, 0, True
        self._ready = self._stopping = False

    def _build(self) -> Algorithm:
        """The algorithm for what the collector sees."""
        adapter, spec = self.runner.adapter, self.collector.spec
        observe = adapter.observer.config if adapter.observer else None
        feature_dim = self.collector.feature_dim - (observe.pixels if observe else 0)
        bounds, (steps, action_dim) = self.collector.returns.bounds, adapter.chunk_shape
        algorithm = self.rl.build(
            Problem(feature_dim, self.space, self.accelerator, bounds, steps * action_dim, observe)
        )
        if spec:
            spec.check_memory(self.train.replay_capacity, self.rl.conditioning_limit)  # type: ignore[attr-defined]
            algorithm.decode = Decoder(adapter, self.space, spec)
        return algorithm

    def _make_replay(self) -> None:
        """The replay, this process's share of it, and the demonstrations beside it."""
        adapter, spec, world = self.runner.adapter, self.collector.spec, self.world
        layout = replay_layout(self.rl, adapter, self.space, self.collector.feature_dim, spec)
        check_replay(self.train.replay_capacity, layout)
        settings = layout, self.seed + world.rank, self.accelerator.device
        self.replay = ReplayBuffer(-(-self.train.replay_capacity // world.size), *settings)
        self.collector.start(self.algorithm)
        self.demonstrations: Demonstrations | None = None
        if self.demos.enabled:
            data = read_demonstrations(self.demos, adapter, self.train.reward, self.vec.task_descriptions[0])
            returns = self.collector.returns
            transitions = make_transitions(
                data,
                self.runner,
                self.algorithm,
                returns,
                spec,
                self.seed,
                self.demos.batch_size,
                self.progress,
            )
            self.demonstrations = Demonstrations(self.demos, transitions, *settings)
            for note in data.summary(len(transitions), self.runner.fps) if self.progress else ():
                tqdm.write(note)

    def run(self) -> Algorithm:
        """Collect ``env_steps`` environment steps, learning meanwhile; return the trained algorithm.

        Raises:
            Stopped: a signal ended it, after a checkpoint.
            UserError: more faults than the limit, after a checkpoint; or the checkpoint cannot be written.
        """
        total = self.train.env_steps
        done = min(self.env_steps, total)
        bar = Progress(total=total, initial=done, desc="steering", unit="step", disable=not self.progress)
        started = time.perf_counter() - self.seconds
        while self.env_steps < total:
            self._warming = self.transitions < self.train.warmup_transitions and not self.train.gate.enabled
            self.collector.begin(steering=self.updates > 0 and not self._warming)
            self._learn()
            before = self.collector.env_steps
            transitions, episodes = self.collector.finish()
            self._store(transitions, episodes, self.collector.env_steps - before)
            self.on_step(episodes)
            self.seconds = time.perf_counter() - started
            bar.update(min(self.env_steps, total) - bar.n)
            if episodes:
                phase = "untrained actor" if self._warming else "steered"
                bar.set_postfix_str(f"{self.metrics.outcome()}, {phase}")
            if self.env_steps - self._logged >= self.train.log_every:
                self._log()
            self._keep()
        if self._logged != self.env_steps:
            self._log()
        bar.close()
        if not self.updates:
            raise UserError(
                "--train.env_steps",
                f"{total} steps gave {self.transitions} transitions, learning starts at "
                f"{self.train.first_update}; raise it, or lower --train.first_update",
            )
        self._save()
        return self.algorithm

    def _learn(self) -> None:
        """Pay the gradient steps owed for the transitions collected so far."""
        if self.transitions < self.train.first_update or not self._ready:
            return
        if self.updates == 0:
            features = [self.world.rows(self.replay.all_features())]
            features += [self.demonstrations.all_features()] if self.demonstrations else []
            self.algorithm.fit_normalizer(torch.cat(features))
        started = time.perf_counter()
        share, size = self.env_steps / self.train.env_steps, self.rl.batch_size
        self.algorithm.progress(share)
        while self._owed >= 1.0:
            demos = self.demonstrations
            batch = demos.mix(self.replay, size, share) if demos else self.replay.sample(size)
            self.metrics.add_update(self.algorithm.update(batch))
            self.updates += 1
            self._owed -= 1.0
        self.update_seconds += time.perf_counter() - started

    def _store(self, transitions: list, episodes: list[Episode], steps: int) -> None:
        """Take up what a chunk has brought, here and on the other processes."""
        stored = 0
        for transition in transitions:
            try:
                self.replay.add(transition)
                stored += 1
            except ValueError as error:
                self.faults.add("transition", f"--policy.path: {error}")
        lost, self.collector.lost = self.collector.lost, []
        for fault in lost:
            self.faults.add(*fault)
        if skipped := int(self.guard.skipped):
            self.guard.skipped.zero_()
            count = skipped if self.world.main else 0  # every process leaves the same steps out
            self.faults.add("loss", "--rl.learning_rate: NaN or Inf in a gradient; lower it", count)
        tasks = self.metrics.tasks
        outcomes = [(tasks.index(e.task) if e.task else 0, e.steered, e.success) for e in episodes]
        here = {
            "stored": stored,
            "steps": steps,
            "lost": len(lost),
            "stop": self.stop(),
            "empty": not len(self.replay),
            "reported": self.collector.reported,
            "returns": sum(episode.total for episode in episodes),
        }
        totals, outcomes = self.metrics.exchange(here, outcomes, self.faults)
        self.transitions += int(totals["stored"])
        self.env_steps += int(totals["steps"])
        self.dropped += int(totals["lost"])
        self._stopping, self._ready = totals["stop"] > 0, totals["empty"] == 0
        self.metrics.add_returns([episode.total for episode in episodes], totals, len(outcomes))
        if self.train.catch_up or self.transitions > self.train.first_update:
            self._owed += int(totals["stored"]) * self.train.updates_per_transition / self.world.size
        self.recent.extend(episodes)
        for task, steered, success in outcomes:
            self.metrics.add_episode(task, success)
            self.takeover.add(steered, success)
            self.episodes += 1

    def _log(self) -> None:
        self._logged = self.env_steps
        line = self._line()
        if self.world.main:
            self.on_metrics(line)

    def _line(self) -> dict[str, Any]:
        """A line of metrics; all processes make it together."""
        line: dict[str, Any] = {
            "env_steps": self.env_steps,
            "episodes": self.episodes,
            "transitions": self.transitions,
            "updates": self.updates,
            **self.metrics.rates(),
            "acting": "untrained" if self._warming else "actor",
        }
        if self.demonstrations is not None:
            line["demo_share"] = self.demonstrations.share(self.env_steps / self.train.env_steps)
        if self.train.gate.enabled:
            line["gate_share"] = self.takeover.share if self.updates else 0.0
        if self.faults.total:
            line |= {"faults": self.faults.total, "episodes_dropped": self.dropped}
        line |= self.metrics.means()
        line |= calibration(self.algorithm, list(self.recent)) if self.updates and self.world.main else {}
        seconds = {**self.collector.seconds, "update": self.update_seconds}
        return line | self.metrics.times(seconds, self.seconds)

    def _keep(self) -> None:
        """Write a checkpoint where one is due, or the run has to end; all processes do so together."""
        too_many = self.faults.total > self.faults_config.limit
        if self.checkpoints and (too_many or self._stopping or self.checkpoints.due(self.env_steps)):
            self._save()
        if too_many:
            raise self.faults.error(self.faults_config.limit)
        if self._stopping:
            raise Stopped(self.stop.name or "a signal to another process", self.env_steps)

    def _save(self) -> None:
        if self.checkpoints:
            self.checkpoints.save(self.env_steps, *self.state_dict(), self.replay)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what all processes share, what is this process's own) between two chunks."""
        demos = self.demonstrations
        shared = {name: getattr(self, name) for name in COUNTERS} | {
            "faults": self.faults.counts,
            "metrics": self.metrics.state_dict(),
            "algorithm": self.algorithm.training_state(),
        }
        own = {
            "rng": rng_state(self.accelerator.device),
            "replay": self.replay.state_dict(),
            "demonstrations": demos.state_dict() if demos is not None else None,
            "gate": self.takeover.state_dict(),
            "recent": [asdict(episode) for episode in self.recent],
            "sums": dict(self.metrics.sums),
            "counts": dict(self.metrics.counts),
            "seconds": {"update": self.update_seconds, "total": self.seconds},
            "collector": self.collector.state_dict(),
            "weights": (weights := weights_digest(self.algorithm)),
        }
        if len(set(self.world.gather(weights))) > 1:
            raise RuntimeError("the processes' weights have drifted apart; this is a bug of trimtab")
        return shared, own

    def resume(self, checkpoint: Checkpoint) -> list[str]:
        """Go on where ``checkpoint`` was written; returns lines about what could not be as it was.

        Raises:
            UserError: it does not fit this run.
        """
        try:
            notes = self._load(checkpoint)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                "--resume", f"{checkpoint.folder} does not fit this run ({type(error).__name__}: {error})"
            ) from error
        self._ready = self.world.all(len(self.replay) > 0)
        if self.checkpoints:
            self.checkpoints.go_on(checkpoint, self.replay)
        return notes

    def _load(self, checkpoint: Checkpoint) -> list[str]:
        shared, rank, notes = checkpoint.read(LEARNER), self.world.rank, []
        for name in COUNTERS:
            setattr(self, name, shared[name])
        self.faults.counts |= shared["faults"]
        self.metrics.load_state_dict(shared["metrics"])
        self.algorithm.load_training_state(shared["algorithm"])
        same = checkpoint.processes == self.world.size
        if same:
            own = checkpoint.read(f"process-{rank}")
            for start, rows in checkpoint.rows(rank):
                self.replay.put(start, rows)
            self.replay.load_state_dict(own["replay"])
            if self.demonstrations is not None:
                self.demonstrations.load_state_dict(own["demonstrations"])
            self.recent.extend(Episode(**episode) for episode in own["recent"])
            self.metrics.sums, self.metrics.counts = dict(own["sums"]), dict(own["counts"])
        else:
            own, dropped, note = reshard(checkpoint, self.world, self.collector, self.replay)
            self.dropped += dropped
            notes.append(note)
        self.takeover.load_state_dict(own["gate"])
        self.update_seconds, self.seconds = own["seconds"]["update"], own["seconds"]["total"]
        self.vec.repeatable = self.world.all(self.vec.repeatable)
        lost = self.collector.load_state_dict(own["collector"])
        if not self.vec.repeatable:  # no faults: it never said that it could
            lost = int(self.world.sum([lost])[0])
            self.dropped += lost
        else:
            for _ in range(lost):
                self.faults.add("unrepeatable", "--env.type: the simulator does not repeat an episode")
        notes += lost_notes(lost, self.vec.repeatable)
        if same:  # last: building and looking may have drawn
            set_rng_state(own["rng"], self.accelerator.device)
        return notes
