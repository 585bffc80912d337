"""From measurements to words."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trimtab.adapters.steerability import Steerability
from trimtab.recipes.verdict import judge, reached_by_any
from trimtab.rl.evaluation import Evaluation


def measured(**fields):
    values = {
        "finite": True,
        "repeat_difference": 0.0,
        "noise_difference": 1.0,
        "spread": torch.ones(4, 2),
        "authority": 0.4,
        "column_effect": torch.tensor([0.3, 0.2]),
        "row_effect": torch.ones(2, 4),
        "row_blocks": [0, 1, 2],
        "declared_inert": 0,
        "inert_difference": 0.0,
        "observations": 2,
        "noises": 4,
    }
    return Steerability(**{**values, **fields})


def outcome(successes, total=100, offset=0):
    hits = np.zeros(total, dtype=bool)
    hits[(np.arange(successes) + offset) % total] = True
    return Evaluation(list(range(total)), hits, np.full(total, 10))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"finite": False}, "NaN"),
        ({"repeat_difference": 0.2}, "draws randomness"),
        ({"noise_difference": 0.0, "authority": 0.0}, "ignores its noise"),
        ({"authority": 0.01}, "hardly worth steering"),
    ],
)
def test_what_cannot_be_steered(fields, said):
    verdict = judge(measured(**fields), "smolvla")
    assert not verdict.steerable and said in verdict.headline


def test_a_collapsed_latent_gets_its_own_hint():
    verdict = judge(measured(noise_difference=0.0), "act")
    assert "kl_weight" in verdict.lines[0]


def test_without_an_environment():
    verdict = judge(measured(column_effect=torch.tensor([0.3, 0.0])), "pi0")
    assert verdict.steerable and verdict.noise is None
    assert any("dimensions that change nothing: 1" in line for line in verdict.lines)


CASES = {
    "repeat keeps success": ({"base": 50, "repeated_noise": 48, "zero_noise": 45}, True, "repeat"),
    "repeat costs success": ({"base": 58, "repeated_noise": 29, "zero_noise": 45}, True, "full"),
    "zero noise solves it": ({"base": 50, "repeated_noise": 50, "zero_noise": 98}, True, "constant"),
    "little to gain": ({"base": 97, "repeated_noise": 97, "zero_noise": 97}, True, None),
    "no rows": ({"base": 50, "zero_noise": 45}, True, "full"),
    "nothing to learn from": ({"base": 0, "repeated_noise": 0, "zero_noise": 0}, False, None),
}


@pytest.mark.parametrize("name", CASES)
def test_with_success_rates(name):
    rates, steerable, noise = CASES[name]
    verdict = judge(measured(), "diffusion", {key: outcome(n) for key, n in rates.items()})
    assert (verdict.steerable, verdict.noise) == (steerable, noise)
    if noise in ("repeat", "full"):
        assert f"--noise.type={noise}" in verdict.headline and f"{rates['base']} % [" in verdict.headline


def test_starts_reached_by_any_noise():
    evaluations = {"base": outcome(30), "zero_noise": outcome(30, offset=20)}
    assert reached_by_any(evaluations) == 0.5
    assert reached_by_any({"base": SimpleNamespace(successes=np.array([True, False]))}) == 0.5
