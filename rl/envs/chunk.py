"""One environment stepped a whole action chunk at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np

from trimtab.adapters.errors import UserError

SUCCESS = "is_success"  # LeRobot's name
# One environment's raw observation: arrays by key; cameras may sit one level deeper (`pixels`).
RawObservation = dict[str, Any]


class NotFinite(UserError):
    """NaN or Inf where none may be.

    Args:
        kind: ``chunk``, ``observation`` or ``reward``.
        option, message: as for ``UserError``.
    """

    def __init__(self, kind: str, option: str, message: str) -> None:
        super().__init__(option, message)
        self.kind = kind


@dataclass
class ChunkResult:
    """What came of one action chunk.

    Attributes:
        observation: the observation history to act on next, each entry (n_obs_steps, ...). After an
            episode's end it belongs to the next episode, or is ``None`` when there is none.
        final_observation: the history at the true last step of an episode that ended, else ``None``.
        rewards: (k,) the environment's own reward of each step really executed, ``1 <= k <= chunk``.
        successes: (k,) whether the environment reported success at each of these steps.
        terminated: the episode ended in a terminal state (the bootstrap is cut).
        truncated: the episode was cut off (time limit); the bootstrap is kept.
        seed: the seed that the running episode was reset with.
        frames: rendered frames of this chunk, where asked for.
        seen: (k) the raw observation before each of these steps, where asked for.
        lost: the kind of fault that lost the episode, and what was said; the rest is then empty, but
            for the observation of the next episode.
        success_key: under which name the environment has reported success so far; ``None``: never yet.
        info_keys: what else its ``info`` has held.
    """

    observation: RawObservation | None
    final_observation: RawObservation | None
    rewards: np.ndarray
    successes: np.ndarray
    terminated: bool
    truncated: bool
    seed: int
    frames: list[np.ndarray] = field(default_factory=list)
    seen: list[RawObservation] = field(default_factory=list)
    lost: tuple[str, str] | None = None
    success_key: str | None = None
    info_keys: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated

    @property
    def steps(self) -> int:
        return len(self.rewards)


def lost_episode(kind: str, message: str, observation: RawObservation | None) -> ChunkResult:
    """The result of a chunk whose episode was lost to a fault, with the ``observation`` to go on from."""
    empty = np.zeros(0)
    return ChunkResult(observation, None, empty, empty.astype(bool), False, False, -1, lost=(kind, message))


class ChunkEnv:
    """Steps a Gymnasium environment through action chunks and keeps its observation history.

    The history is what LeRobot's ``select_action`` would have queued: the last ``n_obs_steps``
    observations, the first one repeated after a reset.

    Args:
        env: the environment; success is read from ``info["is_success"]`` as in LeRobot.
        n_obs_steps: length of the observation history.
        frame_every: where rendering is asked for, keep a frame every so many steps.
        keep_seen: return every step's observation, to record what was done.
    """

    def __init__(
        self, env: gym.Env, n_obs_steps: int = 1, frame_every: int = 2, keep_seen: bool = False
    ) -> None:
        self.env = env
        self.frame_every = frame_every
        self.keep_seen = keep_seen
        self.render = False
        self._history: deque[RawObservation] = deque(maxlen=n_obs_steps)
        self._seed = -1
        self._step = 0
        self._limit = _time_limit(env)
        self._running = False
        self._frames: list[np.ndarray] = []
        self._success_key: str | None = None
        self._info_keys: set[str] = set()
        # An environment may leave out what is slow to see (``libero.py``): all but what is handed on.
        self._watch: Callable[[bool], None] | None = getattr(env.unwrapped, "watch", None)

    @property
    def task_description(self) -> str:
        """The language instruction, as ``lerobot-eval`` finds it; empty where there is none."""
        unwrapped = self.env.unwrapped
        for name in ("task_description", "task"):
            value = getattr(unwrapped, name, None)
            if isinstance(value, str) and value:
                return value
        return ""

    def reset(self, seed: int) -> RawObservation:
        """Start the episode of ``seed`` and return its observation history."""
        observation, _ = self.env.reset(seed=int(seed))
        check_finite(observation)
        self._history.extend([observation] * self._history.maxlen)
        self._seed, self._step, self._running = int(seed), 0, True
        self._frames = [self.env.render()] if self.render else []
        return self._stacked()

    def step_chunk(self, actions: np.ndarray, next_seed: int | None) -> ChunkResult:
        """Execute ``actions`` (T, action_dim) until the chunk or the episode ends.

        Args:
            actions: un-normalised actions.
            next_seed: seed of the episode to start should this one end; ``None`` leaves it ended.

        Raises:
            NotFinite: NaN or Inf in an action, observation or reward.
            UserError: actions of another shape than the environment takes.
        """
        if not self._running:
            raise RuntimeError("step_chunk called on an episode that has ended: reset it first")
        expected = self.env.action_space.shape
        if actions.shape[1:] != expected:
            raise UserError(
                "--env.type",
                f"the policy makes actions of shape {actions.shape[1:]}, the environment takes {expected}; "
                "choose the environment that the policy was trained on",
            )
        if not np.isfinite(actions).all():
            raise NotFinite(
                "chunk",
                "--policy.path",
                "the policy produced a NaN or Inf action; its weights or statistics are broken",
            )
        rewards: list[float] = []
        successes: list[bool] = []
        seen: list[RawObservation] = []
        terminated = truncated = False
        left = len(actions) if self._limit is None else min(len(actions), self._limit - self._step)
        for number, action in enumerate(actions):
            if self._watch is not None:
                self._watch(self.keep_seen or number >= left - self._history.maxlen)
            if self.keep_seen:
                seen.append(self._history[-1])
            observation, reward, terminated, truncated, info = self.env.step(action)
            check_finite(observation)
            if not np.isfinite(reward):
                raise NotFinite("reward", "--env.type", f"the environment returned the reward {reward}")
            self._history.append(observation)
            self._step += 1
            if self._limit is not None and self._step >= self._limit and not _is_success(info):
                # As in lerobot-eval: some of LeRobot's environments leave their time limit to the caller.
                terminated, truncated = False, True
            self._note(info)
            rewards.append(float(reward))
            successes.append(_is_success(info))
            ended = terminated or truncated
            if self.render and (ended or self._step % self.frame_every == 0):
                self._frames.append(self.env.render())
            if ended:
                break
        frames, self._frames = self._frames, []
        result = ChunkResult(
            observation=None,
            final_observation=None,
            rewards=np.asarray(rewards),
            successes=np.asarray(successes),
            terminated=bool(terminated),
            # An episode that succeeds in its very last step has terminated, not run out of time.
            truncated=bool(truncated) and not terminated,
            seed=self._seed,
            frames=frames,
            seen=seen,
            success_key=self._success_key,
            info_keys=tuple(sorted(self._info_keys)),
        )
        if result.ended:
            self._running = False
            result.final_observation = self._stacked()
            if next_seed is not None:
                result.observation = self.reset(next_seed)
        else:
            result.observation = self._stacked()
        return result

    def _note(self, info: dict[str, Any]) -> None:
        """Remember what ``info`` holds."""
        final = info.get("final_info")
        held = {*info, *(final if isinstance(final, dict) else ())}
        if SUCCESS in held:
            self._success_key = SUCCESS
        self._info_keys |= {str(key) for key in held - {SUCCESS, "final_info"}}

    def close(self) -> None:
        self.env.close()

    def _stacked(self) -> RawObservation:
        return _stack(list(self._history))


def _time_limit(env: gym.Env) -> int | None:
    """The environment's ``_max_episode_steps``, where it has one."""
    try:
        limit = env.get_wrapper_attr("_max_episode_steps")
    except AttributeError:
        return None
    return int(limit) if limit else None


def _is_success(info: dict[str, Any]) -> bool:
    if SUCCESS in info:
        return bool(info[SUCCESS])
    return bool(info.get("final_info", {}).get(SUCCESS, False))


def _stack(items: list[Any]) -> Any:
    """Stack a list of (nested) dicts of arrays along a new first axis."""
    if isinstance(items[0], dict):
        return {key: _stack([item[key] for item in items]) for key in items[0]}
    return np.stack(items)


def stack_observations(observations: list[RawObservation]) -> RawObservation:
    """Batch observation histories: entries (n_obs_steps, ...) become (B, n_obs_steps, ...)."""
    return _stack(observations)


def check_finite(observation: RawObservation) -> None:
    """Raise ``NotFinite`` where a floating-point entry of the observation is NaN or Inf."""
    for key, value in observation.items():
        if isinstance(value, dict):
            check_finite(value)
        elif np.issubdtype(np.asarray(value).dtype, np.floating) and not np.isfinite(value).all():
            raise NotFinite(
                "observation",
                "--env.type",
                f"the environment returned NaN or Inf in its observation '{key}'",
            )
