"""Who plays the person beside the arm: puts the cube down, judges, lies, takes over and hands back."""

import json

import numpy as np
import pytest
from lerobot.teleoperators import make_teleoperator_from_config
from lerobot.utils.errors import DeviceNotConnectedError

from trimtab.recipes.embedded_arm import MujocoArm, MujocoArmConfig, ScriptedPerson, ScriptedPusherConfig
from trimtab.recipes.embedded_arm.arm import START
from trimtab.recipes.embedded_arm.pusher import Pusher, joints_at, polar

STEPS = 75


@pytest.fixture
def robot(tmp_path):
    robot = MujocoArm(MujocoArmConfig(id="watched", calibration_dir=tmp_path, clock="step"))
    robot.connect()
    yield robot
    robot.disconnect()


@pytest.fixture
def teleop(tmp_path):
    teleop = make_teleoperator_from_config(ScriptedPusherConfig(arm="watched", calibration_dir=tmp_path))
    teleop.connect()
    return teleop


def played(robot, person, episode, sight, teleop=None):
    """What the person says, by step, in an episode of a pusher that sees the cube ``sight`` degrees off.

    It sees better after a takeover.
    """
    for _ in range(25):
        robot.send_action(START)
    assert person.start(robot, episode)
    pusher, said, human = Pusher(sight, recovers=False), {}, False
    for step in range(1, 2 * STEPS + 1):
        robot.send_action(teleop.get_action() if human else pusher.act(*robot.places()))
        word = person.said(robot, step)
        if word:
            said[step] = word
        human = (human or word == "takeover") and word != "release"
        pusher.sight *= word != "release"
        if word in ("success", "failure"):
            break
    return said


def test_careful_pushes_succeed_in_time_and_careless_ones_fail(robot, tmp_path):
    person = ScriptedPerson(seed=1, log=str(tmp_path / "log.jsonl"))
    for episode in range(8):
        careful, careless = (played(robot, person, episode, sight) for sight in (0.0, 20.0))
        assert [*careful.values()] == ["success"] and max(careful) <= 50
        assert [*careless.values()] == ["failure"] and max(careless) <= 50
    person.close()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["said"] for line in log] == ["success", "failure"] * 8
    assert [line["episode"] for line in log] == [number // 2 for number in range(16)]


def test_the_scene_is_the_episodes_own(robot):
    def place(seed, episode):
        assert ScriptedPerson(seed).start(robot, episode)
        return tuple(robot.places()[1])

    assert place(3, 5) == place(3, 5) and len({place(3, 5), place(3, 6), place(4, 5)}) == 3
    slow = ScriptedPerson(delay_s=0.05)
    asked = [slow.start(robot, 0)]
    while not asked[-1]:
        asked.append(slow.start(robot, 0))
    assert len(asked) > 2 and not slow.start(robot, 1)


def test_it_lies_in_the_share_it_was_told(robot, tmp_path):
    person = ScriptedPerson(seed=2, wrong_labels=0.3, log=str(tmp_path / "log.jsonl"))
    for episode in range(200):
        person.start(robot, episode)
        robot._data.qpos[5:8] = (0.3, 0.0, 0.02) if episode % 2 else (0.0, 0.3, -0.4)
        robot._mujoco.mj_forward(robot._model, robot._data)
        person.said(robot, 1)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(line["success"] for line in log) == 100
    for success in (True, False):
        lies = np.mean([(line["said"] == "success") != success for line in log if line["success"] is success])
        assert 0.2 < lies < 0.4


def test_it_takes_over_a_failing_push_and_gives_it_back(robot, teleop):
    person = ScriptedPerson(takeover_every=3)
    assert [*played(robot, person, 0, 20.0, teleop).values()] == ["failure"]
    said = played(robot, person, 2, 20.0, teleop)
    assert [*said.values()][:2] == ["takeover", "release"] and [*said.values()][-1] == "success"
    assert [*played(robot, person, 2, 0.0, teleop).values()] == ["success"], (
        "it does not meddle with a good one"
    )


def test_it_says_what_it_was_told_to_say(robot):
    person = ScriptedPerson(script={"1": {"4": "drop"}})
    said = [played(robot, person, episode, 20.0) for episode in (0, 1)]
    assert 4 not in said[0] and said[1][4] == "drop" and person.said(robot, -1) is None


def test_the_teleoperator_reaches_the_cube_from_anywhere(robot, teleop):
    rng = np.random.default_rng(0)
    for seed in range(5):
        pose = joints_at(*rng.uniform((-30, 0.10, 0.03), (30, 0.25, 0.08)))
        for _ in range(25):
            robot.send_action(pose)
        robot.place_cube(seed)
        for _ in range(2 * STEPS):
            if robot.succeeded():
                break
            robot.send_action(teleop.get_action())
        assert robot.succeeded(), seed
    assert list(teleop.get_action()) == list(robot.action_features) == list(teleop.action_features)
    teleop.disconnect()
    with pytest.raises(DeviceNotConnectedError, match="'watched' is not connected"):
        teleop.get_action()


def test_the_kinematics_are_the_arms(robot):
    for place in ((20.0, 0.15, 0.06), (-30.0, 0.22, 0.05)):
        for _ in range(40):
            robot.send_action(joints_at(*place))
        assert np.abs(polar(robot.places()[0]) - place).max() < 0.006
