"""Where an episode also ends by failing, learning makes the policy succeed, and not fail fast."""

from dataclasses import replace

import pytest
from accelerate import Accelerator

from tests.helpers.lane import LaneConfig, make_lane_policy
from trimtab.adapters import PolicyConfig, load_adapter
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_samplers import base_noise, steered_noise
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.rl.algorithms import BestOfNConfig, DSRLNAConfig, DSRLSACConfig
from trimtab.rl.budget import TrainConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.evaluation import evaluate
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.trainer import Trainer

SMALL = {"actor": ActorConfig(hidden=64, layers=2), "critic": CriticConfig(hidden=64, layers=2)}
ALGORITHMS = {
    "best_of_n": BestOfNConfig(num_candidates=8, batch_size=64, **SMALL),
    "dsrl_na": DSRLNAConfig(num_candidates=8, batch_size=64, critic_loss="logistic", **SMALL),
    "dsrl_sac": DSRLSACConfig(batch_size=64, **SMALL),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return load_adapter(
        PolicyConfig(path=str(make_lane_policy(tmp_path_factory.mktemp("lane"))), device="cpu")
    )


@pytest.mark.parametrize(
    "name, reward",
    [("best_of_n", "sparse"), ("dsrl_sac", "sparse"), ("best_of_n", "env"), ("dsrl_na", "env")],
)
def test_learning_keeps_out_of_the_pit(adapter, name, reward):
    """Paid for success alone, it does not wait for the time limit either."""
    config, seeds = LaneConfig(manner="pit"), range(1000, 1050)
    runner = PolicyRunner(adapter, config)
    train = TrainConfig(
        env_steps=1000, warmup_transitions=64, first_update=64, updates_per_transition=1.0, catch_up=False
    )
    with ChunkVectorEnv(config, 10, 0) as vec:
        base = evaluate(runner, vec, base_noise, seeds, progress=False)
        train = replace(train, reward=reward).within_rewards(base.reward_range)
        trainer = Trainer(
            runner,
            vec,
            Accelerator(cpu=True),
            train,
            ALGORITHMS[name],
            FullNoiseConfig(),
            progress=False,
        )
        learnt = trainer.run()
        policies = steered_noise(learnt.actor, deterministic=True), learnt.deployed_policy()
        found = [evaluate(runner, vec, policy, seeds, progress=False) for policy in policies]
    assert 0.05 < base.success_rate < 0.5
    assert all(steered.success_rate > base.success_rate + 0.3 for steered in found)
