"""Who drives the robot with what: takeovers and resets, by its joints or by its hand."""

import time

import numpy as np
import pytest
from lerobot.teleoperators.gamepad import GamepadTeleopConfig

from tests.helpers.leaderarm import LeaderArmConfig
from tests.helpers.robots import POSE, START, begin, robot_config
from tests.helpers.urdf import write_urdf
from trimtab.adapters import UserError
from trimtab.rl.envs.robot.config import KinematicsOptions
from trimtab.rl.envs.robot.leader import Hand, make_leader


def test_a_person_takes_over_and_gives_back(make):
    station = make({2: "takeover", 5: "release"}, teleop=LeaderArmConfig(pan=5.0))
    begin(station)
    answers = [station.chunk(np.tile(POSE, (5, 1))) for _ in range(3)]
    assert [(len(one["executed"]), one["human"]) for one in answers] == [(2, False), (3, True), (5, False)]
    assert answers[1]["executed"][-1][0] == pytest.approx(5.0)


def test_at_a_takeover_the_robot_catches_up_with_the_leader(make):
    station = make(
        {1: "takeover", 10: "release", 12: "takeover"}, teleop=LeaderArmConfig(pan=60.0), move_s=0.4
    )
    begin(station)
    station.chunk(np.tile(POSE, (1, 1)))
    pans = np.array([step[0] for step in station.chunk(np.tile(POSE, (9, 1)))["executed"]])
    assert np.diff([0.0, *pans])[:6] == pytest.approx(10.0) and pans[5:] == pytest.approx(60.0)
    station.chunk(np.tile(POSE + pans[-1] * np.eye(5)[0], (2, 1)))
    station.leader.teleop.pose["shoulder_pan.pos"] = 57.5  # near: at the same pace
    pans = np.array([step[0] for step in station.chunk(np.tile(POSE, (3, 1)))["executed"]])
    assert pans[0] == pytest.approx(57.5)


