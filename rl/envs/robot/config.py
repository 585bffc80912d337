"""``--env.type=robot``: a LeRobot ``Robot``, run by a station; the commands also take ``--robot.NAME=``."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lerobot.envs.configs import EnvConfig
from lerobot.robots.config import RobotConfig
from lerobot.teleoperators.config import TeleoperatorConfig

from trimtab.adapters.errors import UserError, at_least
from trimtab.rl.envs.one_task import OneTaskConfig

SHARED = "fps", "dry_run"  # that learner and station must both be told
AT_STATION = (  # that the station acts by; a learner elsewhere may name the same
    *("episode_time_s", "reset", "start_pose", "park_pose", "move_s", "limits", "max_step", "approach"),
    *("park_after_s", "person"),
)
RESETS = ("person", "pose", "teleop")
KEYBOARD = "keyboard"


@dataclass
class RewardModelOptions:
    """``--robot.reward_model.*``."""

    # Folder of a LeRobot reward_classifier, asked at the end of each chunk that nobody has judged.
    path: str = ""
    # Probability above which an episode ends as a success.
    threshold: float = 0.8

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise UserError("--robot.reward_model.threshold", f"is between 0 and 1, got {self.threshold}")


@dataclass
class KinematicsOptions:
    """``--robot.kinematics.*``: a gamepad or keyboard moves the hand, and this tells the joints of it."""

    # URDF of the arm, with the robot's names of its joints; what of it is the hand.
    urdf_path: str = ""
    target_frame_name: str = "gripper_frame_link"
    # Metres of an action at full deflection.
    step_m: float = 0.005
    # What an action adds to gripper.pos to open it (0 to 100); negative where that closes it.
    gripper_step: float = 5.0


@EnvConfig.register_subclass("robot")
@dataclass
class RobotEnvConfig(OneTaskConfig):
    """A robot, beside which a station runs: on this machine, or on another that dials this one."""

    # The robot as lerobot-rollout takes it; None where a station on another machine brings it.
    robot: RobotConfig | None = None
    # What a person takes the robot over with, likewise.
    teleop: TeleoperatorConfig | None = None
    # The instruction of a policy that reads one.
    task: str | None = None
    # Actions a second.
    fps: int = 15
    # An episode that nobody ends is over after so many seconds.
    episode_time_s: float = 20.0
    # What brings the robot to where an episode starts: the person; pose: it moves to start_pose once the
    # person says that it may; teleop: the person drives it there with --teleop.type, from space to Enter.
    reset: str = "person"
    # Action by its features' names. Default: where the robot is when it is connected.
    start_pose: dict[str, float] = field(default_factory=dict)
    # Where it goes before its torque goes off. Default: where it was when it was connected.
    park_pose: dict[str, float] = field(default_factory=dict)
    # Seconds that such a motion takes, and at most until the robot has caught up with who takes it over.
    move_s: float = 3.0
    # By feature of the action: what neither policy nor person leaves, and the largest step from one action to
    # the next.
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    max_step: dict[str, float] = field(default_factory=dict)
    # An episode whose first action is farther than that from where the robot is, in the units of any joint,
    # begins with a slow motion to it.
    approach: float = 15.0
    # Seconds between two chunks from which on an episode is marked as held up.
    max_gap_s: float = 1.0
    # Seconds without a sign of the learner until the robot holds, and then until it parks.
    silence_s: float = 5.0
    park_after_s: float = 20.0
    # Who says ready, success and failure: keyboard, or MODULE:CLASS, a script that plays a person.
    person: str = KEYBOARD
    person_options: dict[str, Any] = field(default_factory=dict)
    # For a teleoperator of the hand.
    kinematics: KinematicsOptions = field(default_factory=KinematicsOptions)
    # A model that says success beside them.
    reward_model: RewardModelOptions = field(default_factory=RewardModelOptions)
    # HOST:PORT on which the learner waits for a station on another machine. Default: it starts one here.
    listen: str = ""
    # The word that both ends must know; default: the learner makes one up and prints it.
    token: str = ""
    # Print what would be sent, and move nothing.
    dry_run: bool = False
    # The robot moves only when it is sent an action (a simulator): nobody waits for a clock. Default: whether
    # its config says clock=step.
    lockstep: bool | None = None
    # Packages that the station loads for its robot, teleoperator and cameras.
    packages: list[str] = field(default_factory=list)

    attended: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.robot is None and not self.listen:
            mend = "name the robot, or wait for a station that has one with --robot.listen=HOST:PORT"
            raise UserError("--robot.type", mend)
        if self.listen and not self.listen.rpartition(":")[2].isdigit():
            raise UserError("--robot.listen", f"is HOST:PORT, got '{self.listen}'")
        if self.reset not in RESETS:
            raise UserError("--robot.reset", f"'{self.reset}' is none of {', '.join(RESETS)}")
        if self.reset == "teleop" and self.robot is not None and self.teleop is None:
            raise UserError("--robot.reset", "teleop: name what you drive the robot with, --teleop.type=")
        at_least(1, self, "--robot.", "fps")
        for name in ("episode_time_s", "move_s", "max_gap_s", "approach", "silence_s", "park_after_s"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise UserError(f"--robot.{name}", f"must be positive, got {getattr(self, name)}")
        for name, (low, high) in self.limits.items():
            if not low < high:
                raise UserError("--robot.limits", f"of {name}: the smaller first, got {low}, {high}")
        for option in ("start_pose", "park_pose"):
            for name, value in getattr(self, option).items():
                low, high = self.limits.get(name, (value, value))
                if not low <= value <= high:
                    raise UserError(
                        f"--robot.{option}", f"{name} is {value}, outside of its limits {low}, {high}"
                    )
        if any(not step > 0 for step in self.max_step.values()):
            raise UserError("--robot.max_step", "holds positive numbers")

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}

    @property
    def steps(self) -> int:
        """Most actions of an episode."""
        return max(1, round(self.episode_time_s * self.fps))

    @property
    def at_station(self) -> dict[str, Any]:
        """What the station acts by, in terms of messages."""
        found = {name: getattr(self, name) for name in SHARED + AT_STATION}
        kinds = {
            "robot.type": self.robot and self.robot.type,
            "teleop.type": self.teleop and self.teleop.type,
        }
        return found | kinds | {"limits": {name: [*pair] for name, pair in self.limits.items()}}

    def check_station(self, theirs: dict[str, Any]) -> None:
        """Refuse options that a station elsewhere, which has ``theirs``, does not act by.

        What only it acts by need not be named here.

        Raises:
            UserError: one differs.
        """
        ours, unsaid = self.at_station, RobotEnvConfig(listen=":0").at_station
        for name, value in theirs.items():
            if ours[name] != value and (name in SHARED or ours[name] != unsaid[name]):
                option = f"--{name}" if "." in name else f"--robot.{name}"
                raise UserError(option, f"is {ours[name]} here, {value} at the station: name the same")

    @property
    def in_lockstep(self) -> bool:
        """Whether nobody waits for a clock."""
        said = self.lockstep
        return getattr(self.robot, "clock", None) == "step" if said is None else said

    @property
    def speed(self) -> float:
        """How many times faster than real time a simulated robot runs."""
        return float(getattr(self.robot, "speed", 1.0))

    def make_vector_env(self, n_obs_steps: int) -> Any:
        """The one robot, as the learner sees it."""
        from trimtab.rl.envs.robot.vector import RobotVectorEnv

        return RobotVectorEnv(self, n_obs_steps)
