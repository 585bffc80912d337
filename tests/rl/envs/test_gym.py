"""Any Gymnasium environment: its observations under LeRobot's names, its success, what is refused."""

import pickle
import sys

import gymnasium as gym
import numpy as np
import pytest
from lerobot.envs.utils import env_to_policy_features

from trimtab.adapters import UserError
from trimtab.rl.envs.examine import describe
from trimtab.rl.envs.gym import GymConfig
from trimtab.rl.envs.hooks import for_policy, make_chunk_env

REACH = "tests.helpers.reach:make"


class Shelf(gym.Env):
    """Observations of every kind, under names of its own."""

    observation_space = gym.spaces.Dict(
        {
            "arm": gym.spaces.Dict({"joints": gym.spaces.Box(-9, 9, (3,), np.float32)}),
            "grip": gym.spaces.Discrete(2),
            "front": gym.spaces.Box(0, 255, (12, 10, 3), np.uint8),
            "wrist": gym.spaces.Box(0, 255, (12, 10, 3), np.uint8),
            "said": gym.spaces.Text(9),
        }
    )
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, info=None, resets_itself=False):
        self.info, self.resets_itself, self.taken = info or {}, resets_itself, []

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return self._observation(), dict(self.info)

    def step(self, action):
        self.taken.append(action)
        self.t += 1
        observation, info, ended = self._observation(), dict(self.info), self.t == 3
        if ended and self.resets_itself:
            info["final_obs"] = observation
            observation, _ = self.reset()
        return observation, float(self.t), ended, False, info

    def render(self):  # two cameras
        return [np.full((6, 5, 3), self.t, np.uint8), np.full((6, 4, 3), 9, np.uint8)]

    def _observation(self):
        frame = np.full((12, 10, 3), self.t, np.uint8)
        joints = np.arange(3, dtype=np.float32) + self.t
        return {"arm": {"joints": joints}, "grip": 1, "front": frame, "wrist": frame + 100, "said": "hm"}


def two_states():
    env = gym.wrappers.TimeLimit(Shelf(), 9)
    box = gym.spaces.Box(-9, 9, (2,))
    env.observation_space = gym.spaces.Dict({"agent_pos": box, "state": box})
    return env


def shelf(**options):
    return gym.wrappers.TimeLimit(Shelf(**options), 9)


def made(features=None, **options):
    options.setdefault("factory", f"{__name__}:shelf")
    config = GymConfig(**options)
    return make_chunk_env(for_policy(config, features) if features is not None else config, 0)


def step(env, value=0.5, steps=3):
    env.reset(0)
    return env.step_chunk(np.full((steps, 2), value, np.float32))


def test_a_box_is_the_state_and_whatever_else_of_its_shape_the_policy_reads():
    config = GymConfig(id="Pendulum-v1")
    for features, names in (
        ({"observation.state": (3,)}, ["agent_pos"]),
        ({"observation.environment_state": (3,)}, ["environment_state"]),
        (
            {"observation.state": (3,), "observation.environment_state": (3,)},
            ["agent_pos", "environment_state"],
        ),
        ({"observation.state": (7,)}, ["agent_pos"]),  # `check_inputs` says that the shape is another
        (None, ["agent_pos", "environment_state"]),  # LeRobot's own commands
    ):
        env = make_chunk_env(for_policy(config, features) if features else config, 0)
        observation = env.reset(0)
        assert sorted(observation) == names
        assert all(entry.shape == (1, 3) for entry in observation.values())
        assert env.limit == 200


def test_entries_go_by_their_names_by_the_only_fitting_shape_and_by_the_map():
    by_name = made({"observation.images.front": (3, 12, 10), "observation.images.wrist": (3, 12, 10)}).reset(
        0
    )
    assert sorted(by_name) == ["arm.joints", "grip", "pixels"]
    assert by_name["pixels"]["wrist"][0, 0, 0, 0] == 100 and by_name["pixels"]["front"].max() == 0
    by_shape = made({"observation.state": (3,), "observation.images.front": (3, 12, 10)}).reset(0)
    assert by_shape["agent_pos"].tolist() == [[0, 1, 2]] and by_shape["grip"].tolist() == [[1]]
    joined = made(
        {"observation.state": (4,), "observation.image": (3, 12, 10)},
        rename_map={
            "grip": "observation.state",
            "arm/joints": "observation.state",
            "wrist": "observation.image",
        },
    )
    observation = joined.reset(0)
    assert observation["agent_pos"].tolist() == [[1, 0, 1, 2]]
    with pytest.raises(UserError, match=r"--env.rename_map: gives observation.image and observation.images"):
        made({}, rename_map={"wrist": "observation.image", "front": "observation.images.front"}).reset(0)


