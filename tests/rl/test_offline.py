"""Learning from a dataset alone, and going on in the environment from there."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from tests.helpers.point import PointAdapter, PointConfig, PointEnv
from trimtab.adapters import UserError
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_samplers import base_noise
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.rl.algorithms import BestOfNConfig, DSRLNAConfig
from trimtab.rl.budget import TrainConfig
from trimtab.rl.data.demonstration_data import DemosConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.evaluation import evaluate
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.checkpoint import CheckpointConfig, Checkpoints
from trimtab.rl.runs.faults import Stopped
from trimtab.rl.runs.processes import ProcessGroup
from trimtab.rl.trainer import Trainer

LIMIT, FEW = 35, list(range(12))
NETS = {"actor": ActorConfig(hidden=64, layers=2), "critic": CriticConfig(hidden=64, layers=2)}
ALGORITHMS = {
    "best_of_n": BestOfNConfig(num_candidates=8, target_candidates=4, batch_size=128, **NETS),
    "dsrl_na": DSRLNAConfig(num_candidates=8, batch_size=128, **NETS),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """100 episodes of the base policy under its own noise; it reaches the goal in a third of them."""
    root = tmp_path_factory.mktemp("offline") / "data"
    names = "observation.state", "observation.environment_state", "action", "next.success"
    features = {name: {"dtype": "float32", "shape": (1,), "names": None} for name in names}
    dataset = LeRobotDataset.create("test/point", 10, features, root=root, use_videos=False)
    env, adapter, generator = PointEnv(LIMIT), PointAdapter(), torch.Generator().manual_seed(0)
    for episode in range(100):
        observation, _ = env.reset(seed=episode)
        ended = False
        while not ended:
            batch = {
                "observation.state": torch.tensor(observation["agent_pos"]).view(1, 1, 1),
                "observation.environment_state": torch.tensor(observation["environment_state"]).view(1, 1, 1),
            }
            noise = torch.randn(1, 2, 1, generator=generator)
            for action in adapter.denoise(adapter.encode(batch), noise)[0].numpy():
                before = observation
                observation, _, terminated, truncated, info = env.step(action)
                values = (before["agent_pos"], before["environment_state"], action, [info["is_success"]])
                frame = {name: np.array(v, np.float32) for name, v in zip(names, values, strict=True)}
                dataset.add_frame(frame | {"task": "reach the goal"})
                ended = terminated or truncated
                if ended:
                    break
        dataset.save_episode()
    dataset.finalize()
    return root


def trainer(runner, vec, root, rl, checkpoints=None, lines=None, episodes=None, **train):
    return Trainer(
        runner,
        vec,
        Accelerator(cpu=True),
        TrainConfig(**train),
        rl,
        FullNoiseConfig(),
        on_metrics=(lines if lines is not None else []).append,
        progress=False,
        demos=DemosConfig(root=str(root), episodes=episodes),
        checkpoints=checkpoints,
    )


def offline(root, rl, updates, lines, episodes=None):
    config = PointConfig(limit=LIMIT)
    runner, seeds = PolicyRunner(PointAdapter(), config), range(1000, 1100)
    with ChunkVectorEnv(config, 8, 0) as vec:
        base = evaluate(runner, vec, base_noise, seeds, progress=False)
        run = trainer(runner, vec, root, rl, None, lines, episodes, env_steps=0, offline_updates=updates)
        learnt = run.run()
        steered = evaluate(runner, vec, learnt.deployed_policy(), seeds, progress=False)
    assert run.env_steps == run.transitions == run.episodes == 0
    assert all(line["env_steps"] == 0 and np.isfinite(line["critic_loss"]) for line in lines)
    return base.success_rate, steered.success_rate


def test_a_dataset_alone_teaches_what_the_base_seldom_does(recorded):
    lines = []
    base, steered = offline(recorded, ALGORITHMS["best_of_n"], 520, lines)
    assert [line["updates"] for line in lines] == [500, 520]
    assert base < 0.5 and steered > 0.9


def test_updates_left_out_are_counted_and_too_many_end_the_run(recorded):
    lines, config = [], PointConfig()
    with ChunkVectorEnv(config, 2, 0) as vec:
        diverging = replace(ALGORITHMS["best_of_n"], learning_rate=1e30, learning_rate_end=1.0)
        run = trainer(
            *(PolicyRunner(PointAdapter(), config), vec, recorded, diverging, None, lines, FEW),
            **{"env_steps": 0, "offline_updates": 100, "log_every": 10},
        )
        with pytest.raises(UserError, match=r"--rl.learning_rate: NaN or Inf in a gradient; lower it; stop"):
            run.run()
    assert 50 < run.faults["loss"] == run.faults.total() < 90
    assert lines[0]["faults"] > 10 and run.updates == 10 * len(lines) < 100


def test_dsrl_na_learns_from_a_dataset_too(recorded):
    lines = []
    offline(recorded, ALGORITHMS["dsrl_na"], 60, lines, FEW)
    assert [line["updates"] for line in lines] == [60] and "actor_loss" in lines[0]


def test_the_run_goes_on_online_with_what_it_has_learnt(recorded, tmp_path):
    runner, config = PolicyRunner(PointAdapter(), PointConfig()), PointConfig()
    rl = ALGORITHMS["best_of_n"]
    with ChunkVectorEnv(config, 4, 0) as vec:
        checkpoints = Checkpoints(tmp_path, CheckpointConfig(0), {}, ProcessGroup(Accelerator(cpu=True)))
        first = trainer(runner, vec, recorded, rl, checkpoints, None, FEW, env_steps=0, offline_updates=40)
        first.run()
        weights = {name: value.clone() for name, value in first.algorithm.state_dict().items()}
    with ChunkVectorEnv(config, 4, 0) as vec:
        lines = []
        second = trainer(
            runner, vec, recorded, rl, None, lines, FEW, env_steps=200, offline_updates=40, first_update=20
        )
        assert second.train.warmup_transitions == 0
        second.resume(checkpoints.newest()[0])
        assert second.updates == 40 and second.env_steps == 0
        for key, value in second.algorithm.state_dict().items():
            assert torch.equal(value, weights[key]), key
        second.run()
    assert second.updates > 60 and second.env_steps >= 200
    assert lines[-1]["acting"] == "actor" and lines[-1]["demo_share"] == 0.5


def test_a_run_stopped_while_it_learns_offline_keeps_what_follows(recorded, tmp_path):
    runner, config, rl = PolicyRunner(PointAdapter(), PointConfig()), PointConfig(), ALGORITHMS["best_of_n"]
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(500), {}, ProcessGroup(Accelerator(cpu=True)))
    settings = {"env_steps": 0, "offline_updates": 30, "log_every": 10}
    with ChunkVectorEnv(config, 4, 0) as vec:
        run = trainer(runner, vec, recorded, rl, checkpoints, None, FEW, **settings)
        run.on_metrics = lambda line: setattr(run.stop, "name", "SIGTERM")
        with pytest.raises(Stopped):
            run.run()
        assert run.updates == 10
        again = trainer(runner, vec, recorded, rl, checkpoints, None, FEW, **settings)
        again.resume(checkpoints.newest()[0])
        again.run()
        last = trainer(runner, vec, recorded, rl, checkpoints, None, FEW, **settings)
        last.resume(checkpoints.newest()[0])
    assert last.updates == again.updates == 30


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"env_steps": 0}, r"--train.env_steps: must be at least 1, got 0"),
        ({"env_steps": -1, "offline_updates": 5}, r"--train.env_steps: cannot be negative, got -1"),
        ({"offline_updates": -1}, r"--train.offline_updates: cannot be negative, got -1"),
    ],
)
def test_what_cannot_be_is_said(train, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**train)
