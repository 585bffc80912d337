"""A user's own simulator, in a file of theirs: a point must come to a goal. It reports no success."""

import gymnasium as gym
import numpy as np


class Reach(gym.Env):
    """Observation: position and goal (4,). Action: velocity (2,). Reward: minus the distance."""

    observation_space = gym.spaces.Box(-4, 4, (4,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.1, 0.1, 2)
        self.goal = self.np_random.choice([-1.0, 1.0], 2) * self.np_random.uniform(0.4, 0.6, 2)
        return self._observation(), {}

    def step(self, action):
        assert np.abs(action).max() <= 1, "a velocity out of bounds"
        self.x = np.clip(self.x + 0.1 * action, -2, 2)
        distance = np.linalg.norm(self.x - self.goal)
        return self._observation(), -distance, bool(distance < 0.15), False, {"distance": distance}

    def _observation(self):
        return np.concatenate([self.x, self.goal])

    def render(self):
        frame = np.zeros((64, 64, 3), np.uint8)
        for point, channel in ((self.x, 0), (self.goal, 1)):
            row, column = np.clip(32 + 16 * point, 1, 62).astype(int)
            frame[row - 1 : row + 2, column - 1 : column + 2, channel] = 255
        return frame


def make(episode_length=16):
    return gym.wrappers.TimeLimit(Reach(), episode_length)


def demonstrate(root, episodes=30):
    """Record a LeRobotDataset of a demonstrator who goes to the goal or, half of the time, to its mirror."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {
        "observation.state": {"dtype": "float32", "shape": (4,), "names": None},
        "observation.environment_state": {"dtype": "float32", "shape": (4,), "names": None},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    }
    dataset = LeRobotDataset.create("me/reach", 10, features, root=root, use_videos=False)
    env, rng = make(), np.random.default_rng(0)
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        side = rng.choice([-1.0, 1.0])
        ended = False
        while not ended:
            aim = observation[2:] * [1.0, side]
            action = np.clip(4 * (aim - observation[:2]) + rng.normal(0, 0.1, 2), -1, 1).astype(np.float32)
            state = observation.astype(np.float32)
            frame = {"observation.state": state, "observation.environment_state": state, "action": action}
            observation, reward, terminated, truncated, _ = env.step(action)
            dataset.add_frame(frame | {"next.reward": np.array([reward], np.float32), "task": "reach"})
            ended = terminated or truncated
        dataset.save_episode()
    dataset.finalize()
