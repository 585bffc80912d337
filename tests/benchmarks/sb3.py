"""stable-baselines3's SAC as one more method of ``trimtab compare``, and what it takes.

    python -m tests.benchmarks.sb3 --methods=sb3_sac,dsrl_sac_as_sb3 ...

The frozen policy and its environments are one environment to it, whose action is the noise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from trimtab.policies.noise_samplers import NoiseSampler
from trimtab.policies.noise_space import FullNoiseConfig, NoiseSpace, NoiseSpaceConfig
from trimtab.recipes.cli import main
from trimtab.recipes.compare.config import METHODS
from trimtab.recipes.compare.methods import KINDS, Steering
from trimtab.recipes.compare.runs import Method, Run
from trimtab.rl.data.returns import Returns
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.rollout import Rollout
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.seeds import training_seed


@dataclass
class SB3SACConfig:
    """Settings of stable-baselines3's SAC; what is not here is its own default."""

    hidden: int = 128
    layers: int = 3
    learning_rate: float = 1e-3
    batch_size: int = 256
    # Discount per environment step; that of a chunk is its power.
    gamma: float = 0.99
    tau: float = 0.005
    # Transitions collected with what the base draws, before the actor acts and learning starts.
    warmup_transitions: int = 800
    # Gradient steps of critic and actor per transition.
    updates_per_transition: float = 1.0
    replay_capacity: int = 100_000
    # At stable-baselines3's own start of 1 the entropy in the backup swamps a sparse reward.
    initial_temperature: float = 0.01
    # Aim of the entropy, per number that the actor chooses.
    target_entropy_per_dim: float = -0.25
    reward: str = "sparse"


class PriorBox(spaces.Box):
    """The box of ``u`` whose samples are what the base draws, squashed: stable-baselines3 acts on them before
    learning starts (a plain box would be sampled uniformly).
    """

    def __init__(self, space: NoiseSpace) -> None:
        super().__init__(-space.bound, space.bound, (space.dim,), np.float32)
        self._noise_space = space

    def sample(self, mask: None = None, probability: None = None) -> np.ndarray:
        z = self.np_random.standard_normal(self.shape) * self._noise_space.initial_std
        return self._noise_space.squash(torch.as_tensor(z, dtype=torch.float32)).numpy()


