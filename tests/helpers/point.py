"""A small noise-space problem with real parts around it: a point that must reach a goal it can see.

The "frozen policy" turns noise into velocities through a fixed nonlinear map that depends on the
state; under its own noise the point wanders and seldom arrives. Only noise chosen by where the goal lies
gets there in time, and no constant noise can, for the goal is on either side.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import Conditioning, NoiseSpec, PolicyAdapter

STEPS = 2  # executed per chunk


class PointEnv(gym.Env):
    observation_space = gym.spaces.Dict(
        {
            "agent_pos": gym.spaces.Box(-9, 9, (1,), np.float64),
            "environment_state": gym.spaces.Box(-9, 9, (1,), np.float64),
        }
    )
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    task_description = "reach the goal"

    def __init__(self, limit=13, poison_at=None, brink=None, goes_on=False):
        self.limit, self.poison_at = limit, poison_at  # 13 steps: the last chunk is a short one
        # How far from the goal's side an episode ends, too; whether it goes on after success.
        self.brink, self.goes_on = np.inf if brink is None else brink, goes_on

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.2, 0.2)
        self.goal = self.np_random.choice([-1.0, 1.0]) * self.np_random.uniform(0.6, 1.0)
        self.t = 0
        return self._observation(), {"is_success": False}

    def step(self, action):
        self.x += 0.15 * float(np.clip(action[0], -1, 1))
        self.t += 1
        success = abs(self.x - self.goal) < 0.1
        ended = (success and not self.goes_on) or self.x * np.sign(self.goal) < -self.brink
        return self._observation(), float(success), ended, self.t >= self.limit, {"is_success": success}

    def _observation(self):
        x = np.nan if self.t == self.poison_at else self.x
        return {"agent_pos": np.array([x]), "environment_state": np.array([self.goal])}


@EnvConfig.register_subclass("test_point")
@dataclass
class PointConfig(EnvConfig):
    task: str | None = "point"
    limit: int = 13
    poison_at: int | None = None
    brink: float | None = None
    goes_on: bool = False
    features: dict = field(default_factory=dict)
    features_map: dict = field(default_factory=dict)

    @property
    def gym_kwargs(self):
        return {}

    def create_envs(self, n_envs, use_async_envs=False):
        make = [lambda: PointEnv(self.limit, self.poison_at, self.brink, self.goes_on)] * n_envs
        return {"test_point": {0: gym.vector.SyncVectorEnv(make)}}


class PointPolicy(torch.nn.Module):
    """Stands where a LeRobot policy would: fixed weights, features, no training."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(1.2), requires_grad=False)
        feature = PolicyFeature(FeatureType.STATE, (1,))
        self.config = SimpleNamespace(
            input_features={"observation.state": feature, "observation.environment_state": feature},
            output_features={"action": PolicyFeature(FeatureType.ACTION, (1,))},
        )


class PointAdapter(PolicyAdapter):
    policy_type = "test_point"
    history = True

    def __init__(self):
        super().__init__(PointPolicy(), dict, lambda chunk: chunk)
        self.noise_spec = NoiseSpec((STEPS, 1))
        self.chunk_shape = (STEPS, 1)
        self.n_obs_steps = 1

    def encode(self, batch):
        state = torch.cat(
            [batch["observation.state"][:, 0], batch["observation.environment_state"][:, 0]], -1
        )
        return Conditioning({"state": state.float()})

    def denoise(self, conditioning, noise):
        self.check_noise(conditioning, noise)
        twist = 1.0 + 0.3 * torch.sin(3.0 * conditioning.rows("state")[:, :1, None])
        return torch.tanh(self.policy.gain * noise * twist)

    def features(self, conditioning):
        return conditioning.rows("state")

    def example_conditioning(self, batch_size, generator):
        return Conditioning({"state": torch.randn(batch_size, 2, generator=generator)})


def point_dataset(root, episodes=(10, 7), columns=(), task="reach the goal", success_at=None):
    """A dataset for the point policy: numbers that tell where they come from."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {
        key: {"dtype": "float32", "shape": (1,), "names": None}
        for key in ("observation.state", "observation.environment_state", "action", *columns)
    }
    dataset = LeRobotDataset.create("test/point", 10, features, root=root, use_videos=False)
    for number, length in enumerate(episodes):
        for t in range(length):
            value = np.array([0.01 * t + 0.1 * number], np.float32)
            frame = {
                "observation.state": value,
                "observation.environment_state": value + 0.5,
                "action": value * 2,
            }
            for name in columns:
                frame[name] = np.array([float(t == success_at)], np.float32)
            dataset.add_frame({**frame, "task": task})
        dataset.save_episode()
    dataset.finalize()
    return root
