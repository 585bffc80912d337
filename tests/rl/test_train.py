"""The whole loop: a small problem that SAC must solve, exact repetition, a base that stays frozen."""

import json

import pytest
import torch
from accelerate import Accelerator

from tests.helpers.point import PointAdapter, PointConfig
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.identity import file_hash, weights_hash
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_samplers import base_noise, constant_noise, steered_noise, zero_noise
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.rl.algorithms import BestOfNConfig, DSRLSACConfig
from trimtab.rl.budget import TrainConfig
from trimtab.rl.envs.metaworld import MetaworldStateConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.evaluation import best_constant, evaluate
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.trainer import Trainer

SMALL = DSRLSACConfig(
    batch_size=64,
    gamma=0.95,
    actor=ActorConfig(hidden=64, layers=2),
    critic=CriticConfig(hidden=64, layers=2),
)


def train(runner, vec, seed=0, **settings):
    lines = []
    trainer = Trainer(
        runner,
        vec,
        Accelerator(cpu=True),
        TrainConfig(**settings),
        SMALL,
        FullNoiseConfig(),
        seed,
        lines.append,
        progress=False,
    )
    return trainer.run(), lines, trainer


def test_sac_solves_a_noise_space_problem():
    adapter, config = PointAdapter(), PointConfig(limit=35)
    adapter.verify()
    runner, seeds = PolicyRunner(adapter, config), range(1000, 1100)
    with ChunkVectorEnv(config, 8, 0) as vec:
        base = evaluate(runner, vec, base_noise, seeds, progress=False)
        zero = evaluate(runner, vec, zero_noise, seeds, progress=False)
        ticket, _ = best_constant(runner, vec, 16, range(2000, 2010), 0, progress=False)
        constant = evaluate(runner, vec, constant_noise(ticket), seeds, progress=False)
        algorithm, lines, _ = train(runner, vec, env_steps=2000, warmup_transitions=300, first_update=100)
        steered = evaluate(runner, vec, steered_noise(algorithm.actor, True), seeds, progress=False)
    assert 0.2 < base.success_rate < 0.5
    assert zero.success_rate == 0.0
    assert constant.success_rate < 0.75
    assert steered.success_rate > 0.95
    assert lines[-1]["success_rate"] > 0.8
    assert lines[-1]["calibration_correlation"] > 0.5


def test_metrics_hold_what_a_user_needs_to_trust_a_run():
    config = PointConfig()
    with ChunkVectorEnv(config, 4, 0) as vec:
        _, lines, trainer = train(
            PolicyRunner(PointAdapter(), config),
            vec,
            env_steps=800,
            first_update=64,
            warmup_transitions=100,
            log_every=100,
        )
    last = json.loads(json.dumps(lines[-1]))
    for name in (
        "env_steps", "episodes", "transitions", "updates", "success_rate", "acting", "critic_loss", "q_mean",
        "q_min", "q_max", "entropy", "alpha", "noise_kl_to_prior", "noise_rms", "calibration_bias",
        "calibration_rmse", "seconds_denoise", "seconds_env_wait", "seconds_update", "seconds_total",
        "seconds_env_busy", "seconds_env_idle",
    ):  # fmt: skip
        assert name in last, name
    # Without workers the simulators wait while the learner works, and the other way round.
    share = {name: last[f"seconds_share/{name}"] for name in ("learner_waits", "envs_wait", "denoise")}
    assert all(0.0 < value < 1.0 for value in share.values()) and 0.5 < sum(share.values()) <= 1.001
    assert share["learner_waits"] == pytest.approx(last["seconds_env_wait"] / last["seconds_total"], abs=0.01)
    assert last["seconds_env_idle"] == pytest.approx(last["seconds_update"], abs=0.1 * last["seconds_total"])
    assert lines[0]["acting"] == "untrained" and last["acting"] == "actor"
    assert 0 < last["updates"] <= 2 * last["transitions"]
    assert last["env_steps"] == trainer.collector.env_steps >= 800


def test_the_same_seed_repeats_exactly_and_another_does_not():
    def run(seed):
        config = PointConfig()
        with ChunkVectorEnv(config, 3, 0) as vec:
            _, lines, _ = train(
                PolicyRunner(PointAdapter(), config),
                vec,
                seed,
                env_steps=300,
                first_update=50,
                warmup_transitions=60,
                log_every=100,
            )
        return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]

    first = run(0)
    assert first[-1]["acting"] == "actor" and first == run(0)
    assert first != run(1)


