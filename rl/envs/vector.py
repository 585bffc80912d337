"""Many chunk environments in worker processes: one message per worker and chunk."""

import contextlib
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.envs.configs import EnvConfig

from trimtab.adapters.errors import UserError, reason
from trimtab.rl.envs.base import VectorEnv
from trimtab.rl.envs.chunk import ChunkEnv, ChunkResult, Fault, NotFinite, RawObservation
from trimtab.rl.envs.examine import Description, Findings, describe, examine
from trimtab.rl.envs.hooks import make_chunk_env

# By environment: the arguments of a command. The last one of `reset` and `step` is the next episode's seed.
Arguments = dict[int, tuple[Any, ...]]
# The first observation of an episode; where it cannot begin, ``None`` and the fault.
Begun = tuple[RawObservation | None, Fault | None]
BUILDING = 5  # a simulator may take so many times longer to be built than to step a chunk


class WorkerLost(RuntimeError):
    """A worker process is gone (``kind`` is ``crash``) or does not answer (``hang``)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Group:
    """The environments of one worker. A command goes to some of them, each with its arguments.

    Without processes it stands where else a pipe is: they work while they are being told to.
    """

    def __init__(self, config: EnvConfig, task: int | None, tolerant: bool, options: dict[str, Any]) -> None:
        self._config, self._task, self._tolerant, self._options = config, task, tolerant, options
        self.envs: dict[int, ChunkEnv] = {}

    def answer(self, command: str, arguments: Arguments) -> tuple[str, Any, float]:
        """What became of a command, what it returned by environment, and the seconds that it took."""
        started = time.perf_counter()
        try:
            answers = {i: getattr(self, command)(i, *values) for i, values in arguments.items()}
            return "ok", answers, time.perf_counter() - started
        except UserError as error:
            return "user_error", (error.option, error.message), 0.0
        except Exception:  # whatever a simulator raises
            return "error", traceback.format_exc(), 0.0

    def build(self, i: int) -> Description:
        task = i if self._task is None else self._task
        self.envs[i] = make_chunk_env(self._config, task, **self._options)
        return describe(self.envs[i], getattr(self._config, "fps", None))

    def examine(self, i: int, chunk: np.ndarray, move: bool) -> Findings:
        return examine(self.envs[i], chunk, move)

    def reset(self, i: int, render: bool, seed: int) -> Begun:
        self.envs[i].render = render
        return self._try(i, lambda env: env.reset(seed))

    def step(self, i: int, chunk: np.ndarray, next_seed: int | None) -> ChunkResult:
        result, fault = self._try(i, lambda env: env.step_chunk(chunk))
        result = result or ChunkResult(None, lost=fault)
        if next_seed is not None and (result.ended or result.lost):
            result.observation, result.not_begun = self._try(i, lambda env: env.reset(next_seed))
        return result

    def _try(self, i: int, do: Callable[[ChunkEnv], Any]) -> tuple[Any, Fault | None]:
        """What ``do`` returns; after a fault that the run outlives ``None`` and the fault."""
        try:
            return do(self.envs[i]), None
        except NotFinite as error:
            if not self._tolerant:
                raise
            return None, (error.kind, str(error))
        except Exception as error:  # whatever a simulator raises
            if not self._tolerant or isinstance(error, UserError):
                raise
            fault = "crash", f"--env.type: the simulator failed: {reason(error, last=True)}"
            with contextlib.suppress(Exception):
                self.envs[i].close()
            self.build(i)
            return None, fault

    def close(self) -> None:
        for env in self.envs.values():
            with contextlib.suppress(Exception):
                env.close()

    def send(self, message: tuple[str, Arguments]) -> None:
        self._answer = self.answer(*message)

    def recv(self) -> tuple[str, Any, float]:
        return self._answer

    def poll(self, timeout: float) -> bool:
        return True


def _serve(connection: Any, config: EnvConfig, settings: tuple[Any, ...]) -> None:
    """Answer for one group of environments over a pipe until told to stop."""
    # A terminal and SLURM signal the whole group: the run decides when its simulators end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)  # the cores belong to the learner
    group = _Group(config, *settings)
    with contextlib.suppress(EOFError, OSError):
        while (message := connection.recv())[0] != "close":
            connection.send(group.answer(*message))
    group.close()


def _fault(lost: WorkerLost) -> Fault:
    return lost.kind, f"--env.type: {reason(lost, last=True)}"


@dataclass
class _Worker:
    """Some environments, and how to reach them; ``process`` is ``None`` where they are in this one."""

    members: list[int]
    connection: Any
    process: Any

    def receive(self, timeout: float) -> tuple[dict[int, Any], float]:
        """The answers, and for how many seconds the environments worked on them; timeout 0: any time."""
        name = f"the worker of environments {self.members[0]}-{self.members[-1]}"
        try:
            if timeout and not self.connection.poll(timeout):
                raise WorkerLost("hang", f"{name} did not answer for {timeout:g} s")
            status, payload, seconds = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(1)
            raise WorkerLost("crash", f"{name} died with exit code {self.process.exitcode}") from None
        if status == "user_error":
            raise UserError(*payload)
        if status == "error":
            raise WorkerLost("crash", f"an environment worker failed:\n{payload}")
        return payload, seconds

    def join(self, patience: float) -> None:
        """Wait for the end, which comes after ``patience`` seconds at the latest."""
        self.connection.close()  # frees one that is still writing an answer
        if self.process is not None:
            self.process.join(patience)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()


class ChunkVectorEnv(VectorEnv):
    """``num_envs`` chunk environments, spread over ``num_workers`` processes.

    Environment ``i`` runs task ``i % number_of_tasks`` of the config. ``busy`` and ``idle`` are averaged over
    the workers.

    Args:
        config: a LeRobot environment config.
        num_workers: processes; 0 steps them in this process.
        n_obs_steps, keep_seen: as for ``ChunkEnv``.
        task: run this task of the config in every environment.
        tolerant: an episode in which the simulator crashes or hangs, or NaN or Inf appears, is lost
            (``ChunkResult.lost``) and the next one starts, in a new worker where need be; one that cannot
            begin is left out (``not_begun``). Else an error.
        timeout: seconds that a worker may take for an answer before it counts as hanging; 0 for any time.
    """

    def __init__(
        self,
        config: EnvConfig,
        num_envs: int,
        num_workers: int = 1,
        n_obs_steps: int = 1,
        keep_seen: bool = False,
        task: int | None = None,
        tolerant: bool = False,
        timeout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_envs, self._local = num_envs, num_workers <= 0
        self._tolerant, self._timeout = tolerant, timeout
        self._config = config
        self._settings = task, tolerant, {"n_obs_steps": n_obs_steps, "keep_seen": keep_seen}
        self._workers: list[_Worker] = []
        # By worker: the command that it works on, and each environment's arguments.
        self._pending: dict[int, tuple[str, Arguments]] = {}
        self._sent = 0.0
        described: dict[int, Description] = {}
        try:
            for part in np.array_split(np.arange(num_envs), max(1, min(num_workers, num_envs))):
                self._workers.append(self._start(part.tolist()))
            for worker in self._workers:
                described |= worker.receive(BUILDING * timeout)[0]
        except BaseException:
            self.close()
            raise
        self.descriptions = [described[i] for i in range(num_envs)]
        self.repeatable = all(one.repeatable for one in self.descriptions)
        self._success_keys: set[str] = set()

    def _start(self, members: list[int]) -> _Worker:
        """A worker that is building its environments."""
        if self._local:
            worker = _Worker(members, _Group(self._config, *self._settings), None)
        else:
            # A forked copy of a process that runs torch threads can deadlock: fork from a clean server.
            context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
            if sys.platform != "win32":
                context.set_forkserver_preload(["trimtab.rl.envs.vector", type(self._config).__module__])
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._config, self._settings), daemon=True)
            process.start()
            theirs.close()
            worker = _Worker(members, ours, process)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `receive` says that it is lost
            worker.connection.send(("build", {i: () for i in members}))
        return worker

    def reset(
        self, seeds: dict[int, int], render: dict[int, bool] | None = None
    ) -> dict[int, RawObservation]:
        self._send("reset", {i: ((render or {}).get(i, False), seed) for i, seed in seeds.items()})
        begun = self._receive()
        self.not_begun += [fault for _, fault in begun.values() if fault]
        return {i: observation for i, (observation, _) in begun.items() if observation is not None}

    def examine(self, chunk: np.ndarray, move: bool = True) -> Findings:
        """Ask the first environment whether it does what it must, as ``examine.examine`` finds it."""
        self._send("examine", {0: (chunk, move)})
        return self._receive()[0]

    def send(self, chunks: dict[int, np.ndarray], next_seeds: dict[int, int | None]) -> None:
        self._send("step", {i: (chunk, next_seeds[i]) for i, chunk in chunks.items()})

    def receive(self) -> dict[int, ChunkResult]:
        results = self._receive()
        self.not_begun += [result.not_begun for result in results.values() if result.not_begun]
        for key in {result.success_key for result in results.values()} - {None, *self._success_keys}:
            self._success_keys.add(key)
            self.on_success_key(key)
        return results

    def _send(self, command: str, arguments: Arguments) -> None:
        if self._pending:
            raise RuntimeError("the environments are still stepping: call receive() first")
        self._sent = time.perf_counter()
        for number, worker in enumerate(self._workers):
            mine = {i: arguments[i] for i in worker.members if i in arguments}
            if not mine:
                continue
            try:
                worker.connection.send((command, mine))
            except (BrokenPipeError, ConnectionResetError):
                if not self._tolerant:
                    worker.receive(self._timeout)  # raises with its last words
            self._pending[number] = command, mine

    def _receive(self) -> dict[int, Any]:
        asked, count = time.perf_counter(), len(self._pending)
        self.busy = self.idle = 0.0
        merged: dict[int, Any] = {}
        for number, (command, arguments) in list(self._pending.items()):
            try:
                answer, seconds = self._workers[number].receive(self._timeout)
                self.busy += seconds / count
                self.idle += max(0.0, asked - self._sent - seconds) / count
            except WorkerLost as lost:
                if not self._tolerant or command not in ("reset", "step"):
                    raise
                answer = self._restart(number, command, arguments, lost)
            merged |= answer
            del self._pending[number]
        return dict(sorted(merged.items()))

    def _restart(self, number: int, command: str, arguments: Arguments, lost: WorkerLost) -> dict[int, Any]:
        """Start a lost worker anew, and in it the episodes that would have followed, if they can begin."""
        seeds = {i: values[-1] for i, values in arguments.items()}
        running = {i: (False, seed) for i, seed in seeds.items() if seed is not None}
        fault, begun = _fault(lost), dict[int, Begun](dict.fromkeys(seeds, (None, None)))
        try:
            worker = self._renew(number)
            worker.connection.send(("reset", running))
            begun |= worker.receive(BUILDING * self._timeout)[0]
        except WorkerLost as again:
            self._renew(number)
            begun |= dict.fromkeys(running, (None, _fault(again)))
        if command == "reset":
            return begun
        return {i: ChunkResult(first, lost=fault, not_begun=why) for i, (first, why) in begun.items()}

    def _renew(self, number: int) -> _Worker:
        """A new worker in the place of a lost one, its environments built."""
        self._workers[number].join(0)
        self._workers[number] = worker = self._start(self._workers[number].members)
        worker.receive(BUILDING * self._timeout)
        return worker

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.connection.send(("close", {}))
        for worker in self._workers:
            worker.join(5)
        self._workers, self._pending = [], {}
