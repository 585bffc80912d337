"""Meta-World with its 39-number state as the observation, registered as a LeRobot environment.

LeRobot's own ``metaworld`` environment renders a 480x480 image at every step and hides the state.
This one returns the state, renders on request only, and resets from a cached post-reset state.
"""

import copy
import difflib
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE

from trimtab.adapters.errors import UserError, reason
from trimtab.rl.envs.chunk import vector_envs
from trimtab.rl.rendering import choose_gl_backend

STATE_DIM = 39
AGENT_DIM = 4
ACTION_DIM = 4
NUM_TASKS = 50
ENV_DIM = STATE_DIM - AGENT_DIM + NUM_TASKS
MAX_EPISODE_LENGTH = 500  # Meta-World raises at step 501
RENDER_SIZE = 256
RECORD = "base.json"  # in the folder of an embedded base: what it was made of


def _task_classes() -> dict[str, type]:
    """Meta-World's 50 environments by name, in the order of MT50, which is that of their one-hot."""
    choose_gl_backend()
    try:
        from metaworld import ALL_V3_ENVIRONMENTS
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError("--env.type", f"Meta-World cannot be loaded here: {reason(error)}") from error
    return ALL_V3_ENVIRONMENTS


def task_names() -> list[str]:
    """The 50 tasks of MT50."""
    return list(_task_classes())


def resolve_task(name: str, option: str = "--env.task") -> str:
    """Meta-World's name for ``name``, whose ``-v3`` may be left out, or a ``UserError`` with the closest."""
    names, full = task_names(), name if name.endswith("-v3") else f"{name}-v3"
    if full in names:
        return full
    close = difflib.get_close_matches(full, names, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(close)}?" if close else "`trimtab base --list_tasks=true` lists all 50"
    raise UserError(option, f"Meta-World has no task '{name}'; {hint}")


def split_tasks(tasks: str | None, option: str = "--env.task") -> list[str]:
    """Split a comma-separated list of task names and resolve each."""
    names = [resolve_task(part.strip(), option) for part in (tasks or "").split(",") if part.strip()]
    if not names:
        raise UserError(option, "name at least one Meta-World task, for instance hammer-v3")
    return names


def check_episode_length(steps: int, option: str = "--env.episode_length") -> None:
    """Raise a ``UserError`` for a time limit that Meta-World's own, of 500 steps, would cut short."""
    if not 1 <= steps <= MAX_EPISODE_LENGTH:
        raise UserError(option, f"must be between 1 and {MAX_EPISODE_LENGTH} steps, got {steps}")


def make_simulator(task: str) -> Any:
    """Build Meta-World's own environment for ``task``, seeded resets, goal visible, cached hand reset."""
    cls = type(f"Cached{task}", (_task_classes()[task], _cached_reset_class()), {})
    sim = cls(render_mode="rgb_array", camera_name="corner2", width=RENDER_SIZE, height=RENDER_SIZE)
    sim._partially_observable = False
    sim.__dict__.pop("sawyer_observation_space", None)  # cached while the goal was hidden
    sim._set_task_called = True
    sim._freeze_rand_vec = False
    sim.seeded_rand_vec = True
    sim.model.cam_pos[2] = [0.75, 0.075, 0.7]  # where LeRobot's wrapper puts `corner2`
    return sim


@functools.cache
def _cached_reset_class() -> type:
    """A class between a task and ``SawyerXYZEnv`` whose resets are fast and free of history.

    Meta-World's reset simulates 50 steps of hand motion, twice, and starts from whatever the last
    episode left in the model (a button's box, a goal site). Here the model is put back first, so the
    hand motion is always the same and its result can be copied instead of simulated. Meta-World's
    draws are untouched: a seed places the objects as it does in LeRobot's wrapper.
    """
    import mujoco
    from metaworld.sawyer_xyz_env import SawyerXYZEnv

    # Every field of the model that one of the 50 tasks writes at reset.
    model_fields = ("body_pos", "body_quat", "site_pos", "site_quat", "geom_pos", "geom_quat")

    class CachedReset(SawyerXYZEnv):
        def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
            if "_pristine" not in self.__dict__:
                self._pristine = {name: getattr(self.model, name).copy() for name in model_fields}
            self._restore_model()
            if seed is not None:
                self.seed(seed)
            mujoco.mj_resetData(self.model, self.data)
            _, info = super().reset()
            # Some tasks move a body and then observe without recomputing positions, so that Meta-World's
            # first observation shows the object where it was before. Ours shows it where it is.
            mujoco.mj_forward(self.model, self.data)
            self._prev_obs = self._get_curr_obs_combined_no_goal()
            return self._get_obs().astype(np.float64), info

        def _restore_model(self) -> None:
            for name, value in self._pristine.items():
                getattr(self.model, name)[:] = value

        def _reset_hand(self, steps: int = 50) -> None:
            self._restore_model()
            cache = self.__dict__.setdefault("_hand_cache", {})
            if steps not in cache:
                mujoco.mj_resetData(self.model, self.data)
                super()._reset_hand(steps)
                cache[steps] = (copy.copy(self.data), self.init_tcp.copy())
            data, init_tcp = cache[steps]
            mujoco.mj_copyData(self.data, self.model, data)
            self.init_tcp = init_tcp.copy()

    return CachedReset