def test_base_stays_frozen_while_steered(tiny_base):
    adapter = load_adapter(PolicyConfig(path=str(tiny_base), device="cpu"))
    config = MetaworldStateConfig(task="button-press-topdown-v3", episode_length=30)
    before = file_hash(tiny_base), weights_hash(adapter.policy)
    with ChunkVectorEnv(config, 2, 0) as vec:
        algorithm, _, _ = train(
            PolicyRunner(adapter, config), vec, env_steps=300, first_update=16, warmup_transitions=20
        )
    assert (file_hash(tiny_base), weights_hash(adapter.policy)) == before
    assert all(parameter.grad is None for parameter in adapter.policy.parameters())
    assert algorithm.updates > 10


def test_nan_observation_stops_in_one_line():
    config = PointConfig(poison_at=5)
    with (
        ChunkVectorEnv(config, 2, 0) as vec,
        pytest.raises(UserError, match=r"--env.type: the environment returned NaN or Inf in its observation"),
    ):
        train(PolicyRunner(PointAdapter(), config), vec, env_steps=500)


def test_nan_action_stops_in_one_line():
    adapter, config = PointAdapter(), PointConfig()
    adapter.policy.gain.fill_(float("nan"))
    with pytest.raises(UserError, match=r"--policy.path: .*NaN or Inf"):
        adapter.verify()
    with (
        ChunkVectorEnv(config, 2, 0) as vec,
        pytest.raises(UserError, match=r"--policy.path: the policy produced a NaN or Inf action"),
    ):
        train(PolicyRunner(adapter, config), vec, env_steps=500)


@pytest.mark.parametrize(
    "name, value",
    [
        ("reward", "none"),
        ("env_steps", 0),
        ("updates_per_transition", 0),
        ("warmup_transitions", -1),
        ("replay_capacity", 10),
    ],
)
def test_bad_settings(name, value):
    with pytest.raises(UserError, match=f"--train.{name}"):
        TrainConfig(**{name: value}).at_pace_of(DSRLSACConfig())


def test_what_is_left_open_is_the_algorithms_own_pace():
    train = TrainConfig(updates_per_transition=7.0).at_pace_of(DSRLSACConfig())
    assert (train.warmup_transitions, train.first_update, train.updates_per_transition) == (800, 256, 7.0)
    early = TrainConfig(first_update=9).at_pace_of(BestOfNConfig())
    assert (early.warmup_transitions, early.first_update) == (0, 9) and early.updates_per_transition == 2.0
    assert early.at_pace_of(DSRLSACConfig()) == early


@pytest.mark.parametrize(
    "settings, option",
    [
        ({"gamma": 1.0}, "--rl.gamma"),
        ({"n_step": 0}, "--rl.n_step"),
        ({"batch_size": 0}, "--rl.batch_size"),
        ({"learning_rate": -1.0}, "--rl.learning_rate"),
        ({"tau": 2.0}, "--rl.tau"),
        ({"actor_every": 0}, "--rl.actor_every"),
        ({"initial_temperature": 0.0}, "--rl.initial_temperature"),
    ],
)
def test_bad_algorithm_settings(settings, option):
    with pytest.raises(UserError, match=option):
        DSRLSACConfig(**settings)


def test_bad_networks():
    with pytest.raises(UserError, match=r"--rl.actor"):
        ActorConfig(log_std_max=0.0)
    with pytest.raises(UserError, match=r"--rl.critic"):
        CriticConfig(layers=0)


def test_a_run_too_short_to_learn_is_no_success():
    config = PointConfig()
    with (
        ChunkVectorEnv(config, 2, 0) as vec,
        pytest.raises(UserError, match=r"--train.env_steps: .*learning starts at 256"),
    ):
        train(PolicyRunner(PointAdapter(), config), vec, env_steps=100)


def test_a_diverged_actor_is_named():
    config = PointConfig()
    with ChunkVectorEnv(config, 2, 0) as vec:
        trainer = Trainer(PolicyRunner(PointAdapter(), config), vec, Accelerator(cpu=True), progress=False)
        torch.nn.init.constant_(trainer.algorithm.actor.net[-1].bias, float("nan"))
        with pytest.raises(UserError, match=r"--rl.learning_rate: the noise actor has diverged"):
            trainer.collector.begin()
