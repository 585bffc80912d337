"""Gymnasium's locomotion tasks, demonstrated by agents that stopped half-way to an expert's return.

The counterpart of D4RL's "medium" data, from which DSRL's Gym bases were cloned: stable-baselines3's SAC
learns until its return reaches a target, and the demonstrations are episodes of it and of what it was before.
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3 import SAC

from trimtab.adapters import UserError
from trimtab.recipes.embedded_base.demonstrations import SEED_OFFSET, frame
from trimtab.recipes.embedded_base.suites import Task
from trimtab.rl.runs.progress import Progress

# By task: the mean return at which an agent stops, a third to a half of what SAC ends at (about 3,300, 4,600
# and 10,600); frames per second; and the task in words.
LOCOMOTION = {
    "Hopper-v5": (1500.0, 125, "Hop forward on one leg"),
    "HalfCheetah-v5": (4500.0, 20, "Run forward"),
    "Walker2d-v5": (2000.0, 125, "Walk forward on two legs"),
}
EVERY, EVALUATED = 5_000, 10  # steps of training between two evaluations, and episodes of each
MAX_STEPS = 500_000
KEPT = 4  # the agents who demonstrate: the last, and those at the evaluations before


def medium_agents(task: str, seed: int, target: float) -> list[Any]:
    """Train SAC until it has the return ``target``; its last policies, the oldest first.

    Networks and batches are half of stable-baselines3's: enough for half an expert, in a third of the time.

    Raises:
        UserError: ``MAX_STEPS`` environment steps did not suffice.
    """
    agents: list[Any] = []
    env = gym.make(task)  # not the one that SAC learns in
    networks = {"net_arch": [128, 128], "optimizer_kwargs": {"fused": True}}
    sac = SAC(
        "MlpPolicy",
        gym.make(task),
        seed=seed,
        device="cpu",
        batch_size=128,
        policy_kwargs=networks,
        learning_starts=EVERY,
    )
    progress = Progress(total=MAX_STEPS, desc=f"SAC on {task}", unit="step")
    while sac.num_timesteps < MAX_STEPS:
        sac.learn(EVERY, reset_num_timesteps=False)
        agents = [*agents, copy.deepcopy(sac.policy)][-KEPT:]
        episodes = [play(env, sac.policy, SEED_OFFSET - 1 - n) for n in range(EVALUATED)]
        reached = sum(float(step["next.reward"][0]) for frames in episodes for step in frames) / EVALUATED
        progress.update(EVERY)
        progress.set_postfix_str(f"return {reached:.0f} of {target:.0f}")
        if reached >= target:
            progress.close()
            return agents
    progress.close()
    raise UserError(
        "--seed", f"{task}: SAC did not reach a return of {target:.0f} in {MAX_STEPS:,} steps; take another"
    )


def play(env: gym.Env, agent: Any, seed: int, description: str = "") -> Iterator[dict[str, Any]]:
    """Yield the frames of one episode of a stochastic ``agent``, in the dataset's format."""
    observation, _ = env.reset(seed=seed)
    ended = False
    while not ended:
        seen = observation.copy()  # a simulator may fill the same array again
        action, _ = agent.predict(observation, deterministic=False)
        observation, reward, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
        yield frame(seen, seen, action, reward, ended, description)


def demonstrate(task: str, episodes: int, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the frames of each episode; whose turn it is is drawn."""
    target, _, description = LOCOMOTION[task]
    agents, env = medium_agents(task, seed, target), gym.make(task)
    rng = np.random.default_rng([seed, 1])
    for episode in range(episodes):
        agent = agents[rng.integers(len(agents))]
        yield list(play(env, agent, SEED_OFFSET + seed * 100_000 + episode, description))
    env.close()


TASKS = {
    name: Task({"type": "gym", "id": name, "fps": fps}, partial(demonstrate, name), fps)
    for name, (_, fps, _) in LOCOMOTION.items()
}
