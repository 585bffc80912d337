"""Many chunk environments in worker processes: one message per worker and chunk."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
from lerobot.envs.configs import EnvConfig

from trimtab.adapters.errors import UserError, reason
from trimtab.rl.envs.chunk import ChunkResult, NotFinite, RawObservation, lost_episode
from trimtab.rl.envs.contract import Description, Findings, describe, examine
from trimtab.rl.envs.hooks import make_chunk_env

BUILDING = 5  # a simulator may take so many times longer to be built than to step a chunk


class WorkerLost(RuntimeError):
    """A worker process is gone or does not answer.

    Args:
        kind: ``crash`` or ``hang``.
        message: what is known.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Group:
    """The environments of one worker (or of this process)."""

    def __init__(
        self, config: EnvConfig, indices: list[int], task: int | None, tolerant: bool, options: dict[str, Any]
    ) -> None:
        self._make = lambda i: make_chunk_env(config, i if task is None else task, **options)
        self.tolerant, self._fps = tolerant, getattr(config, "fps", None)
        self.envs = {i: self._make(i) for i in indices}

    def describe(self) -> dict[int, Description]:
        return {i: describe(env, self._fps) for i, env in self.envs.items()}

    def examine(self, chunks: dict[int, np.ndarray], _: dict[int, Any]) -> dict[int, Findings]:
        return {i: examine(self.envs[i], chunk) for i, chunk in chunks.items()}

    def check_actions(self, chunks: dict[int, np.ndarray], _: dict[int, Any]) -> dict[int, None]:
        return {i: self.envs[i].check_actions(chunk) for i, chunk in chunks.items()}

    def reset(self, seeds: dict[int, int], render: dict[int, bool]) -> dict[int, RawObservation]:
        for i in seeds:
            self.envs[i].render = render.get(i, False)
        return {i: self.envs[i].reset(seed) for i, seed in seeds.items()}

    def step(
        self, chunks: dict[int, np.ndarray], next_seeds: dict[int, int | None]
    ) -> dict[int, ChunkResult]:
        return {i: self._step(i, chunk, next_seeds[i]) for i, chunk in chunks.items()}

    def _step(self, i: int, chunk: np.ndarray, next_seed: int | None) -> ChunkResult:
        if not self.tolerant:
            return self.envs[i].step_chunk(chunk, next_seed)
        try:
            return self.envs[i].step_chunk(chunk, next_seed)
        except NotFinite as error:
            kind, message = error.kind, str(error)
        except UserError:
            raise
        except Exception as error:  # whatever a simulator raises
            kind, message = "crash", f"--env.type: the simulator failed: {reason(error, last=True)}"
            with contextlib.suppress(Exception):
                self.envs[i].close()
            self.envs[i] = self._make(i)
        return lost_episode(kind, message, None if next_seed is None else self.envs[i].reset(next_seed))

    def close(self) -> None:
        for env in self.envs.values():
            with contextlib.suppress(Exception):
                env.close()


def _worker(connection: Any, config: EnvConfig, indices: list[int], *options: Any) -> None:
    """Serve one group of environments over a pipe until told to stop."""
    import torch

    # A terminal and SLURM signal the whole group: the run decides when its simulators end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)  # the cores belong to the learner
    group: _Group | None = None
    try:
        group = _Group(config, indices, *options)
        connection.send(("ok", group.describe(), 0.0))
        while True:
            command, args = connection.recv()
            if command == "close":
                break
            started = time.perf_counter()
            answer = getattr(group, command)(*args)
            connection.send(("ok", answer, time.perf_counter() - started))
    except UserError as error:
        connection.send(("user_error", (error.option, error.message), 0.0))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send(("error", traceback.format_exc(), 0.0))
    finally:
        if group is not None:
            group.close()


