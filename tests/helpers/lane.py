"""A lane with a goal at one end and a pit at the other, and the manners that users' environments have.

The policy's first action moves along the lane. ``test_lane`` is registered as other people's environments
are: a Gymnasium id, found by LeRobot's config class. ``test_lanes`` has tasks of its own, and defines all
that ``trimtab.rl.envs.hooks`` asks for. ``--env.discover_packages_path=tests.helpers.lane`` loads both from
a command line in the project's root.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import UserError
from trimtab.rl.envs.chunk import ChunkEnv

# Options of a run of seconds on the lane, and of its training.
SMALL = [
    *("--env.type=test_lane", "--policy.device=cpu", "--machine.workers=0"),
    *("--eval.n_episodes=4", "--eval.batch_size=4", "--eval.constant_candidates=2", "--eval.videos=0"),
    "--eval.constant_episodes=2",
]
TRAIN = [
    *("--train.env_steps=240", "--train.first_update=16", "--train.warmup_transitions=16", "--num_envs=2"),
    *("--train.log_every=80", "--rl.type=dsrl_sac", "--rl.batch_size=16"),
]
GOAL, PIT = 6.0, -2.0
# What an environment calls the success it reports; ``None``: it reports none.
SUCCESS_KEYS = {"succeed": "succeed", "success": "success", "silent": None, "dense": None}


class LaneEnv(gym.Env):
    """Moves by the action, clipped to 1.

    Args:
        manner: ``plain``: ends at the goal, says ``is_success``. ``pit``: ends in the pit, too. ``succeed``,
            ``success``: success goes by that name. ``silent``: success is never said. ``dense``: no success,
            the reward is where it stands. ``box``: the observation is a vector. ``in_place``: the observation
            is its own state, which it changes. ``forgets_seed``: starts anywhere, whatever the seed.
            ``one_start``: the same start for every seed. ``arm``: cannot repeat, and says so. ``hurdle``:
            ends in the pit, in a block on the way, and off the sides of the lane. ``terse``: says
            ``is_success`` in the step that succeeds alone.
        log: file to which a line is added for each reset (before and after) and step.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}
    goal = GOAL

    def __init__(self, manner="plain", log=None, render_mode="rgb_array"):
        self.manner, self.log, self.render_mode = manner, log, render_mode
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        place = gym.spaces.Box(-99, 99, (2,), np.float32)
        spaces = {"agent_pos": place, "environment_state": place}
        self.observation_space = place if manner == "box" else gym.spaces.Dict(spaces)
        self.state = np.zeros(2, np.float32)
        if manner == "arm":
            self.metadata = {**self.metadata, "repeatable": False}

    def reset(self, *, seed=None, options=None):
        self._tell("reset begins")
        super().reset(seed=None if self.manner == "forgets_seed" else seed)
        start = np.random.default_rng() if self.manner in ("forgets_seed", "arm") else self.np_random
        self.state[:] = 0.1 if self.manner == "one_start" else start.uniform(-0.5, 0.5, 2)
        self._tell("reset ends")
        return self._observation(), {}

    def step(self, action):
        self._tell("step")
        self.state += np.clip(np.asarray(action, np.float32), -1, 1)
        x, y = self.state
        won, fell = bool(x >= self.goal), bool(x <= PIT)
        if self.manner == "hurdle":
            fell = fell or bool((2 <= x <= 4 and abs(y) < 1) or abs(y) > 8)
        key = SUCCESS_KEYS.get(self.manner, "is_success")
        reward = float(self.state[0]) if self.manner == "dense" else float(won)
        ended = won or (fell and self.manner in ("pit", "dense", "hurdle"))
        said = key is not None and (won or self.manner != "terse")
        return self._observation(), reward, ended, False, {key: won} if said else {}

    def render(self):
        image = np.zeros((64, 64, 3), np.uint8)
        left = int(np.clip(20 + 5 * self.state[0], 0, 60))
        image[30:34, left : left + 4] = 255
        return image

    def _observation(self):
        if self.manner == "box":
            return self.state.copy()
        seen = self.state if self.manner == "in_place" else self.state.copy()
        return {"agent_pos": seen, "environment_state": np.array([self.goal, PIT], np.float32)}

    def _tell(self, line):
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(line + "\n")


gym.register(id="test_lane/Lane-v0", entry_point=LaneEnv)


