"""The arm without hardware, as LeRobot finds it: its clocks, its limits and its faults."""

import ast
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lerobot.robots import RobotConfig, make_robot_from_config
from lerobot.utils.errors import DeviceAlreadyConnectedError, DeviceNotConnectedError

import lerobot_policy_trimtab  # noqa: F401 - what LeRobot's commands import
from trimtab.recipes.embedded_arm import MujocoArmConfig
from trimtab.recipes.embedded_arm import arm as arm_module
from trimtab.recipes.embedded_arm.arm import PARKED, START


@pytest.fixture
def arm(tmp_path):
    """Makes connected arms, and disconnects them."""
    made = []

    def make(**options):
        config = MujocoArmConfig(id=f"arm {len(made)}", calibration_dir=tmp_path, **options)
        made.append(make_robot_from_config(config))
        made[-1].connect()
        return made[-1]

    yield make
    for robot in made:
        if robot.is_connected:
            robot.disconnect()


def shaken(robot, seed):
    """Observations under actions drawn by ``seed``, as an array, the cube in the way."""
    robot.place_cube(seed)
    rng, seen = np.random.default_rng(seed), []
    for _ in range(20):
        robot.send_action({name: at + rng.normal(0, 20) for name, at in START.items()})
        seen.append([*robot.get_observation().values()])
    return np.array(seen)


def test_stepping_repeats_to_the_bit(arm):
    one, other, third = (arm(clock="step") for _ in range(3))
    seen = shaken(one, 5)
    assert np.array_equal(seen, shaken(other, 5)) and not np.array_equal(seen, shaken(third, 6))
    assert np.ptp(seen, 0).min() > 0 and list(one.observation_features) == list(one.get_observation())
    before = one.get_observation()
    time.sleep(0.02)
    assert one.get_observation() == before and one.sends == 20


def test_it_goes_where_it_is_sent_and_no_further_than_its_joints(arm):
    robot = arm(clock="step")
    assert robot.get_observation() == pytest.approx(robot.get_observation() | PARKED)
    for _ in range(30):
        robot.send_action(START)
    reached = robot.get_observation()
    assert max(abs(reached[name] - at) for name, at in START.items()) < 1.5
    robot.send_action({"shoulder_pan.pos": 30.0})
    sent = robot.send_action({"gripper.pos": 140, "elbow_flex.pos": -20.0})
    assert sent == {"gripper.pos": 100.0, "elbow_flex.pos": 0.0}
    for _ in range(20):
        robot.send_action({})
    assert abs(robot.get_observation()["shoulder_pan.pos"] - 30) < 1.5, "the other joints keep their targets"


def test_the_largest_step_is_counted_from_where_the_arm_is(arm):
    robot = arm(clock="step", max_relative_target=5.0)
    for _ in range(10):
        there = robot.get_observation()["shoulder_pan.pos"]
        sent = robot.send_action(PARKED | {"shoulder_pan.pos": 80.0})
        assert sent == PARKED | {"shoulder_pan.pos": there + 5.0}
    assert there > 15


def test_success_is_the_cube_beyond_the_line(arm):
    robot = arm(clock="step")
    robot.place_cube(0)
    assert not robot.succeeded()
    for radius, height, done in ((0.26, 0.02, False), (0.28, 0.02, True), (0.5, -0.48, False)):
        robot._data.qpos[5:8] = 0.6 * radius, 0.8 * radius, height
        robot._mujoco.mj_forward(robot._model, robot._data)
        assert robot.succeeded() is done
    where = [tuple(robot.places()[1]) for seed in range(50) if robot.place_cube(seed) is None]
    assert len(set(where)) == 50 and all(0.159 < np.hypot(x, y) < 0.191 for x, y, _ in where)


def test_real_physics_follow_the_wall_clock(arm):
    robot = arm(clock="real", speed=5.0)
    robot.send_action(START | {"shoulder_pan.pos": 60.0})
    started, begun = robot._data.time, time.perf_counter()
    time.sleep(0.5)  # two and a half seconds of the arm's
    passed = robot._data.time - started
    assert 1.0 < passed < 5 * (time.perf_counter() - begun) + 0.5
    assert robot.get_observation()["shoulder_pan.pos"] > 58, "it moves while nobody sends anything"
    robot.disconnect()
    at = robot._data.time
    time.sleep(0.05)
    assert robot._data.time == at
    robot.connect()
    assert robot.get_observation()["shoulder_pan.pos"] > 58, "reconnecting finds it where it was"


def test_the_clock_loses_no_time(arm, monkeypatch):
    robot, now = arm(clock="step", speed=5.0), iter(np.arange(0.0, 1.0, 0.00271))
    monkeypatch.setattr(robot, "_over", SimpleNamespace(wait=lambda seconds: False))
    monkeypatch.setattr(arm_module, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    with pytest.raises(StopIteration):
        robot._follow_the_clock()
    assert abs(robot._data.time - 5 * 0.99999) <= 1 / 600


def test_faults_to_order(arm, monkeypatch):
    robot = arm(clock="step", fail_after=2)
    robot.send_action(START)
    with pytest.raises(ConnectionError, match="There is no status packet!"):
        robot.send_action(START)
    robot.send_action(START)
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    robot = arm(clock="step", hang_after=1)
    robot.send_action(START)
    assert slept == [3600]
    with pytest.raises(ValueError, match="not a number"):
        robot.send_action(START | {"gripper.pos": float("nan")})
    with pytest.raises(KeyError, match="elbow_roll"):
        robot.send_action({"elbow_roll.pos": 1.0})


def test_connecting(arm):
    robot = arm(clock="step")
    with pytest.raises(DeviceAlreadyConnectedError):
        robot.connect()
    robot.disconnect()
    for call in (robot.disconnect, robot.get_observation, lambda: robot.send_action(START)):
        with pytest.raises(DeviceNotConnectedError):
            call()
    with pytest.raises(ValueError, match="real or step, not 'slow'"):
        MujocoArmConfig(clock="slow")
    with pytest.raises(ValueError, match="must be positive"):
        MujocoArmConfig(speed=0)


def test_the_camera_sees_the_cube(arm):
    robot = arm(clock="step", camera=True, pixels=64)
    red = []
    for seed in (0, 1):
        robot.place_cube(seed)
        picture = robot.get_observation()["front"]
        assert picture.shape == robot.observation_features["front"] and picture.dtype == np.uint8
        rows, columns = np.nonzero((picture[..., 0] > 100) & (picture[..., 1] < 50))
        red.append((rows.mean(), columns.mean(), robot.get_observation()["cube_y.pos"]))
    assert (red[0][1] < red[1][1]) == (red[0][2] < red[1][2])


def test_the_plugin_knows_it_and_imports_no_simulator():
    assert RobotConfig.get_choice_class("mujoco_arm") is MujocoArmConfig
    tree = ast.parse(Path(arm_module.__file__).read_text(encoding="utf-8"))
    first = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert first and not any("mujoco" in line for line in first)
