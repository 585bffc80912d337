"""The process beside the robot: it runs chunks on the clock, asks the person, and never runs on alone.

It dials the learner and then does what it is asked, a message at a time:

- ``episode {number}``: wait until the person says ready, say so, go to the start; answer with what is seen;
- ``chunk {actions}``: execute them; answer with what was executed, seen and said;
- ``withdraw {}``: no longer wait for that person;
- ``park {}``: go to the parking pose and end.

Where the learner falls silent the robot holds its last target, then parks.
"""

import contextlib
import importlib
import json
import signal
import sys
import time
from typing import Any

import draccus
import numpy as np
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import OBS_STATE

from trimtab.adapters.errors import UserError, reason
from trimtab.rl.envs.robot.arm import Arm, attempt
from trimtab.rl.envs.robot.config import RobotEnvConfig
from trimtab.rl.envs.robot.episodes import jpeg
from trimtab.rl.envs.robot.leader import Leader, make_leader
from trimtab.rl.envs.robot.people import Person, make_person
from trimtab.rl.envs.robot.wire import Lost, StationLink
from trimtab.rl.runs.faults import leave_terminal, stopping

POLL_S = 0.05  # between two questions to the person, where nothing moves


class Station:
    """One robot and its person, at the command of a learner."""

    def __init__(
        self, config: RobotEnvConfig, arm: Arm, person: Person, leader: Leader | None = None
    ) -> None:
        self.config, self.arm, self.person, self.leader = config, arm, person, leader
        self.period = 0.0 if config.in_lockstep else 1.0 / (config.fps * config.speed)
        self.interrupted = self.human = False
        self.step = 0
        self.free = 0.0  # when the last action's time is up

    def hear_signals(self) -> None:
        """Hold and park where a person, the system or a lost terminal (SSH) ends this process."""

        def interrupt(number: int, frame: Any) -> None:
            leave_terminal(number)
            self.interrupted = True

        for number in stopping():
            signal.signal(number, interrupt)

    def hello(self) -> dict[str, Any]:
        """What the learner must know of the robot."""
        arm = self.arm
        shapes = {name: list(one["shape"]) for name, one in arm.features.items()}
        said = {"period": self.period, "options": self.config.at_station}
        state = arm.features.get(OBS_STATE, {}).get("names")
        return {"names": arm.names, "state_names": state, "shapes": shapes, **said}

    def serve(self, link: StationLink) -> None:
        """Do what the learner asks until it says park.

        Raises:
            Lost: the learner is gone.
        """
        while (message := link.receive())["kind"] != "park":
            if message["kind"] == "episode":
                link.send(self.begin(message, link))
            elif message["kind"] == "chunk":  # else one that was taken back in time
                link.send(self.chunk(message["actions"], link.n_obs_steps))

    def begin(self, message: dict[str, Any], link: StationLink) -> dict[str, Any]:
        """Wait for the person, go to the start, and look."""
        number = int(message["number"])
        by_hand = self.leader if self.config.reset == "teleop" else None
        how = ", space to drive the robot" if by_hand else ""
        getattr(self.person, "forget", lambda: None)()
        print(f"\n{message['say']}: put the scene right{how}; it starts once you say ready")
        self.step = 0
        self._hand_over("release")
        try:
            while not self.person.start(self.arm.robot, number):
                said = self.person.said(self.arm.robot, -1)
                if stop := self._called_off(link, said):
                    return stop
                if by_hand:
                    self._hand_over(said)
                if by_hand and self.human:
                    self.arm.send(by_hand.action(self.arm.target))
                time.sleep(self.period if self.human else POLL_S)
            self._hand_over("release")
            link.send({"ready": True})
            if self.config.reset == "pose":
                start = self.config.start_pose or self.arm.home
                self.arm.go_to(start, lambda: bool(self._called_off(link)))
                if stop := self._called_off(link):
                    return stop
            self.arm.target |= self.arm.position()
            self.free = 0.0
            return {"seen": self.arm.observe()}
        except Lost:
            raise
        except Exception as error:  # whatever a robot's driver, or a script, raises
            return {"outcome": "abort", "why": failed(error), "executed": ()}

    def _called_off(self, link: StationLink, said: str | None = None) -> dict[str, Any]:
        """The answer where the episode that is to begin is no longer wanted; else empty."""
        if self.interrupted or said == "stop":
            return {"stop": "Ctrl-C" if self.interrupted else "the person"}
        return {"stop": ""} if link.withdrawn() else {}

    def chunk(self, actions: np.ndarray, exact: int = 1) -> dict[str, Any]:
        """Execute actions (T, n) until the chunk, the episode or the turn of policy or person is over.

        Of what is seen after each step, the last ``exact`` images are sent as they are, the others as JPEG.
        """
        asked, executed, late, seen, human = [], [], [], [], self.human
        outcome, why = "running", ""
        gap = 0.0
        try:
            if self.step == 0:
                self._approach(actions[0])
            now = time.perf_counter()
            gap = now - self.free if self.free and self.period else 0.0
            if human:
                self.leader.meet(self.arm.target)
            started = max(time.perf_counter(), self.free)
            for number, wanted in enumerate(actions[: self.config.steps - self.step]):
                due = started + number * self.period
                self._wait(due)
                if self.interrupted:
                    outcome, why = "abort", "Ctrl-C"
                    break
                lateness = max(0.0, time.perf_counter() - due) if self.period else 0.0
                sent = self.arm.send(self.leader.action(self.arm.target) if human else wanted)
                self._wait(due + self.period)
                seen.append(self.arm.observe())
                asked.append(wanted)
                executed.append(sent)
                late.append(lateness)
                self.free = due + self.period
                self.step += 1
                outcome, why = self._outcome()
                if outcome != "running" or self.human != human:
                    break
        except Exception as error:  # NaN in an action, or whatever a robot's driver, or a script, raises
            outcome, why = "abort", failed(error)
        return {
            "asked": np.array(asked, np.float32),
            "executed": np.array(executed, np.float32),
            "late": np.array(late),
            "human": human,
            "seen": [*map(compressed, seen[:-exact]), *seen[-exact:]],
            "gap": gap,
            "outcome": outcome,
            "why": why,
            "stop": ("Ctrl-C" if self.interrupted else "the person") if why in ("stop", "Ctrl-C") else "",
        }

    def _approach(self, first: np.ndarray) -> None:
        """Before an episode's first action: go there slowly, where it is far."""
        within = self.arm.within(first).tolist()
        there, here = dict(zip(self.arm.names, within, strict=True)), self.arm.position()
        if np.isfinite(first).all() and any(abs(there[n] - here[n]) > self.config.approach for n in here):
            self.arm.go_to(there, lambda: self.interrupted)

    def _outcome(self) -> tuple[str, str]:
        """Whether the episode is over, and why, after a step."""
        said = self.person.said(self.arm.robot, self.step)
        if self.interrupted:
            return "abort", "Ctrl-C"
        if said in ("drop", "stop"):
            return "abort", said
        if said in ("success", "failure"):
            return said, ""
        self._hand_over(said)
        return ("timeout", "") if self.step >= self.config.steps else ("running", "")

    def _hand_over(self, said: str | None) -> None:
        """Let person or policy act from here on, where one of them is called for."""
        if self.leader is None or said != ("release" if self.human else "takeover"):
            return
        self.human = not self.human
        self.leader.let_go()
        if self.step == 0:  # it may have been moved by hand
            self.arm.target |= self.arm.position()

    def _wait(self, until: float) -> None:
        if self.period and (left := until - time.perf_counter()) > 0:
            time.sleep(left)


