"""A small policy for the embedded arm, and stations that run in a thread of the test's process."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors

from trimtab.recipes.cli import main
from trimtab.recipes.embedded_arm.arm import START, UNITS, MujocoArm, MujocoArmConfig
from trimtab.recipes.embedded_arm.person import ScriptedPerson
from trimtab.recipes.embedded_arm.processor import StateAsEnvironmentState
from trimtab.rl.envs.robot import station
from trimtab.rl.envs.robot.config import RobotEnvConfig
from trimtab.rl.envs.robot.people import Person

STATE, ACTIONS = 7, 5
POSE = np.array([*START.values()], np.float32)


class ExactPerson(ScriptedPerson):
    """Brings the arm, too, to where the episode starts, to the bit: as if no hand had moved it before."""

    def start(self, robot: MujocoArm, episode: int) -> bool:
        ready = super().start(robot, episode)
        if ready:
            robot._mujoco.mj_resetData(robot._model, robot._data)
            robot._data.qpos[:5] = robot._data.ctrl[:] = np.array([*START.values()]) * UNITS
            robot.place_cube(episode)
        return ready


PERSON = f"{ExactPerson.__module__}:{ExactPerson.__name__}"


def make_policy(folder: Path, n_obs_steps: int = 1, **fields: Any) -> Path:
    """A DiffusionPolicy of random weights that trembles about the arm's start pose."""
    torch.manual_seed(0)
    sizes = {
        "observation.state": (FeatureType.STATE, STATE),
        "observation.environment_state": (FeatureType.ENV, STATE),
    }
    config = DiffusionConfig(
        input_features={name: PolicyFeature(kind, (size,)) for name, (kind, size) in sizes.items()},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTIONS,))},
        device="cpu",
        push_to_hub=False,
        n_obs_steps=n_obs_steps,
        horizon=8,
        n_action_steps=5,
        down_dims=(16,),
        kernel_size=3,
        diffusion_step_embed_dim=16,
        noise_scheduler_type="DDIM",
        num_train_timesteps=50,
        num_inference_steps=2,
        **{"prediction_type": "sample", **fields},
        normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MIN_MAX),
    )
    start = torch.tensor([*START.values()])
    seen = {"min": torch.full((STATE,), -100.0), "max": torch.full((STATE,), 150.0)}
    stats = {**dict.fromkeys(sizes, seen), "action": {"min": start - 5, "max": start + 5}}
    pre, post = make_pre_post_processors(config, dataset_stats=stats)
    pre.steps = [StateAsEnvironmentState(), *pre.steps]
    for part in (DiffusionPolicy(config), pre, post):
        part.save_pretrained(folder)
    return folder


def robot_config(**options: Any) -> RobotEnvConfig:
    """The embedded arm, a step of physics for each action, and the person that plays a script."""
    arm = options.pop("robot", None) or MujocoArmConfig(id=options.pop("id", "test"), clock="step")
    known = {"episode_time_s": 1.0, "person": PERSON, "move_s": 0.1, "silence_s": 2.0, "park_after_s": 0.2}
    return RobotEnvConfig(**{"robot": arm, **known, **options})


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def station_thread(config: RobotEnvConfig, address: str, token: str, again: bool = False) -> Any:
    """A station in a thread; yields a list that holds what it raised, if anything, once it has ended."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            station.run_station(config, address, token, again)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield raised
    thread.join(10)
    assert not thread.is_alive()


def command(name: str, *options: str, said: dict[str, Any] | None = None, rc: int = 0, **robot: Any) -> None:
    """Run a command with a station in a thread, whose person has the options ``said``; it ends by ``rc``."""
    port = free_port()
    config = robot_config(person_options=said or {}, **robot)
    with station_thread(config, f"127.0.0.1:{port}", "word", again=True) as raised:
        where = [f"--robot.listen=127.0.0.1:{port}", "--robot.token=word"]
        assert main([name, *where, *options]) == rc
    assert not raised


def the_arm(name: str = "test") -> MujocoArm:
    """The arm that a station in this process has connected."""
    return MujocoArm.connected[name]


class Told(Person):
    """Says what it is told to, by step, and is ready once it has been asked so often."""

    def __init__(self, said=None, ready_after=0):
        self.told, self.left = said or {}, ready_after

    def start(self, robot, episode):
        self.left -= 1
        return self.left < 0

    def said(self, robot, step):
        return self.told.get(step)

    def close(self):
        """There is nothing to close."""


class Calls:
    """A learner that never says anything else, and does not listen."""

    def withdrawn(self):
        return False

    def send(self, message):
        """Nobody asks for it."""


def begin(station: station.Station) -> dict[str, Any]:
    return station.begin({"number": 0, "say": "episode 1"}, Calls())