class Goal(gym.Env):
    """As Gymnasium-Robotics' goal environments; its actions are whole numbers, its description its own."""

    box = gym.spaces.Box(-9, 9, (2,), np.float32)
    observation_space = gym.spaces.Dict({"observation": box, "desired_goal": box})
    action_space = gym.spaces.Box(-5, 5, (2,), np.int64)
    task_description = property(lambda self: "reach")

    def reset(self, *, seed=None, options=None):
        self.taken = []
        return self._seen(), {}

    def step(self, action):
        self.taken.append(action)
        return self._seen(), 0.0, False, False, {}

    def _seen(self):
        return {"observation": np.zeros(2, np.float32), "desired_goal": np.ones(2, np.float32)}


class Odd(Goal):
    """Breaks the contract."""

    _max_episode_steps = 9

    def __init__(self, reset, step):
        self.returned = {"reset": reset, "step": step}

    def reset(self, *, seed=None, options=None):
        return eval(self.returned["reset"], {"seen": self._seen()})

    def step(self, action):
        return eval(self.returned["step"], {"seen": self._seen()})


def goal():
    return gym.wrappers.TimeLimit(Goal(), 9)


GOAL = {"factory": f"{__name__}:goal", "rename_map": {"desired_goal": "observation.environment_state"}}


READ = {"observation.state": (2,), "observation.environment_state": (2,)}


@pytest.mark.parametrize("features", [None, READ])
def test_a_goal_that_is_renamed_is_what_lerobots_commands_read(features):
    seen = made(features, **GOAL).reset(0)
    assert seen["agent_pos"].tolist() == [[0, 0]] and seen["environment_state"].tolist() == [[1, 1]]


def several():
    return gym.vector.SyncVectorEnv([goal])


def test_a_factory_of_several_is_told_to_make_one():
    with pytest.raises(UserError, match=r"it returns .*; return one: there are --num_envs of it"):
        made(factory=f"{__name__}:several")


def test_whole_numbers_are_rounded():
    env = made({}, **GOAL)
    step(env, value=0.97, steps=1)
    step(env, value=2.9, steps=1)
    assert env.env.unwrapped.taken[0].tolist() == [3, 3]
    assert env.env.unwrapped.taken[0].dtype == np.int64


@pytest.mark.parametrize(
    ("options", "said"), [({}, "reach"), ({"task": "push"}, "push"), ({"id": "Pendulum-v1"}, "")]
)
@pytest.mark.parametrize("use_async", [False, True])
def test_lerobots_commands_find_an_instruction(options, said, use_async):
    """Asked for one that is not there, an asynchronous vector environment ends."""
    config = GymConfig(**({} if "id" in options else GOAL) | options)
    vec = config.create_envs(2, use_async)["gym"][0]
    assert vec.call("task_description") == (said, said)
    vec.close()
    assert describe(make_chunk_env(config, 0), None).instruction == said


@pytest.mark.parametrize(
    ("returned", "line"),
    [
        ({"reset": "seen, {}", "step": "(seen, 0.0, False, {})"}, "step must return .*; it returns 4 values"),
        ({"reset": "seen, {}", "step": "(seen, 0.0, False, False, None)"}, "step must return a dict as info"),
        ({"reset": "seen", "step": "1"}, r"reset must return \(observation, info\); it returns a dict"),
    ],
)
def test_what_breaks_the_contract_is_named(returned, line):
    with pytest.raises(UserError, match=f"--env.type: {line}"):
        step(made({}, factory=f"{__name__}:Odd", kwargs=returned))


def test_entries_that_are_joined_have_the_space_that_they_give():
    env = made(
        {"observation.state": (4,)},
        rename_map={"grip": "observation.state", "arm/joints": "observation.state"},
    )
    space = env.env.observation_space["agent_pos"]
    assert space.shape == (4,) and env.reset(0)["agent_pos"].dtype == space.dtype


def test_an_entry_is_not_guessed_where_it_could_be_another():
    # Named, so it is the state alone; and one that two features could be is neither.
    taken = made({"observation.arm.joints": (3,), "observation.environment_state": (3,)}).reset(0)
    assert sorted(taken) == ["arm.joints", "grip", "pixels"]
    either = made({"observation.state": (3,), "observation.environment_state": (3,)}).reset(0)
    assert sorted(either) == ["arm.joints", "grip", "pixels"]
    with pytest.raises(
        UserError, match=r"--env.rename_map: say which of agent_pos, state is observation.state"
    ):
        made({"observation.state": (2,)}, factory=f"{__name__}:two_states")


@pytest.mark.parametrize("resets_itself", [False, True])
def test_the_last_observation_is_that_of_the_episode_that_ended(resets_itself):
    env = made({"observation.state": (3,)}, kwargs={"resets_itself": resets_itself})
    result = step(env, steps=5)
    assert result.steps == 3 and result.terminated
    assert result.final_observation["agent_pos"][-1].tolist() == [3, 4, 5]


def test_frames_of_several_cameras_stand_side_by_side():
    env = made()
    env.render = True
    env.reset(0)
    assert env._frames[0].shape == (6, 9, 3) and env._frames[0][0, 8, 0] == 9


def test_actions_are_clipped_to_the_bounds():
    env = made()
    step(env, value=7.0, steps=1)
    assert env.env.unwrapped.taken[0].tolist() == [1, 1] and env.env.unwrapped.taken[0].dtype == np.float32


