"""One environment stepped a whole action chunk at a time."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np

from trimtab.adapters.errors import UserError
from trimtab.rl.envs import contract

# One environment's raw observation: arrays by key; cameras may sit one level deeper (`pixels`).
RawObservation = dict[str, Any]
Fault = tuple[str, str]  # its kind, and what is said of it, after its option


class NotFinite(UserError):
    """NaN or Inf where none may be; ``kind`` is ``chunk``, ``observation`` or ``reward``."""

    def __init__(self, kind: str, option: str, message: str) -> None:
        super().__init__(option, message)
        self.kind = kind


@dataclass
class ChunkResult:
    """What came of one action chunk."""

    # The observation history to act on next, each entry (n_obs_steps, ...). After an episode's end it belongs
    # to the next episode, or is None where there is none.
    observation: RawObservation | None
    # That at the true last step of an episode that ended.
    final_observation: RawObservation | None = None
    # (k,) of each step really executed: the environment's own reward, and whether it reported success.
    rewards: np.ndarray = field(default_factory=lambda: np.zeros(0))
    successes: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    terminated: bool = False  # in a terminal state: the bootstrap is cut
    truncated: bool = False  # by a time limit: the bootstrap is kept
    seed: int = -1  # of the episode that ran
    frames: list[np.ndarray] = field(default_factory=list)  # rendered, where asked for
    seen: list[RawObservation] = field(default_factory=list)  # before each step, where asked for
    # What lost the episode. Nothing then holds but the observation.
    lost: Fault | None = None
    not_begun: Fault | None = None  # why the next episode has no observation
    # Of a robot: the actions (k, action_dim) that it was sent, where these are not the chunk's; whether a
    # person acted in the policy's place; and what the learner noted when it acted.
    executed: np.ndarray | None = None
    human: bool = False
    note: dict[str, np.ndarray] = field(default_factory=dict)
    # The name in info by which this environment has ever said whether it succeeded, and what else was there.
    success_key: str | None = None
    info_keys: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated

    @property
    def steps(self) -> int:
        return len(self.rewards)


class ChunkEnv:
    """Steps a Gymnasium environment through action chunks and keeps its observation history.

    Args:
        env: the environment; what it must do is in ``contract.py``.
        n_obs_steps: length of the history, as LeRobot's ``select_action`` queues it: the last
            observations, the first one repeated after a reset.
        keep_seen: return every step's observation, to record what was done.
        limit: steps of an episode, where the environment itself names no time limit.
        tasks: how many its config has, of which it has one.

    ``seed`` is that of the running episode, ``limit`` its time limit in steps or ``None``; frames are kept
    where ``render`` is set. ``layout`` is that of the first observation; empty before it.
    """

    frame_every = 2  # steps from one kept frame to the next

    def __init__(
        self,
        env: gym.Env,
        n_obs_steps: int = 1,
        keep_seen: bool = False,
        limit: int | None = None,
        tasks: int = 1,
    ) -> None:
        self.env, self.tasks = env, tasks
        self.n_obs_steps, self.keep_seen = n_obs_steps, keep_seen
        self.limit = time_limit(env) or limit or None
        self.layout: contract.Layout = {}
        self.seed = -1
        self.render = False
        self._history: deque[RawObservation] = deque(maxlen=n_obs_steps)
        self._step = 0
        self._running = False
        self._success_key: str | None = None
        self._info_keys: set[str] = set()
        self._frames: list[np.ndarray] = []
        # An environment may leave out what is slow to see (``libero.py``): all but what is handed on.
        self._watch: Callable[[bool], None] = getattr(env.unwrapped, "watch", lambda on: None)

    def reset(self, seed: int) -> RawObservation:
        """Start the episode of ``seed`` and return its observation history."""
        self._running = False  # until it has returned
        observation, info = contract.read_reset(self.env.reset(seed=int(seed)))
        self._keep(observation, self.n_obs_steps)
        self._succeeded(info)
        self.seed, self._step, self._running = int(seed), 0, True
        self._frames = [self._frame()] if self.render else []
        return self.history()

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        """Execute ``actions`` (T, action_dim), un-normalised, until the chunk or the episode ends.

        Raises:
            NotFinite: NaN or Inf in an action, observation or reward.
            UserError: actions of another shape than the environment takes, or it breaks its contract.
        """
        if not self._running:
            raise RuntimeError("step_chunk called on an episode that has ended: reset it first")
        self.check_actions(actions)
        rewards: list[float] = []
        successes: list[bool] = []
        seen: list[RawObservation] = []
        terminated = truncated = False
        left = len(actions) if self.limit is None else min(len(actions), self.limit - self._step)
        for number, action in enumerate(actions):
            self._watch(self.keep_seen or number >= left - self.n_obs_steps)
            if self.keep_seen:
                seen.append(self._history[-1])
            # A copy, for the actions are recorded and environments clip and scale in place.
            returned = self.env.step(action.copy())
            observation, reward, terminated, truncated, info = contract.read_step(returned)
            self._keep(observation)
            if not np.isfinite(reward):
                raise NotFinite("reward", "--env.type", f"the environment returned the reward {reward}")
            self._step += 1
            succeeded = self._succeeded(info)
            if self.limit is not None and self._step >= self.limit:
                # As in lerobot-eval: some of LeRobot's environments leave their time limit to the caller.
                terminated = terminated and succeeded
                truncated = True
            truncated = truncated and not terminated  # success in the very last step is no time limit
            rewards.append(reward)
            successes.append(succeeded)
            ended = terminated or truncated
            if self.render and (ended or self._step % self.frame_every == 0):
                self._frames.append(self._frame())
            if ended:
                break
        frames, self._frames = self._frames, []
        result = ChunkResult(
            observation=self.history(),
            rewards=np.asarray(rewards),
            successes=np.asarray(successes),
            terminated=terminated,
            truncated=truncated,
            seed=self.seed,
            frames=frames,
            seen=seen,
            success_key=self._success_key,
            info_keys=tuple(sorted(self._info_keys)),
        )
        if result.ended:
            self._running = False
            result.final_observation, result.observation = result.observation, None
        return result

    def close(self) -> None:
        self.env.close()

    def check_actions(self, actions: np.ndarray) -> None:
        """Raise a UserError for actions (T, action_dim) that the environment cannot take; nothing moves."""
        space = self.env.action_space
        if actions.shape[1:] != space.shape:
            taken = space.shape if isinstance(space, gym.spaces.Box) else space
            raise UserError(
                "--env.type",
                f"the policy makes actions of shape {actions.shape[1:]}, the environment takes {taken}; "
                "choose the environment that the policy was trained on",
            )
        if not np.isfinite(actions).all():
            broken = "the policy produced a NaN or Inf action; its weights or statistics are broken"
            raise NotFinite("chunk", "--policy.path", broken)

    def history(self) -> RawObservation:
        """The last ``n_obs_steps`` observations, entries (n_obs_steps, ...)."""
        return stack_observations(list(self._history))

    def _frame(self) -> np.ndarray:
        """What is rendered now; of several cameras, one beside the other."""
        frame = self.env.render()
        return np.concatenate(frame, 1) if isinstance(frame, list | tuple) else np.array(frame)

    def _keep(self, observation: RawObservation, times: int = 1) -> None:
        """Take an observation into the history."""
        arrays = contract.flat(observation)
        for path, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                broken = f"the environment returned NaN or Inf in its observation '{path}'"
                raise NotFinite("observation", "--env.type", broken)
        layout = contract.layout(arrays)
        if layout != self.layout:
            contract.check_layout(self.layout or layout, layout)
        self.layout = self.layout or layout
        self._history.extend([observation] * times)

    def _succeeded(self, info: dict[str, Any]) -> bool:
        key, success = contract.read_success(info)
        self._success_key = key or self._success_key
        final = info.get("final_info")
        names = {*info, *(final if isinstance(final, dict) else ())} - {key, "final_info"}
        self._info_keys |= {str(name) for name in names}
        return success


def time_limit(env: gym.Env) -> int | None:
    """The environment's ``_max_episode_steps``, or that of its spec, where it has one."""
    try:
        limit = env.get_wrapper_attr("_max_episode_steps")
    except AttributeError:
        limit = getattr(getattr(env, "spec", None), "max_episode_steps", None)
    return int(limit) if limit and limit > 0 else None


def vector_envs(
    name: str, makes: Sequence[Callable[[], gym.Env]], n_envs: int, use_async: bool
) -> dict[str, dict[int, gym.vector.VectorEnv]]:
    """What a config's ``create_envs`` returns, of a maker for each task."""
    vectorised: Callable[..., gym.vector.VectorEnv] = gym.vector.SyncVectorEnv
    if use_async and n_envs > 1:
        vectorised = partial(gym.vector.AsyncVectorEnv, context="forkserver")
    mode = gym.vector.AutoresetMode.SAME_STEP
    return {name: {i: vectorised([make] * n_envs, autoreset_mode=mode) for i, make in enumerate(makes)}}


def stack_observations(
    observations: list[RawObservation], join: Callable[[list[np.ndarray]], np.ndarray] = np.stack
) -> RawObservation:
    """Stack observations along a new first axis: entries (...) become (B, ...), nested ones too.

    With ``np.concatenate`` as ``join`` it is the first axis that there is.
    """
    stacked: RawObservation = {}
    for key, first in observations[0].items():
        entries = [observation[key] for observation in observations]
        stacked[key] = stack_observations(entries, join) if isinstance(first, dict) else join(entries)
    return stacked