def failed(error: Exception) -> str:
    """Say what costs an episode; the robot holds its last target."""
    print(f"\nthe episode is dropped, the robot holds: {reason(error)}", flush=True)
    return reason(error)


def compressed(seen: dict[str, np.ndarray]) -> dict[str, Any]:
    """An observation with its images as JPEG."""
    return {key: jpeg(value) if value.ndim == 3 else value for key, value in seen.items()}


def run_station(config: RobotEnvConfig, address: str, token: str, again: bool) -> None:
    """Serve the learner at ``address`` (HOST:PORT); with ``again``, dial it anew where it is lost.

    Raises:
        UserError: the robot, the person or the learner is not there, or refuses.
    """
    print(f"dialling the learner at {address}", flush=True)
    with StationLink(address, token, config.silence_s, again) as link, contextlib.ExitStack() as ends:
        try:
            arm = Arm(config)
            ends.callback(arm.park)
            person = make_person(config.person, config.person_options)
            ends.callback(attempt, "--robot.person cannot be closed", person.close)
            if (leader := make_leader(config, arm.names) if config.teleop else None) is not None:
                ends.callback(attempt, "--teleop.type cannot be disconnected", leader.teleop.disconnect)
            station = Station(config, arm, person, leader)
        except UserError as error:
            link.refuse(error)
            if again:
                raise
            raise SystemExit(2) from error  # the learner has the same terminal

        with contextlib.suppress(ValueError):  # not the main thread
            station.hear_signals()
        while True:
            try:
                link.send(station.hello())
                return station.serve(link)
            except Lost as lost:
                print(f"\nthe learner is gone ({lost}): the robot holds", flush=True)
                parks = time.monotonic() + config.park_after_s
                while not (back := again and link.dial()) and time.monotonic() < parks:
                    time.sleep(POLL_S)
                if not back:
                    return print("and parks", flush=True)


def main(given: str, address: str, token: str) -> None:
    """A station that a learner on this machine has started, with its config as JSON."""
    content = json.loads(given)
    load_robots(content["packages"])
    config: Any = draccus.decode(EnvConfig, content)
    run_station(config, address, token, again=False)


def load_robots(packages: list[str]) -> None:
    """Register LeRobot's robots, teleoperators and cameras, and those of plugins, as lerobot-rollout does."""
    import lerobot.scripts.lerobot_rollout  # noqa: F401 - imports all of LeRobot's own
    from lerobot.configs.parser import load_plugin
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    for package in packages:
        module = importlib.import_module(package)
        if hasattr(module, "__path__"):  # else there are no modules for LeRobot to look for
            load_plugin(package)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