class MetaworldStateEnv(gym.Env):
    """One Meta-World task: state observation, sparse success, time limit as truncation.

    Observation (a dict, LeRobot's keys):
        ``agent_pos``: (4,) hand position in metres and gripper opening in [0, 1];
        ``environment_state``: (85,) the other 35 numbers of Meta-World's state (objects, the previous
        frame, the goal) and the task's one-hot over MT50.
    Action: (4,) in [-1, 1]: hand displacement (1 = 1 cm) and gripper effort.
    Reward: 1.0 at the step that succeeds, else 0.0. Success terminates; ``episode_length`` truncates.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, task: str, episode_length: int = 160, render_mode: str | None = "rgb_array") -> None:
        check_episode_length(episode_length)
        self.task = resolve_task(task)  # loads Meta-World, which LeRobot's module imports
        from lerobot.envs.metaworld import TASK_DESCRIPTIONS

        self.task_description = TASK_DESCRIPTIONS[self.task]
        self.render_mode = render_mode
        self._max_episode_steps = episode_length
        self._one_hot = np.eye(NUM_TASKS)[task_names().index(self.task)]
        self._sim: Any = None  # built at the first reset, inside the worker process
        self._renderer: Any = None
        self._steps = 0
        self.state = np.zeros(STATE_DIM)
        sizes = {"agent_pos": AGENT_DIM, "environment_state": ENV_DIM}
        self.observation_space = gym.spaces.Dict(
            {key: gym.spaces.Box(-np.inf, np.inf, (size,), np.float64) for key, size in sizes.items()}
        )
        self.action_space = gym.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        if self._sim is None:
            self._sim = make_simulator(self.task)
            if seed is None:  # Meta-World has no generator before its first seed
                seed = int(self.np_random.integers(2**31))
        self.state, _ = self._sim.reset(seed=seed)
        self._steps = 0
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        action = np.asarray(action, dtype=np.float32)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"expected {ACTION_DIM} finite numbers as action, got {action}")
        self.state, _, _, _, info = self._sim.step(np.clip(action, -1.0, 1.0))
        self._steps += 1
        success = bool(info["success"])
        truncated = not success and self._steps >= self._max_episode_steps
        return self._observation(), float(success), success, truncated, {"is_success": success}

    def render(self) -> np.ndarray:
        """An RGB frame (256, 256, 3) of camera ``corner2``, upright."""
        import mujoco

        if self._renderer is None:
            # Shadows and multisampling cost ten times the rest on a CPU; a video does without them.
            self._sim.model.vis.quality.offsamples = 0
            self._renderer = mujoco.Renderer(self._sim.model, RENDER_SIZE, RENDER_SIZE)
        self._renderer.update_scene(self._sim.data, camera="corner2")
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return np.ascontiguousarray(self._renderer.render()[::-1, ::-1])  # `corner2` hangs upside down

    def close(self) -> None:
        for part in (self._renderer, self._sim):
            if part is not None:
                part.close()
        self._renderer = self._sim = None

    def _observation(self) -> dict[str, np.ndarray]:
        return {
            "agent_pos": self.state[:AGENT_DIM].copy(),
            "environment_state": np.concatenate([self.state[AGENT_DIM:], self._one_hot]),
        }


@EnvConfig.register_subclass("metaworld_state")
@dataclass
class MetaworldStateConfig(EnvConfig):
    """``--env.type=metaworld_state``: one Meta-World task, or several separated by commas."""

    task: str | None = "hammer-v3"
    fps: int = 80
    # Time limit in environment steps (1/80 s each).
    episode_length: int = 160
    render_mode: str = "rgb_array"
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            ACTION: PolicyFeature(FeatureType.ACTION, (ACTION_DIM,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (AGENT_DIM,)),
            "environment_state": PolicyFeature(FeatureType.ENV, (ENV_DIM,)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE, "environment_state": OBS_ENV_STATE}
    )

    tiny: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_episode_length(self.episode_length)

    def task_names(self) -> list[str]:
        """The tasks that ``task`` lists, with their full names; a ``UserError`` where one is unknown."""
        return split_tasks(self.task)

    def base_tasks(self, folder: Path) -> list[str]:
        """The tasks of the embedded base in ``folder``; empty where there is another policy."""
        record = folder / RECORD
        if not record.is_file():
            return []
        try:
            return list(json.loads(record.read_text(encoding="utf-8"))["tasks"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError("--policy.path", f"{record} is damaged ({error})") from None

    def check_base(self, folder: Path) -> None:
        """Raise a UserError for a task that the embedded base in ``folder`` was not trained on."""
        known = self.base_tasks(folder)
        for name in self.task_names() if known else ():
            if name not in known:
                raise UserError(
                    "--env.task",
                    f"this base was not trained on {name}; it knows {', '.join(known)}. "
                    f"Make one that does: trimtab base --tasks={','.join([*known, name])}",
                )

    @property
    def gym_kwargs(self) -> dict:
        return {"episode_length": self.episode_length, "render_mode": self.render_mode}

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        makes = [functools.partial(MetaworldStateEnv, task, **self.gym_kwargs) for task in self.task_names()]
        return vector_envs(self.type, makes, n_envs, use_async_envs)