class ChunkVectorEnv:
    """``num_envs`` chunk environments, spread over ``num_workers`` processes.

    Environment ``i`` runs task ``i % number_of_tasks`` of the config. ``send`` and ``receive`` are
    apart so that the caller can do other work while the simulators step.

    Args:
        config: a LeRobot environment config.
        num_envs: number of environments.
        num_workers: processes; 0 steps them in this process.
        n_obs_steps: observation history that the policy looks at.
        frame_every: keep a rendered frame every so many steps, where rendering is on.
        keep_seen: return every step's observation in ``ChunkResult.seen``.
        task: run this task of the config in every environment.
        tolerant: an episode in which the simulator crashes or hangs, or NaN or Inf appears, is lost
            (``ChunkResult.lost``) and the next one starts, in a new worker where need be; else an error.
        timeout: seconds that a worker may take for an answer before it counts as hanging; 0 for any time.

    Attributes:
        busy: seconds for which the simulators worked on what the last ``receive`` brought, and
        idle: from then until it was called; both averaged over the workers.
        repeatable: false where an environment says, or has been found, not to repeat an episode.
        descriptions: what each environment says of itself.
        on_success_key: called once for each name under which environments report success.
    """

    def __init__(
        self,
        config: EnvConfig,
        num_envs: int,
        num_workers: int = 1,
        n_obs_steps: int = 1,
        frame_every: int = 2,
        keep_seen: bool = False,
        task: int | None = None,
        tolerant: bool = False,
        timeout: float = 0.0,
    ) -> None:
        self.num_envs = num_envs
        self._tolerant, self._timeout = tolerant, timeout
        options = {"n_obs_steps": n_obs_steps, "frame_every": frame_every, "keep_seen": keep_seen}
        self._arguments = (task, tolerant, options)
        self._config = config
        self._local: _Group | None = None
        self._workers: list[tuple[Any, Any, list[int]]] = []
        self._pending: dict[int, Any] = {}
        self._sent = self._seconds = self.busy = self.idle = 0.0
        indices = list(range(num_envs))
        if num_workers <= 0:
            self._local = _Group(config, indices, *self._arguments)
            described = self._local.describe()
        else:
            described = self._start(indices, num_workers)
        self.descriptions = [described[i] for i in indices]
        self.task_descriptions = [one.instruction for one in self.descriptions]
        self.task_names = [one.task for one in self.descriptions]
        self.repeatable = all(one.repeatable for one in self.descriptions)
        self.on_success_key: Callable[[str], None] = lambda key: None
        self._success_keys: set[str] = set()

    def _start(self, indices: list[int], num_workers: int) -> dict[int, Description]:
        described: dict[int, Description] = {}
        for part in np.array_split(indices, min(num_workers, len(indices))):
            self._workers.append(self._start_worker([int(i) for i in part]))
        try:
            for worker in self._workers:
                described.update(self._receive_from(worker, BUILDING))
        except BaseException:
            self.close()
            raise
        return described

    def _start_worker(self, members: list[int]) -> tuple[Any, Any, list[int]]:
        # A forked copy of a process that runs torch threads can deadlock: fork from a clean server.
        context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
        if sys.platform != "win32":
            context.set_forkserver_preload(["trimtab.rl.envs.vector", type(self._config).__module__])
        ours, theirs = context.Pipe()
        arguments = (theirs, self._config, members, *self._arguments)
        process = context.Process(target=_worker, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return process, ours, members

    def reset(
        self, seeds: dict[int, int], render: dict[int, bool] | None = None
    ) -> dict[int, RawObservation]:
        """Reset the environments named in ``seeds`` and return their observation histories."""
        self._dispatch("reset", seeds, render or {})
        return self.receive()

    def send(self, chunks: dict[int, np.ndarray], next_seeds: dict[int, int | None]) -> None:
        """Start stepping ``chunks`` (each (T, action_dim)); ``next_seeds`` as in ``ChunkEnv.step_chunk``."""
        self._dispatch("step", chunks, next_seeds)

    def examine(self, chunk: np.ndarray) -> Findings:
        """Ask the first environment, which has just been reset, whether it does what it must.

        Args:
            chunk: (T, action_dim), to be stepped.
        """
        self._dispatch("examine", {0: chunk}, {})
        return self._received()[0]

    def check_actions(self, chunk: np.ndarray) -> None:
        """Refuse actions (T, action_dim) that the first environment cannot take; nothing moves."""
        self._dispatch("check_actions", {0: chunk}, {})
        self._received()

    def receive(self) -> dict[int, Any]:
        """Wait for what ``send`` started: a ``ChunkResult`` for each environment."""
        found = self._received()
        for result in found.values():
            key = getattr(result, "success_key", None)
            if key and key not in self._success_keys:
                self._success_keys.add(key)
                self.on_success_key(key)
        return found

    def _received(self) -> dict[int, Any]:
        asked = time.perf_counter()
        self.busy = self.idle = 0.0
        if self._local is not None:
            results, self._pending = self._pending, {}
            self._account(asked, 1)
            return results
        merged: dict[int, Any] = {}
        count = len(self._pending)
        for number in list(self._pending):
            try:
                merged.update(self._receive_from(self._workers[number]))
                self._account(asked, count)
            except WorkerLost as lost:
                if not self._tolerant or self._pending[number][1] not in ("reset", "step"):
                    raise
                merged.update(self._restart(number, lost))
            del self._pending[number]
        return dict(sorted(merged.items()))

    def _account(self, asked: float, workers: int) -> None:
        """Add one of ``workers`` to ``busy`` and ``idle``."""
        self.busy += self._seconds / workers
        self.idle += max(0.0, asked - self._sent - self._seconds) / workers

    def _dispatch(self, command: str, per_env: dict[int, Any], extra: dict[int, Any]) -> None:
        if self._pending:
            raise RuntimeError("the environments are still stepping: call receive() first")
        self._sent = time.perf_counter()
        if self._local is not None:
            try:
                self._pending = getattr(self._local, command)(per_env, extra)
            except UserError:
                raise
            except Exception as error:  # whatever a simulator raises
                raise WorkerLost("crash", f"{type(error).__name__}: {reason(error, last=True)}") from error
            self._seconds = time.perf_counter() - self._sent
            return
        for number, worker in enumerate(self._workers):
            mine = {i: per_env[i] for i in worker[2] if i in per_env}
            if mine:
                beside = {i: extra[i] for i in mine if i in extra}
                try:
                    worker[1].send((command, (mine, beside)))
                except (BrokenPipeError, ConnectionResetError):
                    if not self._tolerant:
                        self._receive_from(worker)  # raises with what the worker said last
                # Should the worker be lost: the episodes to start in its place.
                self._pending[number] = mine if command == "reset" else beside, command

    def _receive_from(self, worker: tuple[Any, Any, list[int]], patience: float = 1.0) -> dict[int, Any]:
        process, connection, members = worker
        name = f"the worker of environments {members[0]}-{members[-1]}"
        try:
            if self._timeout and not connection.poll(self._timeout * patience):
                raise WorkerLost("hang", f"{name} did not answer for {self._timeout * patience:g} s")
            status, payload, self._seconds = connection.recv()
        except (EOFError, ConnectionResetError):
            process.join(1)
            raise WorkerLost("crash", f"{name} died with exit code {process.exitcode}") from None
        if status == "ok":
            return payload
        if status == "user_error":
            raise UserError(*payload)
        raise WorkerLost("crash", f"an environment worker failed:\n{payload}")

    def _restart(self, number: int, lost: WorkerLost) -> dict[int, Any]:
        """Start a lost worker anew, and in it the episodes that would have followed."""
        process, connection, members = self._workers[number]
        process.kill()
        process.join()
        connection.close()
        self._workers[number] = worker = self._start_worker(members)
        self._receive_from(worker, BUILDING)
        seeds, command = self._pending[number]
        seeds = {i: seed for i, seed in seeds.items() if seed is not None}
        worker[1].send(("reset", (seeds, {})))
        observations = self._receive_from(worker, BUILDING)
        if command == "reset":
            return observations
        message = f"--env.type: {reason(lost, last=True)}"
        pending = self._pending[number][0]
        return {i: lost_episode(lost.kind, message, observations.get(i)) for i in pending}

    def close(self) -> None:
        """Stop the workers. Safe to call twice."""
        if self._local is not None:
            self._local.close()
        for _, connection, _ in self._workers:
            with contextlib.suppress(OSError):
                connection.send(("close", ()))
        for _, connection, _ in self._workers:
            connection.close()  # frees a worker that is still writing an answer
        for process, _, _ in self._workers:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._workers, self._pending = [], {}

    def __enter__(self) -> ChunkVectorEnv:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
