"""Evaluation: paired, independent of vectorisation, honest about counts."""

import numpy as np
import pytest
import torch

from tests.helpers.point import PointAdapter, PointConfig
from trimtab.policies.noise_samplers import base_noise, constant_noise, zero_noise
from trimtab.rl.envs.metaworld import MetaworldStateConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.evaluation import best_constant, evaluate
from trimtab.rl.runner import PolicyRunner

SEEDS = range(500, 530)


def run(envs, source=base_noise, seeds=SEEDS, **options):
    config = PointConfig()
    with ChunkVectorEnv(config, envs, 0) as vec:
        return evaluate(PolicyRunner(PointAdapter(), config), vec, source, seeds, progress=False, **options)


def test_does_not_depend_on_the_number_of_environments_or_their_order():
    one, seven = run(1), run(7)
    assert np.array_equal(one.successes, seven.successes)
    assert np.array_equal(one.steps, seven.steps)
    backwards = run(7, seeds=list(reversed(SEEDS)))
    assert np.array_equal(one.successes, backwards.successes[::-1])
    assert 0 < one.success_rate < 1


def test_many_constants_in_one_sweep_are_as_each_alone():
    noises = torch.randn(2, *PointAdapter().noise_spec.shape, generator=torch.Generator().manual_seed(1))
    chosen = (np.arange(len(SEEDS)) % 3 > 0).astype(int)
    mixed = run(7, noises[chosen])
    for number, noise in enumerate(noises):
        alone, rows = run(7, constant_noise(noise)), chosen == number
        assert np.array_equal(mixed.steps[rows], alone.steps[rows])
        assert np.array_equal(mixed.successes[rows], alone.successes[rows])


def test_more_environments_than_episodes():
    assert len(run(5, seeds=[1, 2]).successes) == 2


def test_summary():
    summary = run(4, zero_noise).summary()
    assert summary["successes"] == 0 and summary["episodes"] == 30 and summary["success_rate"] == 0.0
    assert summary["ci95"][0] == 0.0 and summary["ci95"][1] == pytest.approx(0.1135, abs=1e-3)
    assert summary["mean_steps"] == 13.0


def test_best_constant_is_the_best_on_its_selection_seeds():
    config = PointConfig()
    runner = PolicyRunner(PointAdapter(), config)
    with ChunkVectorEnv(config, 6, 0) as vec:
        noise, rates = best_constant(runner, vec, 8, range(10), 3, progress=False)
        again = evaluate(runner, vec, constant_noise(noise), range(10), progress=False)
    assert len(rates) == 8 and max(rates) == again.success_rate


def test_records_the_asked_episodes(tiny_base):
    from trimtab.adapters import PolicyConfig, load_adapter

    adapter = load_adapter(PolicyConfig(path=str(tiny_base), device="cpu"))
    config = MetaworldStateConfig(task="drawer-close-v3", episode_length=8)
    with ChunkVectorEnv(config, 2, 1) as vec:
        try:
            outcome = evaluate(
                PolicyRunner(adapter, config), vec, base_noise, [1, 2], record=[1, 2], progress=False
            )
        except RuntimeError as error:  # a machine without any OpenGL
            pytest.skip(f"cannot render here: {str(error).splitlines()[-1]}")
    assert sorted(outcome.frames) == [1, 2]
    frames = outcome.frames[1]
    assert len(frames) == 1 + outcome.steps[0] // 2
    assert frames[0].shape == (256, 256, 3) and frames[0].dtype == np.uint8 and frames[0].std() > 5