class NoiseVecEnv(VecEnv):
    """One step is one action chunk. Seeds, draws, rewards and ends are the collector's.

    Action: ``u`` in [-bound, bound], which the noise space makes into noise. Observation: the adapter's
    features. Reward: the discounted reward of the chunk. A time limit shows as ``TimeLimit.truncated``, the
    true last observation as ``terminal_observation``.

    Args:
        runner: the frozen policy.
        vec: environments.
        space: noise space.
        gamma: discount per environment step.
        reward: ``sparse`` or ``env`` (see ``returns.Returns``).
        seed: first of the training seeds; environment i takes seed + i, seed + i + num_envs, ...
    """

    def __init__(
        self,
        runner: PolicyRunner,
        vec: ChunkVectorEnv,
        space: NoiseSpace,
        gamma: float,
        reward: str,
        seed: int,
    ) -> None:
        self.runner, self.vec, self.space = runner, vec, space
        self.returns = Returns(reward, gamma, chunk_steps=runner.adapter.chunk_shape[0])
        self.env_steps = 0
        # Whether each episode succeeded that has ended since the list was last emptied.
        self.ended: list[bool] = []
        count = vec.num_envs
        self._rollout = Rollout(
            runner, vec, lambda i, k: seed + i if k is None else k + count, per_episode=False
        )
        self._success = dict.fromkeys(range(count), False)
        self._unused: np.ndarray | None = self._look()
        box = spaces.Box(-np.inf, np.inf, (self._unused.shape[1],), np.float32)
        super().__init__(count, box, PriorBox(space))

    def reset(self) -> np.ndarray:
        """Start the next episode everywhere, unless none has moved since the last reset."""
        if self._unused is None:
            self._rollout.restart(list(self._success))
            self._success = dict.fromkeys(self._success, False)
            self._unused = self._look()
        return self._unused

    def _look(self) -> np.ndarray:
        self._rollout.encode_observations()
        return self._rollout.features.cpu().numpy()

    def step_async(self, actions: np.ndarray) -> None:
        self._unused = None
        u = torch.as_tensor(actions, dtype=torch.float32)
        self._rollout.begin(NoiseSampler(lambda features, prior: u.to(prior), self.space))

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        results = self._rollout.receive()
        rewards = np.zeros(len(results), dtype=np.float32)
        infos: list[dict[str, Any]] = [{} for _ in results]
        for i, result in results.items():
            self._success[i] |= bool(result.successes.any())
            rewards[i], _ = self.returns.reward_and_discount(result, self._success[i])
            self.env_steps += result.steps
            infos[i]["TimeLimit.truncated"] = result.truncated
        ended, encoded = self._rollout.final_observations()
        finals = self.runner.features(encoded).cpu().numpy() if ended else ()
        for i, final in zip(ended, finals, strict=True):
            infos[i]["terminal_observation"] = final
            self.ended.append(self._success[i])
            self._success[i] = False
        self._rollout.start_next_episodes()
        return self._look(), rewards, np.array([result.ended for result in results.values()]), infos

    def close(self) -> None:
        """The environments belong to the caller."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name != "render_mode":
            raise AttributeError(attr_name)
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(attr_name)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        raise AttributeError(method_name)

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def make_sac(config: SB3SACConfig, env: VecEnv, chunk_steps: int, seed: int, **options: Any) -> SAC:
    """stable-baselines3's SAC on a noise environment.

    Args:
        config: settings.
        env: the environment.
        chunk_steps: environment steps of a whole chunk. (A shorter last chunk is discounted like a whole one:
            stable-baselines3 knows one discount.)
        seed: of networks, replay and draws.
        options: replace those given to ``SAC``.
    """
    dim = env.action_space.shape[0]
    settings: dict[str, Any] = {
        "learning_rate": config.learning_rate,
        "buffer_size": config.replay_capacity,
        "learning_starts": config.warmup_transitions,
        "batch_size": config.batch_size,
        "tau": config.tau,
        "gamma": config.gamma**chunk_steps,
        "train_freq": 1,
        "gradient_steps": max(1, round(config.updates_per_transition * env.num_envs)),
        "ent_coef": f"auto_{config.initial_temperature}",
        "target_entropy": config.target_entropy_per_dim * dim,
        "policy_kwargs": {"net_arch": [config.hidden] * config.layers},
        "seed": seed,
        "device": "cpu",
    }
    model = SAC("MlpPolicy", env, **(settings | options))
    model.set_logger(Logger(folder=None, output_formats=[]))  # its default makes a folder
    return model


class _AfterStep(BaseCallback):
    def __init__(self, env: NoiseVecEnv, env_steps: int, on_step: Callable[[int, list[bool]], None]) -> None:
        super().__init__()
        self._env, self._env_steps, self._tell = env, env_steps, on_step

    def _on_step(self) -> bool:
        ended, self._env.ended = self._env.ended, []
        self._tell(self._env.env_steps, ended)
        return self._env.env_steps < self._env_steps


def learn(model: SAC, env: NoiseVecEnv, env_steps: int, on_step: Callable[[int, list[bool]], None]) -> None:
    """Train until ``env_steps`` environment steps (not chunks) are collected.

    Args:
        model: from ``make_sac``.
        env: its environment.
        env_steps: budget.
        on_step: called after each chunk with the steps so far and the outcomes of the episodes that ended.
    """
    model.learn(total_timesteps=env_steps, callback=_AfterStep(env, env_steps, on_step))


def sb3_noise(model: SAC, space: NoiseSpace) -> NoiseSampler:
    """What the mean of stable-baselines3's actor chooses."""

    def choose(features: Tensor | None, prior: Tensor) -> Tensor:
        u, _ = model.predict(features.cpu().numpy(), deterministic=True)
        return torch.as_tensor(u).to(prior)

    return NoiseSampler(choose, space)


@dataclass(frozen=True)
class SB3SAC(Method):
    """stable-baselines3's SAC on the noise. Nothing of it is saved."""

    sac: SB3SACConfig = field(default_factory=SB3SACConfig)
    noise: NoiseSpaceConfig = field(default_factory=FullNoiseConfig)

    uses = Steering.uses

    def needs_success(self) -> bool:
        return self.sac.reward == "sparse"

    def learn(self, run: Run) -> dict[str, Any]:
        config, session = self.sac, run.session
        adapter = session.adapter
        space, runner = self.noise.build(adapter.noise_spec), PolicyRunner(adapter, session.env)
        with session.environments(run.config.num_envs) as vec:
            env = NoiseVecEnv(runner, vec, space, config.gamma, config.reward, training_seed(run.seed))
            model = make_sac(config, env, adapter.chunk_shape[0], run.seed, device=adapter.device)
            run.policies = {"actor": sb3_noise(model, space)}
            run.trained = {"actor": sum(weight.numel() for weight in model.actor.parameters())}
            learn(model, env, run.config.env_steps, lambda steps, ended: run.note(steps, steered(ended)))
        return {"updates": model._n_updates}


def steered(ended: list[bool]) -> list[tuple[bool, bool]]:
    """Outcomes as ``Run.note`` takes them."""
    return [(won, True) for won in ended]


KINDS["sb3"] = SB3SAC
METHODS["sb3_sac"] = {"kind": "sb3"}

if __name__ == "__main__":
    # By its own name: what each run's process loads, too.
    sys.exit(main(["compare", "--env.discover_packages_path=tests.benchmarks.sb3", *sys.argv[1:]]))
