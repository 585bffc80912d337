"""A frozen policy in an environment: opened, examined, evaluated."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lerobot.envs.configs import EnvConfig
from torch import Tensor
from tqdm import tqdm

from trimtab.adapters import PolicyAdapter, PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.folder import is_server, resolve_folder
from trimtab.adapters.errors import reason
from trimtab.adapters.inputs import input_notes
from trimtab.policies.acting import ChunkPolicy
from trimtab.policies.noise_samplers import NoiseSampler, constant_noise, own_noise, zero_noise
from trimtab.policies.observe import ObserveConfig, build_observer
from trimtab.recipes.support.console import own_cores
from trimtab.recipes.support.reporting import write_grid_video
from trimtab.recipes.support.shared_configs import SELECTION_SEED, EpisodesConfig, MachineConfig
from trimtab.rl.envs.base import VectorEnv
from trimtab.rl.envs.contract import SUCCESS_KEYS
from trimtab.rl.envs.hooks import check_base, check_buildable, for_policy, is_attended, task_names
from trimtab.rl.envs.vector import ChunkVectorEnv, WorkerLost
from trimtab.rl.evaluation import Evaluation, best_constant, evaluate, unreported
from trimtab.rl.runner import Encoded, PolicyRunner
from trimtab.rl.runs.faults import FaultsConfig
from trimtab.rl.runs.processes import ProcessGroup


@dataclass
class Session:
    """A frozen policy in an environment, ready to evaluate or steer."""

    adapter: PolicyAdapter
    env: EnvConfig
    eval: EpisodesConfig
    machine: MachineConfig
    # What an actor is to look at; that of an artefact, once loaded, comes first.
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    # Whether several tasks may be run at once.
    many: bool = False
    # The processes of the run, where there are several.
    world: ProcessGroup | None = None
    # Processes of simulators; 0: this one.
    workers: int = field(init=False)
    runner: PolicyRunner = field(init=False)
    # Names of the tasks; known once environments have been made.
    tasks: list[str] = field(init=False, default_factory=list)
    # What the policy made of a first observation: tells the sizes of what a replay keeps. ``None`` where
    # there is none yet, for an environment that cannot repeat is not moved for it.
    first: Encoded | None = field(init=False, default=None)
    # Whether environments repeat an episode, as found before or by this session; ``None``: not known.
    repeatable: bool | None = field(init=False, default=None)
    _examined: bool = field(init=False, default=False)
    _declared: bool = field(init=False, default=True)  # what they say of it themselves
    _success_keys: set[str] = field(init=False, default_factory=set)
    _reports_success: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        check_buildable(self.env)
        self.tasks = task_names(self.env)
        self._check_tasks(self.tasks)
        names, features = self.adapter.raw_names(), self.adapter.config.input_features
        self.env = for_policy(self.env, {names[k]: tuple(one.shape) for k, one in features.items()})
        self.runner = PolicyRunner(self.adapter, self.env)
        default = own_cores() if self.adapter.cameras() else 1
        self.workers = default if self.machine.workers is None else self.machine.workers

    def _check_tasks(self, tasks: Sized) -> None:
        if len(tasks) > 1 and not self.many:
            raise UserError(
                "--env.task", "only adapt takes several tasks at once; name one, and run this once for each"
            )

    @contextmanager
    def environments(
        self,
        count: int,
        workers: int | None = None,
        keep_seen: bool = False,
        task: int | None = None,
        faults: FaultsConfig | None = None,
    ) -> Iterator[VectorEnv]:
        """Environments of this session, closed at the end.

        With ``faults`` they lose episodes to faults rather than fail.

        Raises:
            UserError: the environment cannot be built, or a worker is lost.
        """
        with ExitStack() as stack:
            try:
                vec: VectorEnv = (
                    self.env.make_vector_env(self.adapter.n_obs_steps)  # type: ignore[attr-defined]
                    if is_attended(self.env)
                    else ChunkVectorEnv(
                        self.env,
                        count,
                        self.workers if workers is None else workers,
                        self.adapter.n_obs_steps,
                        keep_seen=keep_seen,
                        task=task,
                        tolerant=faults is not None,
                        timeout=faults.timeout if faults else 0.0,
                    )
                )
                stack.callback(vec.close)
                if task is None:
                    self._check_tasks(range(vec.descriptions[0].tasks))
                self._preflight(vec)
            except UserError:
                raise
            except Exception as error:  # whatever a simulator raises when it cannot be built or stepped
                said = f"'{self.env.type}' does not run here: {reason(error, last=True)}"
                raise UserError("--env.type", said) from error
            try:
                yield vec
            except WorkerLost as error:
                raise UserError("--env.type", reason(error, last=True)) from error

    def _preflight(self, vec: VectorEnv) -> None:
        """What can be known before any long work, so that what does not fit shows at once."""
        names = dict.fromkeys(vec.task_names)
        self._check_tasks(names)
        self.tasks = self.tasks or [name or self.env.task or self.env.type for name in names]
        vec.on_success_key = self._name_success
        if not self._examined:
            if self.adapter.observer is None:
                self.adapter.observer = build_observer(self.observe, self.adapter, vec.task_descriptions)
            self._examine(vec)
            self._examined = True
        vec.repeatable = vec.repeatable and self.repeatable is not False

    def _examine(self, vec: VectorEnv) -> None:
        """Let the policy look and act once, and see whether the environment does what it must.

        Where it cannot repeat, nothing moves: a reset moves a robot, too. The policy then looks at zeros of
        the shapes that the environment declares, and the rest shows in the run's own first episode.
        """
        described, tasks = vec.descriptions[0], vec.task_descriptions[:1]
        for line in described.warnings:
            self._say(f"warning: --env.type: {line}")
        self._declared = vec.repeatable
        free = vec.repeatable and self.repeatable is not False
        if not free:
            self.repeatable = False
            if not vec.empty:
                self._say(
                    "note: this environment cannot repeat an episode: nothing moves before the run's first, "
                    "and interrupted ones are dropped"
                )
        observation = vec.reset({0: self.eval.seed})[0] if free else described.blank
        if observation is None:
            return
        conditioning = self.runner.encode([observation], tasks)
        for note in input_notes(self.adapter, self.runner.history([observation], tasks)):
            self._say(f"note: {note}")
        self.runner.features(conditioning)
        prior = self.runner.prior(1, torch.Generator().manual_seed(0))
        chunk = self.runner.decode(conditioning, prior)[0]
        findings = vec.examine(chunk, move=free)
        self.first, self.repeatable = conditioning, findings.repeatable
        for line in findings.warnings:
            self._say(f"warning: --env.type: {line}")
        self._name_success(findings.success_key)

    def _name_success(self, key: str | None) -> None:
        """Say once where success is read, if it is not where LeRobot reads it."""
        if key not in (None, "is_success", *self._success_keys):
            self._success_keys.add(key)
            self._say(f"note: success is read from info['{key}']")

    def _say(self, line: str) -> None:
        if self.world is None or self.world.main:
            tqdm.write(line)

    @contextmanager
    def evaluation_environments(self, task: int | None = None) -> Iterator[VectorEnv]:
        """As many environments as an evaluation uses, in two worker processes or more.

        Raises:
            UserError: they are fewer than the tasks, which shows only now.
        """
        count = min(self.eval.batch_size, self.eval.n_episodes)
        with self.environments(count, self.evaluation_workers, task=task) as vec:
            if (tasks := vec.descriptions[0].tasks) > len(self.tasks):
                raise UserError(
                    "--eval.batch_size",
                    f"'{self.env.task or self.env.type}' has {tasks} tasks, {count} environments see "
                    f"{len(self.tasks)} of them; as many environments and episodes as tasks, or more",
                )
            yield vec

    def evaluations_by_task(self) -> Iterator[tuple[str, VectorEnv]]:
        """Environments to evaluate in, of one task after the other."""
        with self.evaluation_environments() as vec:
            if len(self.tasks) == 1:
                yield self.tasks[0], vec
                return
        for index, task in enumerate(self.tasks):
            with self.evaluation_environments(index) as vec:
                yield task, vec

    def evaluate(
        self, vec: VectorEnv, policy: ChunkPolicy, label: str, seeds: Sequence[int] = ()
    ) -> Evaluation:
        """One episode for each seed (default: those of the evaluation), shared among the processes.

        An environment that has once reported success reports it: some do so in the step that succeeds alone.
        """
        found = evaluate(self.runner, vec, policy, seeds or self.eval.seeds, label, world=self.world)
        self._reports_success |= found.reported
        found.reported = self._reports_success
        return found

    @property
    def evaluation_workers(self) -> int:
        """No learner runs beside an evaluation, so that a second core is free for simulators."""
        return max(self.workers, 2) if self.workers else 0

    @property
    def own_noise(self) -> NoiseSampler:
        """What the base feeds itself."""
        return own_noise(self.adapter.noise_spec)

    def baselines(
        self, vec: VectorEnv, seed: int
    ) -> tuple[dict[str, Evaluation], dict[str, Any], Tensor | None]:
        """Evaluate the base under its own noise, zero noise and the best constant noise.

        Returns evaluations by name, details of the search for a constant, and the constant.
        """
        results = {"base": self.evaluate(vec, self.own_noise, label="base policy")}
        self._note_success(results["base"])
        if self.own_noise is not zero_noise:
            results["zero_noise"] = self.evaluate(vec, zero_noise, "zero noise", self.eval.baseline_seeds)
        if not self.eval.constant_candidates:
            return results, {}, None
        count, episodes = self.eval.constant_candidates, self.eval.constant_episodes
        selection = range(SELECTION_SEED, SELECTION_SEED + episodes)
        noise, rates = best_constant(self.runner, vec, count, selection, seed, world=self.world)
        seeds = self.eval.baseline_seeds
        results["constant_noise"] = self.evaluate(vec, constant_noise(noise), "best constant noise", seeds)
        measure = "selection_success" if results["base"].reported else "selection_return"
        return results, {measure: rates, "selection_episodes": episodes}, noise

    def _note_success(self, base: Evaluation) -> None:
        """Say what ``info`` held where success was not in it, or never true: another name may hold it."""
        names, others = ", ".join(SUCCESS_KEYS), [key for key in SUCCESS_KEYS if key in base.info_keys]
        rule = getattr(self.env, "success", "")
        if not base.reported and rule.startswith("info."):
            held = ", ".join(base.info_keys) or "nothing"
            self._say(
                f"warning: --env.success: {rule} was not there in {len(base.seeds)} episodes, whose info "
                f"held {held}; the return is shown instead"
            )
        elif not base.reported:
            self._say(f"note: {unreported(base)}, which is read from {names}; its return is shown instead")
        elif others and not base.successes.any():
            self._say(
                f"warning: --env.type: no episode of {len(base.seeds)} succeeded; info holds {others[0]}, "
                f"too, but success is read from the first of {names} that is there"
            )

    def record(self, videos: Mapping[Path, ChunkPolicy]) -> None:
        """Render the first evaluation episodes under each policy to its MP4, or say why it cannot be done."""
        seeds = [] if is_attended(self.env) else self.eval.seeds[: self.eval.videos]
        if seeds and not self._declared:
            names = ", ".join(path.name for path in videos)
            print(f"no video {names}: this environment cannot repeat the episodes of the evaluation")
        elif seeds:
            try:
                with self.environments(len(seeds), min(1, self.workers)) as vec:
                    for path, policy in videos.items():
                        label = f"video: {path.stem}"
                        write_grid_video(path, evaluate(self.runner, vec, policy, seeds, label, record=seeds))
            except Exception as error:  # a picture is never worth a run
                missing = ", ".join(path.name for path in videos if not path.exists())
                print(f"no video {missing}: cannot render here ({reason(error, last=True)})")


def base_of(policy: PolicyConfig) -> Path | str:
    """The folder of a base policy, or the address of its server."""
    return policy.path if is_server(policy.path) else resolve_folder(policy.path, policy.revision)


def open_session(
    policy: PolicyConfig, env: EnvConfig, episodes: EpisodesConfig, machine: MachineConfig, **options: Any
) -> tuple[Session, Path | str]:
    """Load the base policy for an environment; returns the session and the base's folder or server."""
    machine.apply()
    if not policy.path:
        raise UserError("--policy.path", "name the folder or Hub repository of the base policy")
    folder = base_of(policy)
    check_base(env, folder)
    adapter = load_adapter(policy)
    for note in adapter.notes:
        print(f"note: {note}")
    return Session(adapter, env, episodes, machine, **options), folder


def describe(session: Session, base: Path | str) -> str:
    """Two lines about what is going to be steered."""
    spec, size = session.adapter.noise_spec, session.adapter.parameter_count
    parameters = "parameters out of sight" if size is None else f"{size / 1e6:.2f} M parameters, frozen"
    return (
        f"base policy: {base} ({session.adapter.policy_type}, {parameters})\n"
        f"environment: {session.env.type}, {session.env.task}; noise {tuple(spec.shape)}, "
        f"{session.adapter.chunk_shape[0]} actions per chunk"
    )