def test_a_leader_with_motors_goes_to_where_the_robot_is(make, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # LeRobot takes two seconds for it
    station = make({1: "takeover"}, teleop=LeaderArmConfig(pan=60.0, motors=True))
    begin(station)
    station.chunk(np.tile(POSE, (1, 1)))
    sends, teleop = station.arm.robot.sends, station.leader.teleop
    answer = station.chunk(np.tile(POSE, (2, 1)))
    assert answer["executed"] == pytest.approx(np.tile(POSE, (2, 1)), abs=1e-3)
    assert station.arm.robot.sends == sends + 2 and not teleop.torque and answer["gap"] < 1
    teleop.pose["shoulder_pan.pos"] = 1.0
    assert station.chunk(np.tile(POSE, (1, 1)))["executed"][0][0] == pytest.approx(1.0)


def test_who_resets_by_teleoperation_is_waited_for(make):
    told = {-1: None}
    station = make(told, ready_after=9, reset="teleop", teleop=LeaderArmConfig(pan=30.0), move_s=0.3)
    pans, start = [], station.person.start

    def asked(robot, episode):
        pans.append(robot.get_observation()["shoulder_pan.pos"])
        told[-1] = {3: "takeover", 8: "release"}.get(len(pans))
        return start(robot, episode)

    station.person.start = asked
    assert "seen" in begin(station) and not station.human
    assert np.abs(pans[:3]).max() < 1e-3 and station.arm.robot.sends == 5  # none before, none after
    assert 5 < pans[-1] < 31 and np.diff(pans).max() < 10


def test_what_cannot_drive_the_robot_is_refused():
    with pytest.raises(UserError, match=r"'leader_arm' gives .* robot takes left.pos: name one"):
        make_leader(robot_config(teleop=LeaderArmConfig()), ["left.pos"])
    with pytest.raises(UserError, match=r"robot.reset: teleop: name what you drive the robot with"):
        robot_config(reset="teleop")


class Stick:
    """What pygame gives of a gamepad: four axes and the buttons."""

    def __init__(self):
        self.axes = [0.0] * 4

    def init(self):
        """It is."""

    quit = init

    def get_name(self):
        return "stick"

    def get_axis(self, number):
        return self.axes[number]

    def get_button(self, number):
        return False


@pytest.fixture
def stick(monkeypatch):
    """A gamepad that LeRobot's own class reads."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    import pygame

    one = Stick()
    monkeypatch.setattr(pygame.joystick, "get_count", lambda: 1)
    monkeypatch.setattr(pygame.joystick, "Joystick", lambda number: one)
    yield one
    pygame.quit()


@pytest.fixture
def model(tmp_path):
    return KinematicsOptions(write_urdf(tmp_path / "arm.urdf"))


def hand_at(station):
    """Where the arm's physics have the tip of its gripper."""
    return station.arm.robot.places()[0]


def test_a_gamepad_moves_the_hand_and_nothing_while_it_rests(make, stick, model):
    station = make({1: "takeover"}, teleop=GamepadTeleopConfig(), kinematics=model, approach=1000.0)
    begin(station)
    station.chunk(np.tile(POSE, (5, 1)))
    rest = station.chunk(np.tile(POSE + 9, (3, 1)))
    assert rest["human"] and (rest["executed"] == POSE).all()
    here = hand_at(station)
    stick.axes[1] = -1.0  # away from who holds it: x
    answer = station.chunk(np.tile(POSE, (6, 1)))
    stick.axes[1] = 0.0
    station.chunk(np.tile(POSE, (3, 1)))  # to catch up
    assert hand_at(station) - here == pytest.approx([0.03, 0.0, 0.0], abs=0.004)
    assert 0.5 < np.abs(np.diff(answer["executed"], axis=0)).max() < 10  # it never jumps


def test_a_gamepad_opens_and_closes_the_gripper(make, stick, model):
    import pygame

    station = make({1: "takeover"}, teleop=GamepadTeleopConfig(), kinematics=model, approach=1000.0)
    begin(station)
    station.chunk(np.tile(POSE, (1, 1)))

    def held(button, steps):
        pygame.event.post(pygame.event.Event(pygame.JOYBUTTONDOWN, button=button))
        found = station.chunk(np.tile(POSE, (steps, 1)))["executed"]
        pygame.event.post(pygame.event.Event(pygame.JOYBUTTONUP, button=button))
        assert (found[:, :4] == POSE[:4]).all()
        return found[:, 4]

    assert held(7, 3) == pytest.approx([5.0, 10.0, 15.0])
    assert held(6, 4) == pytest.approx([10.0, 5.0, 0.0, 0.0])


def test_the_hand_moves_as_the_kinematics_say(model):
    names = [*START]
    hand = Hand(robot_config(kinematics=model), names)

    def at(pose):
        return hand.kinematics.forward_kinematics(np.array([pose[name] for name in hand.joints]))[
            :3, 3
        ].copy()

    target = dict(START)
    for deltas in ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [-1.0, 0.0, 0.5]):
        moved = hand.moved(target, np.array(deltas), 0.0)
        assert at(moved) - at(target) == pytest.approx(0.005 * np.array(deltas), abs=2e-4)
        target = moved
    assert hand.moved(START, np.zeros(3), 0.0) == START


def test_a_model_that_does_not_fit_is_refused(model, tmp_path):
    def refused(said, **options):
        with pytest.raises(UserError, match=said):
            make_leader(robot_config(teleop=GamepadTeleopConfig(), **options), [*START])

    refused("kinematics.urdf_path: 'gamepad' moves the hand: name the URDF")
    refused(
        "kinematics.urdf_path: .*none.urdf cannot be read",
        kinematics=KinematicsOptions(f"{tmp_path}/none.urdf"),
    )
    refused(
        "cannot be read: .*hand_link not found", kinematics=KinematicsOptions(model.urdf_path, "hand_link")
    )
    other = write_urdf(tmp_path / "other.urdf", "left_")
    refused("has left_shoulder_pan, .* the robot takes shoulder_pan.pos", kinematics=KinematicsOptions(other))
    refused("teleop.type: 'gamepad' cannot be connected: it is not there", kinematics=model)
