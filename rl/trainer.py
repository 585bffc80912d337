"""The training loop: collect chunks under what is learnt, learn while the simulators step."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab.adapters import UserError
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpaceConfig
from trimtab.rl.algorithms import Algorithm, AlgorithmConfig, DSRLSACConfig
from trimtab.rl.budget import TrainConfig
from trimtab.rl.collector import Collector, Episode
from trimtab.rl.data.demonstration_data import DemosConfig
from trimtab.rl.data.replay import Batch
from trimtab.rl.data.returns import Transition
from trimtab.rl.envs.base import VectorEnv
from trimtab.rl.learner import fit, learn_anew, make_learner
from trimtab.rl.metrics import RunMetrics, calibration, human_chunks
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.checkpoint import Checkpoint, Checkpoints
from trimtab.rl.runs.faults import Faults, FaultsConfig, Stopped, StopSignals, lost_notes
from trimtab.rl.runs.processes import ProcessGroup, StepGuard, weights_digest
from trimtab.rl.runs.progress import Progress
from trimtab.rl.runs.reshard import reshard
from trimtab.rl.seeds import training_seed
from trimtab.rl.takeover import Takeover

COUNTED = (
    *("transitions", "episodes", "updates", "env_steps", "dropped", "update_seconds", "seconds"),
    *("_owed", "_logged", "_warming"),
)


@dataclass
class Trainer:
    """One steering run; one of several processes' share of it, where there are several.

    Attributes:
        runner, vec: the frozen policy, and training environments.
        accelerator: an ``accelerate.Accelerator``.
        train, rl, noise, demos, faults_config: configs.
        seed: seeds the networks, the replay, the noise and the episodes.
        on_metrics, on_step: called with each line of metrics, and with the episodes that ended in a chunk.
        checkpoints: where to keep what it takes to go on, if anywhere.
        stop: signals that end the run.
        faults: of all processes over the whole run, by kind (``runs/faults.py``).
    """

    runner: PolicyRunner
    vec: VectorEnv
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
        self.env_steps = self.transitions = self.episodes = self.updates = self.dropped = 0
        self.update_seconds = self.seconds = 0.0
        self._owed, self._logged, self._warming = 0.0, 0, True
        self._ready = self._stopping = False
        self._kept = -1, -1  # environment steps and updates of the last checkpoint
        torch.manual_seed(self.seed)
        self.space = self.noise.build(self.runner.adapter.noise_spec)
        self.takeover = Takeover(self.train.gate, self.seed + world.rank)
        seed = training_seed(self.seed), world.rank, world.size
        self.collector = Collector(
            *(self.runner, self.vec, self.rl, self.train.reward, *seed),
            record=self.checkpoints is not None,
            assign=lambda: not self.train.gate.enabled or (self.updates > 0 and self.takeover()),
            reward_range=self.train.reward_range,
        )
        self.algorithm, self.replay, self.demonstrations = make_learner(self, self.collector, self.space)
        self.guard = StepGuard(world, self.train.clip_norm)
        self.guard.attach(self.algorithm)
        if world.rank:
            torch.manual_seed(self.seed + 1_000_003 * world.rank)  # from here on, each draws its own
        self.faults = Faults(self.faults_config.limit)
        self.metrics = RunMetrics(world, list(dict.fromkeys(self.vec.task_names)))
        self.recent: deque[Episode] = deque(maxlen=20)

    def run(self) -> Algorithm:
        """Collect ``env_steps`` environment steps, learning meanwhile; return the trained algorithm.

        Raises:
            Stopped: a signal ended it, after a checkpoint.
            UserError: more faults than the limit, after a checkpoint; or the checkpoint cannot be written.
        """
        started = time.perf_counter() - self.seconds
        self._learn_offline(started)
        total, unit = self.train.episodes or self.train.env_steps, "ep" if self.train.episodes else "step"
        silent = not (self.progress and total)
        bar = Progress(total=total, initial=self._done(), desc="steering", unit=unit, disable=silent)
        while self._done() < total:
            if self.collector.rollout.waiting and not self._start_episodes():
                continue
            self._warming = self.transitions < self.train.warmup_transitions
            self.collector.begin(steering=self.updates > 0 and not self._warming)
            self._learn()
            before = self.collector.env_steps
            transitions, episodes = self.collector.finish()
            self._store(transitions, episodes, self.collector.env_steps - before)
            self.on_step(episodes)
            self.seconds = time.perf_counter() - started
            bar.update(self._done() - bar.n)
            if episodes:
                phase = "untrained actor" if self._warming else "steered"
                bar.set_postfix_str(f"{self.metrics.outcome()}, {phase}")
            if self.env_steps - self._logged >= self.train.log_every:
                self._log()
            self._keep()
        if self.vec.attended:  # nobody waits for what the last episode has taught
            self._learn()
        if self._logged != self.env_steps:
            self._log()
        bar.close()
        self.faults.gather(self.world, self.guard)
        self._keep(end=True)
        self.train.check_learnt(self.updates, self.transitions, self.dropped)
        self.algorithm = learn_anew(self)
        return self.algorithm

    def _done(self) -> int:
        """How much of its budget the run has spent."""
        return self.episodes if self.train.episodes else min(self.env_steps, self.train.env_steps)

    def _start_episodes(self) -> bool:
        """Learn while people prepare the next episodes, and begin; false if they end the run."""
        self.vec.announce()
        self._keep(end=self.env_steps > 0)
        self._learn()
        if self._logged != self.env_steps:
            self._log()
        self._stopping = not self.collector.start_episodes()
        self._keep()
        return not self._stopping

    def _learn_offline(self, started: float) -> None:
        """Take the gradient steps on the demonstrations alone, unless a checkpoint is past them."""
        total, demos = 0 if self.env_steps else self.train.offline_updates, self.demonstrations
        if demos is None or self.updates >= total:
            return
        if self.updates == 0:
            fit(self, self.algorithm)
        bar = Progress(total=total, initial=self.updates, desc="learning offline", disable=not self.progress)
        while self.updates < total:
            count = min(self.train.log_every, total - self.updates)
            self._update(count, lambda: demos.sample(self.rl.batch_size))
            bar.update(count)
            self.seconds = time.perf_counter() - started
            self.faults.gather(self.world, self.guard)
            self._log()
            self._stopping = any(self.world.gather(self.stop()))
            self._keep()
        bar.close()

    def _learn(self) -> None:
        """Pay the gradient steps owed for the transitions so far, or as many as a robot leaves time for."""
        if self.transitions < self.train.first_update or not self._ready:
            return
        if self.updates == 0:
            fit(self, self.algorithm)
        self._owed -= self._update(int(self._owed), self.batch, self.vec.calls)

    def batch(self, share: float | None = None) -> Batch:
        """What an update learns from; ``share`` is how much of the learning is done."""
        demos, size, share = self.demonstrations, self.rl.batch_size, self._share if share is None else share
        return demos.mix(self.replay, size, share) if demos else self.replay.sample(size)

    def _update(
        self, count: int, batch: Callable[[], Batch], called: Callable[[float], bool] = lambda seconds: False
    ) -> int:
        """Take ``count`` gradient steps, or as many as it can until it is ``called`` within one's seconds."""
        started, before = time.perf_counter(), self.updates
        each = self.update_seconds / max(1, before)
        self.algorithm.progress(self._share)
        while self.updates < before + count and not called(each):
            self.metrics.add_update(self.algorithm.update(batch()))
            self.updates += 1
        self.update_seconds += time.perf_counter() - started
        return self.updates - before

    @property
    def _share(self) -> float:
        return self.train.share(self.env_steps, self.episodes, self.updates)

    def _store(self, transitions: list[Transition], episodes: list[Episode], steps: int) -> None:
        """Take up what a chunk has brought, here and on the other processes."""
        added = self.replay.added
        for transition in transitions:
            try:
                self.replay.add(transition)
            except ValueError as error:
                self.faults.new.append(("transition", f"--policy.path: {error}"))
        lost, self.collector.lost = self.collector.lost, []
        self.faults.new += [fault for fault in lost if fault[0] != "abort"]
        self.recent.extend(episodes)
        here = {
            "stored": self.replay.added - added,
            "steps": steps,
            "lost": len(lost),
            "stop": self.stop() or bool(self.vec.stopped),
            "ready": len(self.replay) > 0,
            "reported": self.collector.reported,
            "episodes": [(one.task, one.steered, one.success, one.total, one.helped) for one in episodes],
        }
        everyone = self.world.gather(here)
        self.faults.gather(self.world, self.guard)
        brought = sum(there["stored"] for there in everyone)
        self.transitions += brought
        if self.train.catch_up or self.transitions > self.train.first_update:
            self._owed += brought * self.train.updates_per_transition / self.world.size
        self._stopping = any(there["stop"] for there in everyone)
        self._ready = all(there["ready"] for there in everyone)
        for there in everyone:
            self.env_steps += there["steps"]
            self.dropped += there["lost"]
            self.metrics.reported |= there["reported"]
            for task, steered, success, total, helped in there["episodes"]:
                self.episodes += 1
                self.metrics.add_episode(task, success, total)
                self.takeover.add(steered, success and not helped)

    def _log(self) -> None:
        """Report a line of metrics; all processes make it together."""
        self._logged = self.env_steps
        line: dict[str, Any] = {
            "env_steps": self.env_steps,
            "episodes": self.episodes,
            "transitions": self.transitions,
            "updates": self.updates,
            **self.metrics.rates(),
            "acting": "untrained" if self._warming else "actor",
        }
        if self.demonstrations is not None:
            line["demo_share"] = self.demonstrations.share(self._share)
        if self.train.gate.enabled:
            line["gate_share"] = self.takeover.share if self.updates else 0.0
        if faults := self.faults.total():
            line |= {"faults": faults, "episodes_dropped": self.dropped}
        line |= self.metrics.means()
        line |= self.vec.timing()
        line |= self.metrics.times(
            {**self.collector.rollout.seconds, "update": self.update_seconds}, self.seconds
        )
        if self.world.main:
            line |= human_chunks(self.recent)
            line |= calibration(self.algorithm, self.recent) if self.updates else {}
            self.on_metrics(line)

    def _keep(self, end: bool = False) -> None:
        """Write a checkpoint where one is due, or the run has to end; all processes do so together."""
        now = self.env_steps, self.updates
        wanted = self.faults.too_many or self._stopping or (end and now != self._kept)
        if self.checkpoints and (wanted or self.checkpoints.due(self.env_steps)):
            self.checkpoints.save(self.env_steps, self.state_dict())
            self._kept = now
        self.faults.check()
        if self._stopping:
            raise Stopped(self.stop.name or self.vec.stopped or "a signal to another process", self.env_steps)

    def state_dict(self) -> dict[str, Any]:
        """What it takes this process to go on from between two chunks."""
        demos, replay, device = self.demonstrations, self.replay, self.accelerator.device
        return {
            **{name: getattr(self, name) for name in COUNTED},
            "faults": dict(self.faults),
            "metrics": self.metrics.state_dict(),
            "algorithm": self.algorithm.training_state(),
            "weights": weights_digest(self.algorithm, self.world),
            "takeover": self.takeover.state_dict(),
            "recent": [vars(episode) for episode in self.recent],
            "rows": replay.rows(replay.added - len(replay), replay.added),
            "added": replay.added,
            "replay": replay.state_dict(),
            "demonstrations": demos.state_dict() if demos is not None else None,
            "collector": self.collector.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def resume(self, checkpoint: Checkpoint) -> list[str]:
        """Go on where ``checkpoint`` was written; returns lines about what could not be as it was.

        Raises:
            UserError: it does not fit this run.
        """
        try:
            return self._load(checkpoint)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                "--resume", f"{checkpoint.folder} does not fit this run ({type(error).__name__}: {error})"
            ) from error

    def _load(self, checkpoint: Checkpoint) -> list[str]:
        state = checkpoint.read(min(self.world.rank, checkpoint.processes - 1))
        for name in COUNTED:
            setattr(self, name, state[name])
        self._kept = self.env_steps, self.updates
        self.faults.update(state["faults"])
        self.metrics.load_state_dict(state["metrics"])
        self.algorithm.load_training_state(state["algorithm"])
        self.takeover.load_state_dict(state["takeover"])
        self.recent.extend(Episode(**episode) for episode in state["recent"])
        self.vec.repeatable = self.world.all(self.vec.repeatable)
        if checkpoint.processes != self.world.size:
            dropped, note = reshard(checkpoint, self.world, self.collector, self.replay)
            self.dropped += dropped
            self._ready = self.world.all(len(self.replay) > 0)
            return [note]
        self.replay.put(state["added"] - len(state["rows"]["reward"]), state["rows"])
        self.replay.load_state_dict(state["replay"])
        self._ready = self.world.all(len(self.replay) > 0)
        if self.demonstrations is not None:
            self.demonstrations.load_state_dict(state["demonstrations"])
        lost = self.collector.load_state_dict(state["collector"])
        if not self.vec.repeatable:  # no faults: it never said that it could
            lost = sum(self.world.gather(lost))
            self.dropped += lost
        else:
            self.faults.new += [("unrepeatable", "--env.type: the simulator repeats no episode")] * lost
        torch.set_rng_state(state["rng"])  # last: building and looking may have drawn
        if state["cuda_rng"] is not None and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.accelerator.device)
        return lost_notes(lost, self.vec.repeatable)