@pytest.mark.parametrize(
    ("rule", "info", "key", "successes"),
    [
        ("", {}, None, [False, False, False]),
        ("", {"success": True}, "success", [True, True, True]),
        ("none", {"success": True, "final_info": {"is_success": True}}, None, [False, False, False]),
        ("terminated", {}, "is_success", [False, False, True]),
        ("reward>=2", {"success": True}, "is_success", [False, True, True]),
        ("reward >= -1e1", {}, "is_success", [True, True, True]),
        ("info.task.done", {"task": {"done": 1}}, "is_success", [True, True, True]),
        ("info.task.done", {"final_info": {"task": {"done": np.bool_(False)}}}, "is_success", [False] * 3),
        ("info.solved", {"task": {"done": 1}}, None, [False, False, False]),
    ],
)
def test_success_is_what_is_named(rule, info, key, successes):
    env = made(success=rule, kwargs={"info": info})
    env.reset(0)  # what it says then is no other
    result = step(env)
    assert result.success_key == key and result.successes.tolist() == successes


def test_a_time_limit_and_what_it_is_called():
    env = made(episode_length=2, task="tidy the shelf")
    result = step(env)
    assert result.truncated and result.steps == 2
    assert describe(env, None).instruction == "tidy the shelf"
    assert made(factory="", id="Pendulum-v1", episode_length=300).limit == 300  # its own is 200
    assert GymConfig(id="Hopper-v5").task_names() == ["Hopper-v5"]
    assert GymConfig(id="Hopper-v5", task="hop").task_names() == ["hop"]


def test_a_module_of_the_current_folder_and_one_that_registers_itself(tmp_path, monkeypatch):
    (tmp_path / "my_shelves.py").write_text(
        "import gymnasium as gym\nfrom tests.rl.envs.test_gym import Shelf as make\n"
        "gym.register('Shelf-v0', make, max_episode_steps=4)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = pickle.loads(pickle.dumps(GymConfig(id="my_shelves:Shelf-v0")))
    assert make_chunk_env(config, 0).limit == 4
    assert make_chunk_env(GymConfig(factory="my_shelves:make", episode_length=5), 0).limit == 5


def test_lerobots_own_vector_environment():
    config = GymConfig(factory=REACH, success="terminated")
    vec = config.create_envs(2)["gym"][0]
    assert env_to_policy_features(config)["action"].shape == (2,)  # from which LeRobot makes the policy
    observation, _ = vec.reset(seed=[0, 1])
    assert observation["agent_pos"].shape == (2, 4)
    for _ in range(16):
        *_, info = vec.step(np.zeros((2, 2), np.float32))
    assert info["final_info"]["is_success"].tolist() == [False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factory": ""}, r"--env.id: name an --env.id or an --env.factory; this names neither"),
        ({"id": "Hopper-v5", "factory": REACH}, r"--env.id: .* names both"),
        (
            {"id": "Hoper-v5", "factory": ""},
            r"--env.id: .*Hoper.*Did you mean: `Hopper`.*--env.id=PACKAGE:Hoper-v5",
        ),
        (
            {"id": "my_arms:A-v0", "factory": ""},
            r"--env.id: .* needs the package 'my_arms', .*uv pip install my-arms",
        ),
        ({"id": "CartPole-v1", "factory": ""}, r"--env.type: policies make vectors .* takes Discrete\(2\)"),
        ({"id": "Hopper-v5", "factory": "", "kwargs": {"wings": 2}}, r"--env.id: .*cannot be made.*wings"),
        ({"factory": "shelf"}, r"--env.factory: must be MODULE:FUNCTION, got 'shelf'"),
        ({"factory": "no_such:shelf"}, r"--env.factory: .* needs the package 'no_such'"),
        ({"factory": "json:shelf"}, r"--env.factory: .*has no attribute 'shelf'"),
        ({"factory": "math:sqrt"}, r"--env.factory: 'math:sqrt' cannot be made: .*argument"),
        ({"factory": "builtins:dict"}, r"--env.factory: .* must return a gymnasium.Env, it returns a dict"),
        ({"kwargs": {"info": 3, "wings": 2}}, r"--env.factory: .*wings"),
        ({"factory": f"{__name__}:Shelf"}, r"--env.episode_length: .* no time limit"),
        ({"episode_length": 10}, r"--env.episode_length: is 10, the environment ends an episode after 9"),
        ({"episode_length": 0}, r"--env.episode_length: must be at least 1 step"),
        (
            {"success": "often"},
            r"--env.success: must be info.NAME, reward>=NUMBER, terminated or none, got 'often'",
        ),
        ({"success": "reward>=high"}, r"--env.success: must be .* got 'reward>=high'"),
        (
            {"rename_map": {"lid": "observation.state"}},
            r"--env.rename_map: names lid; the environment gives arm/jo",
        ),
    ],
)
def test_what_cannot_be_is_said(options, message):
    with pytest.raises(UserError, match=message):
        made(**options)
