"""What environments hand over is taken right, or refused in a line; two resets tell whether one repeats."""

import gymnasium as gym
import numpy as np
import pytest

from tests.helpers.lane import LaneConfig, LaneEnv
from trimtab.adapters import UserError
from trimtab.rl.envs.chunk import ChunkEnv, NotFinite
from trimtab.rl.envs.contract import read_success
from trimtab.rl.envs.examine import describe, examine
from trimtab.rl.envs.hooks import make_single_env
from trimtab.rl.envs.vector import ChunkVectorEnv

RIGHT = np.array([[1, 0]] * 4, np.float32)
IMAGE = np.zeros((8, 8, 3), np.uint8)


class Strange(gym.Env):
    """Hands over what ``returns`` says, by name; else what a good one does."""

    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, **returns):
        self.returns = returns

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        good = {"agent_pos": self.np_random.uniform(size=2)}, {}
        return self.returns.get("reset", good)

    def step(self, action):
        named = {
            "observation": {"agent_pos": np.zeros(2)},
            "reward": 0.0,
            "terminated": False,
            "truncated": False,
            "info": {},
        }
        return self.returns.get("step", tuple((named | self.returns)[name] for name in named))


def chunk(seed=3, limit=None, **returns):
    env = ChunkEnv(Strange(**returns), limit=limit)
    first = env.reset(seed)
    return first, env.step_chunk(RIGHT)


@pytest.mark.parametrize("value", [1, 1.0, True, np.True_, np.array([1.0]), np.array([[1]], np.int64)])
def test_numbers_and_truths_of_every_make(value):
    _, result = chunk(reward=value, terminated=value, info={"is_success": value})
    assert result.rewards.tolist() == [1.0] and result.rewards.dtype == np.float64
    assert result.successes.tolist() == [True] and result.terminated is True and result.truncated is False


@pytest.mark.parametrize(
    "info, expected",
    [
        ({}, (None, False)),
        ({"is_success": None}, (None, False)),
        ({"is_success": False, "success": True}, ("is_success", False)),
        ({"success": 1.0}, ("success", True)),
        ({"succeed": np.True_}, ("succeed", True)),
        ({"final_info": None}, (None, False)),
        ({"final_info": {"is_success": True}}, ("is_success", True)),
        ({"final_info": {"succeed": 0}}, ("succeed", False)),
    ],
)
def test_where_success_is_read(info, expected):
    assert read_success(info) == expected
    _, result = chunk(info=info)
    assert (result.success_key, bool(result.successes.all())) == expected


