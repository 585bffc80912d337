"""What a station does on its own: nothing unasked, within limits, and nothing once the learner is gone."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from websockets.sync.client import connect

from tests.helpers.leaderarm import LeaderArmConfig
from tests.helpers.robots import (
    POSE,
    START,
    Calls,
    ExactPerson,
    begin,
    free_port,
    robot_config,
    station_thread,
    the_arm,
)
from trimtab.adapters import UserError
from trimtab.adapters.remote.packing import pack, unpack
from trimtab.recipes.embedded_arm.arm import MujocoArm, MujocoArmConfig
from trimtab.rl.envs.robot import vector
from trimtab.rl.envs.robot.config import RobotEnvConfig
from trimtab.rl.envs.robot.episodes import EpisodeRecord
from trimtab.rl.envs.robot.people import EVENTS, make_person
from trimtab.rl.envs.robot.station import Arm
from trimtab.rl.envs.robot.wire import VERSION, LearnerLink, Lost, StationLink
from trimtab.rl.runs.faults import stopping


def test_what_was_pressed_before_the_question_is_no_answer_to_it(make):
    station, asked = make(), []
    station.person.forget = lambda: asked.append("forget")
    start = station.person.start
    station.person.start = lambda *args: (asked.append("start"), start(*args))[1]
    begin(station)
    assert asked == ["forget", "start"]


def test_nothing_moves_before_the_person_is_ready(make):
    station = make(ready_after=3, reset="pose", start_pose=START)
    sends = []
    start = station.person.start
    station.person.start = lambda *args: (sends.append(station.arm.robot.sends), start(*args))[1]
    begin(station)
    assert sends == [0, 0, 0, 0] and station.arm.robot.sends > 0


def test_a_chunk_is_executed_and_told_as_the_robot_says(make):
    station = make(robot=MujocoArmConfig(id="test", clock="step", max_relative_target=2.0), approach=1000.0)
    begin(station)
    asked = np.tile(POSE + 50, (3, 1))
    answer = station.chunk(asked)
    assert answer["outcome"] == "running" and len(answer["seen"]) == 3
    assert (answer["asked"] == asked).all()
    assert (np.abs(answer["executed"] - asked).max(0) > 1).all()  # clipped to 2 degrees a step


@pytest.mark.parametrize("said, outcome", [*zip(EVENTS[:3], ("success", "failure", "abort"), strict=True)])
def test_the_person_ends_an_episode(make, said, outcome):
    station = make({2: said}, approach=1000.0)
    begin(station)
    answer = station.chunk(np.tile(POSE, (5, 1)))
    assert (answer["outcome"], len(answer["executed"])) == (outcome, 2)


def test_the_clock_ends_an_episode(make):
    station = make(approach=1000.0)
    begin(station)
    outcomes = [station.chunk(np.tile(POSE, (6, 1)))["outcome"] for _ in range(3)]
    assert outcomes == ["running", "running", "timeout"] and station.step == 15


def test_limits_hold_and_nan_moves_nothing(make):
    name = next(iter(START))
    station = make(limits={name: (-10.0, 10.0)}, max_step={name: 4.0}, approach=1000.0)
    begin(station)
    far = POSE.copy()
    far[0] = 90.0
    first = [step[0] for step in station.chunk(np.tile(far, (5, 1)))["executed"]]
    assert first == pytest.approx([4.0, 8.0, 10.0, 10.0, 10.0], abs=0.1)
    sends, far[1] = station.arm.robot.sends, np.nan
    answer = station.chunk(np.tile(far, (5, 1)))
    assert answer["outcome"] == "abort" and "NaN" in answer["why"]
    assert station.arm.robot.sends == sends


def moves(arm, name):
    """What a joint is sent from now on, after where it is."""
    found, send = [arm.position()[name]], arm.robot.send_action
    arm.robot.send_action = lambda action: (found.append(action[name]), send(action))[1]
    return found


def test_outside_its_limits_it_comes_in_slowly_and_parks_where_it_was(make):
    """An arm rests outside of where it works: no jump to the limit, and no torque off above the table."""
    name = "shoulder_lift.pos"
    rest = make(id="resting").arm.home[name]
    station = make(limits={name: (rest + 20, rest + 60)}, move_s=1.0)
    begin(station)
    sent, action = moves(station.arm, name), POSE.copy()
    action[list(START).index(name)] = rest + 10  # nearer than --robot.approach, were it not for the limit
    station.chunk(np.tile(action, (3, 1)))
    assert np.abs(np.diff(sent)).max() < 3.0 and sent[-1] == pytest.approx(rest + 20, abs=0.1)
    way = moves(station.arm, name)
    station.arm.park()
    assert np.abs(np.diff(way)).max() < 3.0 and way[-1] == pytest.approx(rest, abs=0.1)
    station.arm.robot.connect()  # for the fixture to disconnect


def test_a_person_drives_it_in_from_outside_its_limits(make):
    name = "shoulder_lift.pos"
    rest = make(id="resting").arm.home[name]
    arm = make(limits={name: (rest + 20, rest + 60)}).arm
    place, found = list(START).index(name), []
    for wanted in (-5, 5, 30, 10, 90):
        action = np.array([arm.home[joint] for joint in arm.names], np.float32)
        action[place] = rest + wanted
        found.append(float(arm.send(action)[place]) - rest)
    assert found == pytest.approx([0, 5, 30, 20, 60], abs=0.1)


def test_a_pose_is_reached_however_small_the_steps(make):
    name = next(iter(START))
    station = make(max_step={name: 0.5}, move_s=0.1)
    there = station.arm.home | {name: station.arm.home[name] + 12.0}
    sent = moves(station.arm, name)
    station.arm.go_to(there)
    assert sent[-1] == pytest.approx(there[name], abs=0.01) and len(sent) >= 25


@pytest.mark.parametrize("option", ["start_pose", "park_pose"])
def test_a_pose_outside_of_the_limits_is_refused(option):
    with pytest.raises(UserError, match=rf"--robot.{option}: a.pos is 9.0, outside of its limits 0.0, 5.0"):
        robot_config(limits={"a.pos": (0.0, 5.0)}, **{option: {"a.pos": 9.0}})


def test_an_episode_begins_slowly(make):
    station = make(move_s=1.0, approach=15.0)
    begin(station)
    before = station.arm.position()
    far = POSE.copy()
    far[0] = 60.0
    steps, send = [], station.arm.robot.send_action
    station.arm.robot.send_action = lambda action: (steps.append(action["shoulder_pan.pos"]), send(action))[1]
    station.chunk(np.tile(far, (2, 1)))
    assert np.abs(np.diff([before["shoulder_pan.pos"], *steps])).max() < 3.0


def test_a_robot_that_fails_ends_the_episode(make):
    station = make(robot=MujocoArmConfig(id="test", clock="step", fail_after=3), approach=1000.0)
    begin(station)
    answer = station.chunk(np.tile(POSE, (5, 1)))
    assert answer["outcome"] == "abort" and "status packet" in answer["why"]
    assert len(answer["executed"]) == 2


def broken(*args):
    raise RuntimeError("a cable")


def test_a_robot_that_fails_on_its_way_costs_the_episode(make, capsys):
    arm = MujocoArmConfig(id="test", clock="step", fail_after=2)
    station = make(robot=arm, reset="pose", start_pose=START)
    answer = begin(station)
    assert answer["outcome"] == "abort" and "status packet" in answer["why"]
    assert capsys.readouterr().out.count("status packet") == 1 and station.arm.robot.sends == 2
    assert "seen" in begin(station)
    station.arm.robot.config.fail_after = station.arm.robot.sends + 1
    far = station.chunk(np.tile(POSE + 50, (5, 1)))  # `approach`
    assert far["outcome"] == "abort" and not len(far["executed"])


@pytest.mark.parametrize("who", ["start", "said", "get_action", "get_observation"])
def test_whoever_raises_costs_the_episode(make, monkeypatch, who):
    station = make({2: "takeover"}, teleop=LeaderArmConfig(), approach=1000.0)
    owner = {"get_action": station.leader.teleop, "get_observation": station.arm.robot}.get(
        who, station.person
    )
    with monkeypatch.context() as patch:
        patch.setattr(owner, who, broken)
        answer = begin(station)
        if "seen" in answer:
            answer = [station.chunk(np.tile(POSE, (5, 1))) for _ in range(2 if who == "get_action" else 1)][
                -1
            ]
        assert (answer["outcome"], answer["why"]) == ("abort", "a cable")
    assert "seen" in begin(station)


def test_at_the_end_everything_is_let_go_of(learner, monkeypatch, capsys):
    monkeypatch.setattr(ExactPerson, "close", broken)
    with station_thread(robot_config(reset="pose", start_pose=START), learner.address, "word") as raised:
        wait(learner)
        arm = the_arm()
        learner.send({"kind": "episode", "number": 0, "say": "episode 1"})
        assert learner.receive(5) == {"ready": True} and "seen" in learner.receive(5)
        arm.config.fail_after = arm.sends + 1
        learner.send({"kind": "park"})
    assert not raised and not arm.is_connected
    said = capsys.readouterr().out
    assert "cannot be parked: Failed to write" in said and "person cannot be closed: a cable" in said


def test_a_learner_that_is_gone_stops_the_way_to_the_start(make):
    station = make(reset="pose", start_pose=START, move_s=1.0)

    class Gone(Calls):
        def withdrawn(self):
            if station.arm.robot.sends >= 5:
                raise Lost("silent")
            return False

    with pytest.raises(Lost):
        station.begin({"number": 0, "say": "episode 1"}, Gone())
    assert station.arm.robot.sends == 5


@pytest.mark.parametrize(
    "options, answer", [({"reset": "pose", "start_pose": START}, "begin"), ({}, "chunk")]
)
def test_ctrl_c_holds_at_once_on_the_way(make, options, answer):
    station = make(move_s=1.0, **options)
    sends = []
    station.arm.robot.send_action = lambda action: sends.append(setattr(station, "interrupted", True))
    found = begin(station)
    if answer == "chunk":
        found = station.chunk(np.tile(POSE + 50, (5, 1)))
        assert found["outcome"] == "abort" and not len(found["executed"])
    assert found["stop"] == "Ctrl-C" and len(sends) == 1


def test_a_robot_that_does_not_see_what_it_is_sent_is_refused():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MujocoArm, "action_features", {"delta_x": float})
        with pytest.raises(UserError, match=r"robot.type: what it observes leaves out delta_x"):
            Arm(robot_config(id="deltas"))
    assert "deltas" not in MujocoArm.connected


def test_dry_run_moves_nothing(make, capsys):
    station = make(dry_run=True, reset="pose", start_pose=START)
    begin(station)
    station.chunk(np.tile(POSE, (5, 1)))
    station.arm.park()
    station.arm.robot.connect()  # for the fixture to disconnect
    assert station.arm.robot.sends == 0
    assert "dry run, not sent" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_holds_the_robot_and_does_not_end_the_station(make, number):
    station, before = make(), {one: signal.getsignal(one) for one in stopping()}
    begin(station)
    try:
        station.hear_signals()
        os.kill(os.getpid(), number)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    answer = station.chunk(np.tile(POSE, (2, 1)))
    assert answer["outcome"] == "abort" and not len(answer["executed"]) and answer["stop"] == "Ctrl-C"


def test_in_real_time_actions_go_by_the_clock(make):
    arm = MujocoArmConfig(id="test", clock="real", speed=5.0)
    station = make(robot=arm, approach=1000.0, episode_time_s=10.0)
    begin(station)
    started = time.perf_counter()
    station.chunk(np.tile(POSE, (10, 1)))
    assert time.perf_counter() - started == pytest.approx(10 / (15 * 5), rel=0.3)
    time.sleep(0.1)
    assert station.chunk(np.tile(POSE, (2, 1)))["gap"] == pytest.approx(0.1, abs=0.05)


@pytest.fixture
def learner():
    link = LearnerLink("127.0.0.1:0", "word", 1.0, 1)
    yield link
    link.close()


def wait(link):
    found = None
    for _ in range(100):
        found = found or link.wait(0.1)
    return found


def test_once_the_learner_is_gone_the_robot_holds_and_parks(learner):
    with station_thread(robot_config(reset="pose", start_pose=START), learner.address, "word") as raised:
        assert wait(learner)["names"] == list(START)
        arm = the_arm()
        learner.send({"kind": "episode", "number": 0, "say": "episode 1"})
        assert learner.receive(5) == {"ready": True} and "seen" in learner.receive(5)
        sends = arm.sends
        learner._connection.socket.close()
        time.sleep(0.1)
        assert arm.sends == sends
    assert not raised and not arm.is_connected and arm.sends > sends


def test_a_learner_that_is_to_end_takes_its_question_back(learner):
    config = robot_config(person_options={"delay_s": 100.0})
    with station_thread(config, learner.address, "word") as raised:
        wait(learner)
        learner.send({"kind": "episode", "number": 0, "say": "episode 1"})
        learner.send({"kind": "withdraw"})
        assert learner.receive(5) == {"stop": ""}
        learner.send({"kind": "episode", "number": 0, "say": "episode 1"})
        learner.send({"kind": "park"})
    assert not raised


def test_a_robot_that_hangs_costs_an_episode(monkeypatch, tmp_path):
    monkeypatch.setattr(vector, "ANSWER_S", 0.1)
    config = robot_config(listen=f"127.0.0.1:{free_port()}", token="word")
    found, said = {}, []

    def learn():
        with vector.RobotVectorEnv(config, 1) as vec:
            vec.on_success_key = said.append
            vec.keep(tmp_path)
            found["seen"] = vec.reset({0: 1})  # on the second try
            vec.send({0: np.tile(POSE, (2, 1))}, {0: 2})
            found["result"] = vec.receive()[0]

    thread = threading.Thread(target=learn)
    thread.start()
    seen = {"observation.state": np.zeros(7, np.float32)}
    shapes = {"observation.state": [7]}
    hello = {"names": list(START), "state_names": None, "shapes": shapes, "period": 0.0}
    hello["options"] = config.at_station
    with StationLink(config.listen, "word", 5.0, wait=True) as link:
        link.send(hello)
        assert link.receive()["kind"] == "episode"
        link.send({"ready": True})  # and hangs on the way to the start
        with pytest.raises(Lost):
            link.receive()
        while not link.dial():  # as a station does: it may be back before the learner has parted with it
            time.sleep(0.02)
        link.send(hello)
        assert link.receive()["kind"] == "episode"
        link.send({"ready": True})
        link.send({"seen": seen})
        assert link.receive()["kind"] == "chunk"  # and never answers
        thread.join(10)
    assert "hung" in found["result"].lost[1]
    assert EpisodeRecord.read(tmp_path / "000000").outcome == "abort"


def test_a_station_that_is_back_is_asked_anew(tmp_path):
    """It was lost after the question for the next episode, and the learner was the first to notice."""
    config = robot_config(listen=f"127.0.0.1:{free_port()}", token="word", lockstep=False)
    with (
        station_thread(config, config.listen, "word", again=True) as raised,
        vector.RobotVectorEnv(config, 1) as vec,
    ):
        vec.announce()
        vec.link._connection.close()
        while vec.link.connected:
            vec._answer = None  # the station may have been quicker
            vec.calls(0.01)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(vec.reset({0: 1})), daemon=True)
        thread.start()
        thread.join(10)
        assert seen and seen[0]
    assert not raised


@pytest.mark.parametrize(
    "here, there, option",
    [
        ({"limits": {"gripper.pos": (0.0, 1.0)}}, {}, "--robot.limits"),
        ({"teleop": LeaderArmConfig()}, {}, "--teleop.type"),
        ({}, {"dry_run": True}, "--robot.dry_run"),
    ],
)
def test_what_the_station_does_not_act_by_is_refused(here, there, option):
    where = f"127.0.0.1:{free_port()}"
    learner = RobotEnvConfig(listen=where, token="word", **here)
    with (
        station_thread(robot_config(**there), where, "word", again=True),
        pytest.raises(UserError) as refused,
    ):
        vector.RobotVectorEnv(learner, 1)
    assert refused.value.option == option


def test_numbers_of_episodes_that_were_learnt_from_are_not_given_again(tmp_path):
    where = f"127.0.0.1:{free_port()}"
    with (
        station_thread(robot_config(limits={"gripper.pos": (0.0, 9.0)}), where, "word", again=True),
        vector.RobotVectorEnv(RobotEnvConfig(listen=where, token="word"), 1) as vec,
    ):
        vec.keep(tmp_path, 3)  # somebody has deleted them
        assert vec.episodes == 3


def test_who_is_not_let_in_learns_why(learner):
    for token, why in (("wrong", "the token is wrong"), ("word", "")):
        with connect(f"ws://{learner.address}") as one:
            one.send(pack({"version": VERSION, "token": token}))
            assert why in unpack(one.recv(5)).get("refused", "")
    with connect(f"ws://{learner.address}") as one:
        one.send(pack({"version": VERSION + 1, "token": "word"}))
        assert f"version {VERSION}, the station {VERSION + 1}" in unpack(one.recv(5))["refused"]
    with station_thread(robot_config(), learner.address, "wrong") as raised:
        pass
    assert isinstance(raised[0], UserError) and "token" in str(raised[0])


def test_a_station_that_dials_before_the_learner_misses_it_is_let_in_later(learner):
    with StationLink(learner.address, "word", 1.0) as link:
        link.send({"names": []})
        assert wait(learner) == {"names": []}
        lost = link._connection
        assert not link.dial()
        lost.close()
        until = time.monotonic() + 5
        while not (back := link.dial()) and time.monotonic() < until:
            time.sleep(0.1)
        assert back


def test_a_message_cut_short_ends_the_connection(learner):
    with connect(f"ws://{learner.address}") as one:
        one.send(pack({"version": VERSION, "token": "word"}))
        one.recv(5)
        one.send(pack({"names": []}))
        assert wait(learner) == {"names": []}
        one.send(pack({"executed": np.zeros(9)})[:-3])
        with pytest.raises(Lost, match="cannot be read"):
            learner.receive(5)
        assert not learner.connected


def test_without_a_learner_or_a_robot_there_is_one_line(learner):
    with station_thread(robot_config(), f"127.0.0.1:{free_port()}", "word") as raised:
        pass
    assert "no learner answers" in str(raised[0])
    broken, why = robot_config(person="nowhere:Nobody"), r"nowhere:Nobody' cannot be made"
    with station_thread(broken, learner.address, "word") as raised, pytest.raises(UserError, match=why):
        wait(learner)
    assert isinstance(raised[0], SystemExit)  # the learner says it
    with pytest.raises(UserError, match="no keys can be read here"):
        make_person("keyboard", {})
    with pytest.raises(UserError, match=r"limits: elbow is none of the robot's: shoulder_pan\.pos"):
        Arm(robot_config(id="odd", limits={"elbow": (0.0, 1.0)}))
    assert "odd" not in MujocoArm.connected
