"""What `trimtab probe` concludes from its measurements."""

import json

import numpy as np
import pytest
import torch

from trimtab.adapters.steerability import Steerability
from trimtab.recipes.support.diagnosis import as_json, diagnose, percent
from trimtab.rl.evaluation import Evaluation


def measured(**fields):
    values = {
        "finite": True,
        "repeat_difference": 0.0,
        "noise_difference": 1.0,
        "floor": 1e-6,
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


def outcome(successes, total=100, seed=0):
    """``successes`` of ``total`` episodes; which ones is left to chance."""
    hits = np.zeros(total, dtype=bool)
    hits[np.random.default_rng(seed + successes).permutation(total)[:successes]] = True
    return Evaluation(list(range(total)), hits, np.full(total, 10))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"finite": False}, "NaN"),
        ({"repeat_difference": 0.2}, "draws randomness"),
        ({"noise_difference": 5e-7, "authority": 1.0}, "ignores its noise"),
        ({"authority": 0.01}, "hardly worth steering"),
    ],
)
def test_a_policy_that_cannot_be_steered_is_named_so_with_the_cause(fields, said):
    diagnosis = diagnose(measured(**fields), "smolvla")
    assert not diagnosis.steerable and said in diagnosis.headline


def test_fewer_episodes_of_the_other_noises_are_compared_with_the_same_of_the_base():
    base, zero = outcome(40), outcome(0, total=20)
    base.successes[:20], base.successes[20:60] = False, True  # all of its successes lie in the others
    diagnosis = diagnose(measured(), "smolvla", {"base": base, "zero_noise": zero, "repeated_noise": zero})
    assert diagnosis.steerable and "repeated noise costs success" not in "".join(diagnosis.lines)


def test_a_collapsed_act_latent_is_told_to_be_retrained():
    diagnosis = diagnose(measured(noise_difference=0.0), "act")
    assert "kl_weight" in diagnosis.lines[0]


def test_without_an_environment_the_inert_dimensions_are_listed_and_no_noise_space_is_named():
    diagnosis = diagnose(measured(column_effect=torch.tensor([0.3, 0.0])), "pi0")
    assert diagnosis.steerable and diagnosis.noise is None
    assert any("dimensions that change nothing: 1" in line for line in diagnosis.lines)


CASES = {
    "repeat keeps success": ({"base": 50, "repeated_noise": 52, "zero_noise": 45}, 100, True, "repeat"),
    "repeat costs success": ({"base": 58, "repeated_noise": 29, "zero_noise": 45}, 100, True, "full"),
    "repeat loses what there is": ({"base": 5, "repeated_noise": 0, "zero_noise": 2}, 50, True, "full"),
    "too few to tell": ({"base": 5, "repeated_noise": 4, "zero_noise": 5}, 10, True, "full"),
    "zero noise solves it": ({"base": 50, "repeated_noise": 50, "zero_noise": 98}, 100, True, "zero_noise"),
    "repeated noise solves it": (
        {"base": 20, "repeated_noise": 50, "zero_noise": 9},
        50,
        True,
        "repeated_noise",
    ),
    "little to gain": ({"base": 97, "repeated_noise": 97, "zero_noise": 97}, 100, True, None),
    "four of four prove nothing": ({"base": 4, "repeated_noise": 4, "zero_noise": 4}, 4, True, "full"),
    "no rows": ({"base": 50, "zero_noise": 45}, 100, True, "full"),
    "nothing seen": ({"base": 0, "repeated_noise": 0, "zero_noise": 0}, 100, False, None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_noise_space_follows_from_the_success_rates(name):
    rates, total, steerable, noise = CASES[name]
    diagnosis = diagnose(measured(), "diffusion", {key: outcome(n, total) for key, n in rates.items()})
    assert (diagnosis.steerable, diagnosis.noise) == (steerable, noise)
    said = " ".join([diagnosis.headline, *diagnosis.lines])
    if noise in ("repeat", "full"):
        assert (
            f"--noise.type={noise}" in diagnosis.headline
            and f"({rates['base']}/{total})" in diagnosis.headline
        )
    if name in ("repeat loses what there is", "too few to tell"):
        assert "keeps the base's success is open" in said or "costs success" in said
    if name == "nothing seen":
        assert "repeated noise" not in said


def test_successes_of_a_constant_during_its_selection_count_as_seen():
    evaluations = {"base": outcome(0, 10), "zero_noise": outcome(0, 10)}
    constants = [{"successes": 12, "episodes": 20}]
    assert diagnose(measured(), "diffusion", evaluations, constants).steerable


def test_act_whose_success_drops_under_prior_noise_is_told_to_bound_it():
    evaluations = {"base": outcome(40, 50), "prior_noise": outcome(0, 50)}
    diagnosis = diagnose(measured(), "act", evaluations)
    assert diagnosis.noise == "full" and any("--noise.bound" in line for line in diagnosis.lines)


def test_repeat_is_rarely_recommended_where_it_costs():
    """True rates 50 % and 20 %, 50 episodes: the advice may err in a few probes of a hundred."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(300):
        base, repeated = (Evaluation([0] * 50, rng.random(50) < p, np.ones(50)) for p in (0.5, 0.2))
        wrong += diagnose(measured(), "x", {"base": base, "repeated_noise": repeated}).noise == "repeat"
    assert wrong < 15


@pytest.mark.parametrize(
    ("share", "said"),
    [(1.0, "100 %"), (0.9949, "99 %"), (0.36, "36 %"), (0.1, "10 %"), (0.0345, "3.5 %"), (0.0005, "0.05 %"),
     (0.00001, "under 0.01 %"), (0.0, "0 %"), (1.6, "160 %")],
)  # fmt: skip
def test_percent_has_no_powers_of_ten(share, said):
    assert percent(share) == said


def test_a_diagnosis_shows_no_powers_of_ten():
    lines = diagnose(measured(authority=1.0), "x").lines
    assert "the noise makes up 100 % of the spread" in lines[0]
    diagnosis = diagnose(measured(), "x", {"base": outcome(0, 4)})
    assert "(95 %: at most 49 %)" in diagnosis.headline
    assert "e+" not in diagnosis.headline + "".join([*lines, *diagnosis.lines])


def test_the_json_of_a_broken_policy_has_no_nan():
    broken = measured(finite=False, repeat_difference=float("nan"), spread=torch.full((4, 2), float("nan")))
    json.dumps(as_json(broken, diagnose(broken, "x")), allow_nan=False)
