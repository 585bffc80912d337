"""robomimic's tasks on robosuite: the episode of a seed, success, and what is said where robosuite lacks."""

import importlib.util
import sys

import numpy as np
import pytest

from trimtab.adapters import UserError
from trimtab.rl.envs import robosuite
from trimtab.rl.envs.gym import GymConfig, make_env

installed = pytest.mark.skipif(
    importlib.util.find_spec("robosuite") is None, reason=f"robosuite is not installed: {robosuite.INSTALL}"
)
FACTORY = "trimtab.rl.envs.robosuite:make"


def rollout(env, seed, actions):
    frames = [env.reset(seed=seed)[0], *(env.step(action)[0] for action in actions)]
    return np.array([np.concatenate([frame["agent_pos"], frame["environment_state"]]) for frame in frames])


@installed
@pytest.mark.parametrize("task, state", [("Lift", 10), ("Can", 14), ("Square", 14)])
def test_the_episode_of_a_seed_is_the_same_whatever_ran_before(task, state):
    actions = np.random.default_rng(0).uniform(-1.0, 1.0, (30, 7)).astype(np.float32)
    env = make_env(GymConfig(factory=FACTORY, kwargs={"task": task}))
    assert env.observation_space["agent_pos"].shape == (9,)
    assert env.observation_space["environment_state"].shape == (state,)
    first = rollout(env, 3, actions)
    other = rollout(env, 4, actions[:17])
    assert np.array_equal(rollout(env, 3, actions), first) and not np.allclose(other[0], first[0])
    assert np.array_equal(rollout(robosuite.make(task), 3, actions), first), "another process's environment"
    assert env.get_wrapper_attr("_max_episode_steps") == robosuite.TASKS[task][1]
    assert env.render().shape == (256, 256, 3) and env.render().std() > 10


@installed
def test_success_ends_an_episode_or_does_not():
    for end_at_success in (True, False):
        env = robosuite.make("Lift", horizon=3, end_at_success=end_at_success)
        env.reset(seed=0)
        height = env.sim.sim.data.get_joint_qpos("cube_joint0").copy()
        assert env.step(np.zeros(7))[1:4] == (0.0, False, False)
        height[2] = 1.0  # it falls from there
        env.sim.sim.data.set_joint_qpos("cube_joint0", height)
        assert env.step(np.zeros(7))[1:] == (1.0, end_at_success, False, {"is_success": True})
        assert env.step(np.zeros(7))[2:4] == (end_at_success, not end_at_success)


def test_what_is_not_installed_is_said_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(UserError, match=r"--env.factory: needs 'robosuite'.*: uv pip install '.*\[robosuite"):
        make_env(GymConfig(factory=FACTORY, kwargs={"task": "Lift"}))
    with pytest.raises(UserError, match=r"--env.kwargs: task must be one of Lift, Can, Square, got 'Stack'"):
        make_env(GymConfig(factory=FACTORY, kwargs={"task": "Stack"}))