@EnvConfig.register_subclass("test_lane")
@dataclass
class LaneConfig(EnvConfig):
    task: str | None = "Lane-v0"
    fps: int = 10
    manner: str = "plain"
    log: str | None = None
    episode_length: int | None = 40
    features: dict = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (2,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (2,)),
            "environment_state": PolicyFeature(FeatureType.ENV, (2,)),
        }
    )
    features_map: dict = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            "environment_state": "observation.environment_state",
        }
    )

    @property
    def package_name(self):
        return "tests.helpers.lane"

    @property
    def gym_id(self):
        return f"test_lane/{self.task}"

    @property
    def gym_kwargs(self):
        limit = {"max_episode_steps": self.episode_length} if self.episode_length else {}
        return {"manner": self.manner, "log": self.log, **limit}


LANES = {"near": 3.0, "far": 6.0}  # where the goals are
KNOWN = "lanes.txt"  # in a base policy's folder: the lanes that it knows


class LaneChunks(ChunkEnv):
    """Refuses to go faster than a lane allows."""

    def check_actions(self, actions):
        super().check_actions(actions)
        if np.abs(actions).max() > 50:
            raise UserError("--policy.path", "the policy is too fast for a lane")


@EnvConfig.register_subclass("test_lanes")
@dataclass
class LanesConfig(LaneConfig):
    """Lanes whose goals are near or far, or several of them, separated by commas."""

    task: str | None = "near"

    def task_names(self):
        names = (self.task or "").split(",")
        for name in names:
            if name not in LANES:
                raise UserError("--env.task", f"there is no lane '{name}'")
        return names

    def base_tasks(self, folder):
        path = folder / KNOWN
        return path.read_text().split() if path.is_file() else list(LANES)

    def check_base(self, folder):
        for name in self.task_names():
            if name not in self.base_tasks(folder):
                raise UserError("--env.task", f"this base has never seen the lane '{name}'")

    def make_chunk_env(self, task_index, **options):
        names, env = self.task_names(), LaneEnv(self.manner, self.log)
        env.task = names[task_index % len(names)]
        env.goal = LANES[env.task]
        return LaneChunks(env, limit=self.episode_length, **options)


@EnvConfig.register_subclass("test_suite")
@dataclass
class SuiteConfig(LaneConfig):
    """Three tasks, which show only once they are made: as LIBERO's suites are in LeRobot."""

    task: str | None = "suite"

    def create_envs(self, n_envs, use_async_envs=False):
        def lane(number):
            env = gym.wrappers.TimeLimit(LaneEnv(self.manner), self.episode_length)
            env.unwrapped.task = f"lane {number}"
            return env

        made = {n: gym.vector.SyncVectorEnv([lambda n=n: lane(n)]) for n in range(3)}
        return {self.task: made}


def make_lane_policy(folder, **fields):
    """Save a random DiffusionPolicy for the lane, whose actions follow its noise. It executes four of eight.

    The statistics let actions reach 1 either way, so the base drifts, and falls or arrives by chance.
    """
    import torch
    from lerobot.configs import NormalizationMode
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    from lerobot.policies.factory import make_pre_post_processors

    inputs = {
        "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
        "observation.environment_state": PolicyFeature(FeatureType.ENV, (2,)),
    }
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    by_range = NormalizationMode.MIN_MAX
    settings = {
        "device": "cpu",
        "push_to_hub": False,
        "n_obs_steps": 1,
        "horizon": 8,
        "n_action_steps": 4,
        "down_dims": (16, 32),
        "diffusion_step_embed_dim": 16,
        "noise_scheduler_type": "DDIM",
        "num_train_timesteps": 20,
        "num_inference_steps": 4,
        "pretrained_backbone_weights": None,
        "normalization_mapping": {"STATE": by_range, "ENV": by_range, "ACTION": by_range},
    }
    config = DiffusionConfig(input_features=inputs, output_features=outputs, **{**settings, **fields})
    torch.manual_seed(0)
    policy = DiffusionPolicy(config)
    stats = {}
    for key, feature in {**inputs, **outputs}.items():
        reach = torch.full(feature.shape, 1.0 if key == "action" else 8.0)
        stats[key] = {"min": -reach, "max": reach}
    for part in (policy, *make_pre_post_processors(config, dataset_stats=stats)):
        part.save_pretrained(folder)
    return folder