OBSERVATION = "observations must be a dict with agent_pos, environment_state or pixels; the environment gives"
REFUSED = {
    "a vector": ({"reset": (np.zeros(3), {})}, f"{OBSERVATION} a Box of shape (3,): wrap it"),
    "a list": ({"reset": ([1.0], {})}, f"{OBSERVATION} [1.0]: wrap it"),
    "nothing in it": ({"reset": ({"task": "push"}, {})}, f"{OBSERVATION} a dict with 'task'"),
    "a vector after a step": ({"observation": np.zeros(3)}, OBSERVATION),
    "the old reset": ({"reset": {"agent_pos": np.zeros(2), "x": 1}}, "it returns a dict"),
    "the old step": ({"step": ({"agent_pos": np.zeros(2)}, 0.0, False, {})}, "it returns 4 values"),
    "swapped": ({"reset": ({"seed": 3}, {"agent_pos": np.zeros(2)})}, "it returns (info, observation)"),
    "no info": ({"info": None}, "step must return a dict as info, the environment gives None"),
    "no numbers": ({"reset": ({"agent_pos": [1.0, None]}, {})}, "'agent_pos' must be numbers"),
    "two rewards": ({"reward": np.zeros(2)}, "the reward must be one number, the environment gives a Box"),
    "a text for a reward": ({"reward": "1"}, "the reward must be one number, the environment gives '1'"),
    "half terminated": ({"terminated": 0.5}, "terminated must be true or false, the environment gives 0.5"),
    "a text for truncated": ({"truncated": "no"}, "truncated must be true or false"),
    "a text for success": ({"info": {"success": "yes"}}, "info['success'] must be true or false"),
    "a share of success": ({"info": {"is_success": 0.7}}, "info['is_success'] must be true or false"),
    "success by task": (
        {"info": {"success": {"lift": True, "task": False}}},
        "it is a dict with lift, task; --env.type=gym --env.success=info.success.NAME takes one of them",
    ),
    "success of many": ({"info": {"succeed": np.zeros(2, bool)}}, "info['succeed'] must be true or false"),
    "another shape": ({"observation": {"agent_pos": np.zeros(3)}}, "(2,) becomes (3,)"),
    "another entry": ({"observation": {"agent_pos": np.zeros(2), "x": IMAGE}}, "'x' appears"),
    "an entry less": ({"observation": {"environment_state": np.zeros(2)}}, "'agent_pos' disappears"),
    "channels first": ({"reset": ({"pixels": IMAGE.T}, {})}, "it is uint8 of (3, 8, 8)"),
    "a float image": (
        {"reset": ({"pixels": {"top": IMAGE / 255.0}}, {})},
        "the image 'pixels/top' must be uint8 of (height, width, channels), it is float64 of (8, 8, 3)",
    ),
    "an image that turns": (
        {"reset": ({"pixels": IMAGE}, {}), "observation": {"pixels": IMAGE.astype(np.float32)}},
        "it is float32 of (8, 8, 3)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_a_line(name):
    returns, message = REFUSED[name]
    with pytest.raises(UserError) as caught:
        chunk(**returns)
    assert caught.value.option == "--env.type" and message in caught.value.message


def test_nan_is_still_a_fault_of_its_own():
    for returns in ({"reward": np.array([np.nan])}, {"observation": {"agent_pos": np.array([0, np.inf])}}):
        with pytest.raises(NotFinite):
            chunk(**returns)


def test_lists_single_numbers_and_texts_in_an_observation():
    seen = {"agent_pos": [1, 2.5], "environment_state": 3.0, "task": "push", "robot_state": {"grip": (1, 0)}}
    first, result = chunk(reset=(seen, {}), observation=seen)
    for history in (first, result.observation):
        assert history["agent_pos"].tolist() == [[1, 2.5]] and history["environment_state"].shape == (1, 1)
        assert history["robot_state"]["grip"].tolist() == [[1, 0]] and "task" not in history


def test_actions_for_another_kind_of_environment():
    env = ChunkEnv(Strange())
    env.env.action_space = gym.spaces.Discrete(4)
    env.reset(0)
    with pytest.raises(UserError, match=r"of shape \(2,\), the environment takes Discrete\(4\); choose"):
        env.step_chunk(RIGHT)


def test_observations_frames_and_actions_are_kept_as_they_were():
    """The environment goes on in its own arrays: observation, frame and the action that it was given."""

    class Reuses(LaneEnv):
        frame = np.zeros((4, 4, 3), np.uint8)

        def step(self, action):
            action *= 0.5
            return super().step(action)

        def render(self):
            self.frame[:] = int(20 * (self.state[0] + 1))
            return self.frame

    env = ChunkEnv(Reuses("in_place"), n_obs_steps=2, keep_seen=True)
    env.frame_every = 1
    env.render = True
    start = env.reset(3)["agent_pos"][-1, 0]
    actions = RIGHT.copy()
    result = env.step_chunk(actions)
    assert np.allclose(result.observation["agent_pos"][:, 0], start + np.array([1.5, 2.0]))
    assert np.allclose([seen["agent_pos"][0] for seen in result.seen], start + np.array([0, 0.5, 1.0, 1.5]))
    assert len({int(frame[0, 0, 0]) for frame in result.frames}) == 5
    assert np.array_equal(actions, RIGHT)
    last = env.step_chunk(np.array([[20, 0]] * 20, np.float32))
    assert env.reset(4)["agent_pos"][-1, 0] < 6 <= last.final_observation["agent_pos"][-1, 0]


def test_the_last_observation_of_one_that_resets_itself():
    class Resets(LaneEnv):
        def step(self, action):
            observation, reward, ended, truncated, info = super().step(action)
            if ended:
                info["final_obs"] = {key: value.copy() for key, value in observation.items()}
                observation, _ = self.reset(seed=9)
            return observation, reward, ended, truncated, info

    for env in (Resets(), gym.wrappers.Autoreset(LaneEnv())):
        env = ChunkEnv(env, n_obs_steps=2)
        env.reset(3)
        result = env.step_chunk(np.array([[1, 0]] * 12, np.float32))
        assert result.terminated and result.final_observation["agent_pos"][-1, 0] >= 6
        assert result.steps < 12 and abs(env.reset(4)["agent_pos"][-1, 0]) < 1
        assert env.step_chunk(RIGHT).steps == 4


def test_a_time_limit_from_the_spec_or_the_config():
    class Lasting(Strange):
        spec = gym.envs.registration.EnvSpec("Lasting-v0", max_episode_steps=3)

    for env in (ChunkEnv(Lasting(), limit=9), ChunkEnv(Strange(), limit=3)):
        assert env.limit == 3 and not describe(env, None).warnings
        env.reset(0)
        result = env.step_chunk(RIGHT)
        assert (result.steps, result.truncated, result.terminated) == (3, True, False)
    for won, terminated in ((True, True), (True, False), (False, True)):
        _, result = chunk(limit=1, terminated=terminated, info={"is_success": won})
        assert result.terminated is (won and terminated) and result.truncated is not result.terminated
    (warning,) = describe(ChunkEnv(Strange()), None).warnings
    assert "names no time limit" in warning


def test_a_frame_rate_that_contradicts():
    config = LaneConfig(fps=30)
    with ChunkVectorEnv(config, 1, 0) as vec:
        assert vec.descriptions[0].warnings == [
            "--env.fps is 30, its render_fps is 10; what is recorded here says 30"
        ]


def examined(env, actions=RIGHT):
    env = ChunkEnv(env, limit=40)
    env.reset(3)
    return examine(env, actions)


@pytest.mark.parametrize(
    "manner, repeatable, warning",
    [
        ("plain", True, None),
        ("succeed", True, None),
        ("in_place", True, None),
        ("forgets_seed", False, "two resets with seed 3 differ in 'agent_pos'"),
        ("one_start", True, "starts the same with the seeds 3 and 4"),
    ],
)
def test_whether_it_repeats(manner, repeatable, warning):
    found = examined(LaneEnv(manner))
    assert found.repeatable is repeatable
    assert [warning in line for line in found.warnings] == ([True] if warning else [])
    assert found.success_key == ("succeed" if manner == "succeed" else "is_success")


def test_what_is_left_over_from_the_episode_before_is_found():
    class Leaves(Strange):
        steps = 0

        def step(self, action):
            self.steps += 1
            return super().step(action)

        def reset(self, *, seed=None, options=None):
            observation, info = super().reset(seed=seed)
            return {"agent_pos": observation["agent_pos"], "pixels": {"top": IMAGE + self.steps}}, info

    found = examined(Leaves(observation={"agent_pos": np.zeros(2), "pixels": {"top": IMAGE}}))
    assert not found.repeatable and "differ in 'pixels/top'" in found.warnings[0]


def test_dtypes_and_bounds_that_do_not_fit_are_said():
    found = examined(Strange(observation={"agent_pos": np.zeros(2, np.float32)}), 100 * RIGHT + 50)
    assert found.repeatable
    assert "'agent_pos' is float64 after a reset and float32 after a step" in found.warnings[0]
    assert "most of the policy's first actions (50 to 150) are out of" in found.warnings[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_it_says_of_itself_reaches_the_run(workers):
    class Wrapped(gym.Wrapper):
        metadata = {"render_fps": 10}  # noqa: RUF012 - Gymnasium's own form

    inner, _ = make_single_env(LaneConfig(manner="arm"))
    assert not describe(ChunkEnv(Wrapped(inner)), None).repeatable
    with ChunkVectorEnv(LaneConfig(manner="arm"), 2, workers) as vec:
        assert not vec.repeatable
        assert vec.descriptions[1].blank["agent_pos"].tolist() == [[0, 0]]
    keys = []
    with ChunkVectorEnv(LaneConfig(manner="success"), 2, workers) as vec:
        assert vec.repeatable and vec.descriptions[0].blank is None
        vec.on_success_key = keys.append
        vec.reset({0: 1, 1: 2})
        for _ in range(2):
            vec.send({0: RIGHT[:1], 1: RIGHT[:1]}, {0: None, 1: None})
            assert {result.success_key for result in vec.receive().values()} == {"success"}
    assert keys == ["success"]


def test_nothing_is_stepped_whose_reset_has_not_returned():
    class Sticks(LaneEnv):
        stuck = False

        def reset(self, **named):
            if self.stuck:
                raise OSError("the gripper does not answer")
            return super().reset(**named)

    env = ChunkEnv(Sticks())
    env.reset(0)
    env.env.stuck = True
    with pytest.raises(OSError):
        env.reset(1)
    with pytest.raises(RuntimeError, match="reset it first"):
        env.step_chunk(RIGHT)


def test_environments_that_create_envs_does_not_hold_here():
    class Elsewhere(LaneConfig):
        def create_envs(self, n_envs, use_async_envs=False):
            return {"mine": {0: gym.vector.VectorEnv()}}

    class Lacking(LaneConfig):
        @property
        def gym_id(self):
            return "absent/Lane-v0"

        @property
        def package_name(self):
            return "tests.helpers.absent"

    Elsewhere.get_choice_name = Lacking.get_choice_name = classmethod(lambda cls, kind: "mine")
    with pytest.raises(UserError, match=r"'mine' must give a .*SyncVectorEnv, it gives a VectorEnv"):
        make_single_env(Elsewhere())
    with pytest.raises(UserError, match=r"No module named 'tests\.helpers\.absent': Package .* not found"):
        make_single_env(Lacking())
