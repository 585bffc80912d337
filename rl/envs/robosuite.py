"""robomimic's tasks ``Lift``, ``Can`` and ``Square`` on robosuite, for ``--env.type=gym``:

    --env.type=gym --env.factory=trimtab.rl.envs.robosuite:make --env.kwargs='{task: Lift}'

As robomimic sets them up: a Panda, delta poses by operational-space control at 20 Hz, low-dimensional states.
"""

from __future__ import annotations

import logging
from typing import Any

import gymnasium as gym
import numpy as np

from trimtab.adapters.errors import UserError, reason
from trimtab.rl.rendering import choose_gl_backend

INSTALL = "uv pip install 'lerobot_policy_trimtab[robosuite]' (robosuite==1.5.2 and mujoco==3.8.1)"
RENDER_SIZE = 256
# By robomimic's name: robosuite's, steps of an episode in the reference (ajwagen/dsrl), the task in words.
TASKS = {
    "Lift": ("Lift", 300, "Lift the cube off the table"),
    "Can": ("PickPlaceCan", 300, "Put the can into its bin"),
    "Square": ("NutAssemblySquare", 400, "Put the square nut onto the square peg"),
}
AGENT = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


def make(task: str, horizon: int | None = None, end_at_success: bool = True) -> RobosuiteEnv:
    """The environment of ``task``; with ``end_at_success=False`` an episode always takes ``horizon`` steps.

    Raises:
        UserError: no such task, or robosuite cannot be loaded.
    """
    if task not in TASKS:
        raise UserError("--env.kwargs", f"task must be one of {', '.join(TASKS)}, got '{task}'")
    choose_gl_backend()
    logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        import robosuite
    except ModuleNotFoundError as error:
        raise UserError("--env.factory", f"needs '{error.name}', which is not installed: {INSTALL}") from None
    try:
        sim = robosuite.make(
            TASKS[task][0],
            robots="Panda",
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            control_freq=20,
            ignore_done=True,
            hard_reset=False,
            renderer="mujoco",
            seed=0,  # the cube's size is drawn once, here
        )
    except Exception as error:  # whatever MuJoCo of another version raises
        raise UserError("--env.factory", f"robosuite does not run ({reason(error)}): {INSTALL}") from error
    return RobosuiteEnv(sim, task, horizon or TASKS[task][1], end_at_success)


class RobosuiteEnv(gym.Env):
    """A robosuite task with the state as observation, sparse success, and the time limit as truncation.

    Observation (a dict, LeRobot's keys):
        ``agent_pos``: (9,) the gripper's position in metres, orientation (quaternion, x y z w), and fingers;
        ``environment_state``: (10 for Lift, 14) the object's pose, and its pose seen from the gripper.
    Action: (7,) in [-1, 1]: displacement (1 = 5 cm), rotation (1 = 0.5 rad) and gripper (> 0 closes).
    Reward: 1.0 at a step that succeeds, else 0.0. Success terminates if ``end_at_success``.

    A seed places robot and objects the same whatever ran before. Resets keep the model: 3 ms instead of 110.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, sim: Any, task: str, horizon: int, end_at_success: bool) -> None:
        self.sim, self.task_description = sim, TASKS[task][2]
        self.render_mode = "rgb_array"
        self._max_episode_steps, self._end_at_success = horizon, end_at_success
        self._renderer: Any = None
        self._steps = 0
        self.raw: dict[str, np.ndarray] = sim.reset()  # robosuite's own observation
        self.observation_space = gym.spaces.Dict(
            {
                key: gym.spaces.Box(-np.inf, np.inf, value.shape, np.float64)
                for key, value in self._observation().items()
            }
        )
        self.action_space = gym.spaces.Box(-1.0, 1.0, (sim.action_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        # Robot and samplers hold this generator: it is set, not replaced.
        self.sim.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        self.raw = self.sim.reset()
        self._steps = 0
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.raw, _, _, _ = self.sim.step(np.asarray(action, np.float64))
        self._steps += 1
        success = bool(self.sim._check_success())
        terminated = success and self._end_at_success
        truncated = not terminated and self._steps >= self._max_episode_steps
        return self._observation(), float(success), terminated, truncated, {"is_success": success}

    def render(self) -> np.ndarray:
        """An RGB frame (256, 256, 3) of robosuite's camera ``agentview``."""
        import mujoco

        model, data = self.sim.sim.model._model, self.sim.sim.data._data
        if self._renderer is None:
            model.vis.quality.offsamples = 0  # slow on a CPU
            self._renderer = mujoco.Renderer(model, RENDER_SIZE, RENDER_SIZE)
            self._visual = mujoco.MjvOption()
            self._visual.geomgroup[0] = 0  # the collision shapes
        self._renderer.update_scene(data, camera="agentview", scene_option=self._visual)
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return self._renderer.render()

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self.sim.close()

    def _observation(self) -> dict[str, np.ndarray]:
        return {
            "agent_pos": np.concatenate([self.raw[name] for name in AGENT]),
            "environment_state": np.array(self.raw["object-state"]),
        }
