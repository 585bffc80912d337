"""The actor learns from the noises of what people did: the loss by hand, and nothing where it is off."""

import math

import pytest
import torch

from tests.helpers.problem import problem
from trimtab.adapters import NoiseSpec, UserError
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.rl.algorithms import BestOfNConfig, DSRLNAConfig
from trimtab.rl.algorithms.acting import RunRequest

B, K, A, D = 8, 4, 4, 3
KINDS = {
    "best_of_n": (BestOfNConfig, {}),
    "best_of_n regression": (BestOfNConfig, {"distillation": "regression"}),
    "dsrl_na": (DSRLNAConfig, {}),
    "dsrl_na entropy": (DSRLNAConfig, {"regularizer": "entropy"}),
}


@pytest.fixture(params=KINDS)
def make(request):
    config, settings = KINDS[request.param]

    def build(weight):
        torch.manual_seed(0)
        small = {"actor": ActorConfig(hidden=16, layers=2), "critic": CriticConfig(hidden=16, layers=2)}
        rl = config(num_candidates=K, imitation_weight=weight, **small, **settings)
        return rl.build(problem(D, FullNoiseConfig().build(NoiseSpec((2, 1))), A))

    return build


def batch(*marked):
    generator = torch.Generator().manual_seed(1)
    shapes = {"features": (D,), "next_features": (D,), "chunk": (A,), "reward": (), "u": (2,)}
    shapes |= {f"{before}candidates": (K, A) for before in ("", "next_")}
    shapes |= {f"{before}candidates_u": (K, 2) for before in ("", "next_")}
    found = {name: torch.randn(B, *shape, generator=generator) for name, shape in shapes.items()}
    found |= {"discount": torch.full((B,), 0.9), "imitated": torch.zeros(B, 1)}
    found["u"][0] = torch.nan  # of a demonstration
    found["imitated"][list(marked)] = 1.0
    return found


def test_the_loss_by_hand(make):
    """z = bound * atanh(u / bound) is normal; the squash takes log(1 - (u / bound)^2) from its density."""
    algorithm, data = make(0.5), batch(2, 5)
    torch.nn.init.normal_(algorithm.actor.net[-1].weight, std=0.3)
    expected = 0.0
    for row in (2, 5):
        mean, log_std = (value[0].tolist() for value in algorithm.actor(data["features"][row : row + 1]))
        for u, middle, width in zip(data["u"][row].tolist(), mean, map(math.exp, log_std), strict=True):
            z = 2.0 * math.atanh(u / 2.0)
            expected += 0.5 * ((z - middle) / width) ** 2 + math.log(width * math.sqrt(2 * math.pi))
            expected += math.log(1 - (u / 2.0) ** 2)
    assert float(algorithm.imitation_loss(data)) == pytest.approx(0.5 * expected / 2, rel=1e-4)


def learnt(algorithm, data, updates=4):
    torch.manual_seed(1)
    for _ in range(updates):
        algorithm.update(data)
    return algorithm.state_dict()


def test_without_a_weight_or_without_marks_nothing_is_different(make):
    data = batch()
    plain = learnt(make(0.0), {name: value for name, value in data.items() if name != "imitated"})
    weighted = learnt(make(0.5), data)
    assert all(torch.equal(plain[name], weighted[name]) for name in plain)
    imitating = learnt(make(0.5), batch(2, 5))
    assert any(
        not torch.equal(plain[name], imitating[name]) for name in plain if name.startswith("actor.net")
    )
    critics = [name for name in plain if name.startswith("critic")]
    assert critics and all(torch.isfinite(imitating[name]).all() for name in imitating)
    assert "imitated" not in make(0.0).config.replayed and "imitated" in make(0.5).config.replayed


def test_the_actor_comes_to_what_a_person_did(make):
    algorithm, data = make(20.0), batch(*range(1, B))
    data["u"][1:] = torch.tensor([0.9, -0.6])
    learnt(algorithm, data, 400)
    mean = algorithm.space.squash(algorithm.actor(data["features"])[0])
    assert (mean - torch.tensor([0.9, -0.6])).abs().max() < 0.3


@pytest.mark.parametrize("config", [BestOfNConfig, DSRLNAConfig])
def test_a_policy_that_tells_no_noise_is_refused(config):
    space = FullNoiseConfig().build(NoiseSpec((2, 1)))
    config().check(space, RunRequest(inverts=False))
    config(imitation_weight=0.1).check(space, RunRequest(inverts=True))
    with pytest.raises(UserError, match=r"--rl\.imitation_weight: this policy's chunks cannot be turned"):
        config(imitation_weight=0.1).check(space, RunRequest(inverts=False))
    with pytest.raises(UserError, match=r"--rl\.imitation_weight"):
        config(imitation_weight=-0.1)
