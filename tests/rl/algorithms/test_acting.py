"""How the algorithms act while they learn: in steered episodes by what is learnt, in others as untrained."""

import pytest
import torch

from tests.helpers.problem import problem
from trimtab.adapters import NoiseSpec
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.policies.residual import EditConfig
from trimtab.rl.algorithms import BestOfNConfig, DSRLNAConfig, DSRLSACConfig, ResidualConfig

B, D, SHAPE = 6, 3, (2, 1)
STEERED = torch.tensor([True, False, True, True, False, False])
SIZE = {"actor": ActorConfig(hidden=16, layers=1), "critic": CriticConfig(hidden=16, layers=1)}
KINDS = {
    "dsrl_sac": DSRLSACConfig(**SIZE),
    "dsrl_na": DSRLNAConfig(num_candidates=4, **SIZE),
    "best_of_n": BestOfNConfig(num_candidates=4, target_candidates=2, **SIZE),
    "edits": BestOfNConfig(num_candidates=4, edit=EditConfig(scale=0.3), **SIZE),
    "residual": ResidualConfig(**SIZE),
}
FIRST_CANDIDATE = ("best_of_n", "edits", "residual")  # what these execute untrained


def denoise(noise):
    return torch.tanh(3.0 * noise)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learnt_acts_in_steered_episodes_alone(kind):
    torch.manual_seed(0)
    config, space = KINDS[kind], FullNoiseConfig().build(NoiseSpec(SHAPE))
    algorithm = config.build(problem(D, space, 2))
    for value in (*algorithm.actor.net.parameters(), *algorithm.critic.net.parameters()):
        value.data = torch.randn_like(value)
    features, prior = torch.randn(B, D), torch.randn(B, algorithm.draws, *SHAPE)
    candidates = None
    if config.candidates:
        candidates = algorithm.propose(features, torch.randn(B, config.candidates, *SHAPE), denoise, True)

    def act(steered):
        torch.manual_seed(1)  # exploration draws the same each time
        return algorithm.act(features, prior, denoise, candidates, steered)

    learnt, untrained, mixed = act(torch.ones_like(STEERED)), act(torch.zeros_like(STEERED)), act(STEERED)
    for choice, rows in ((learnt, STEERED), (untrained, ~STEERED)):
        assert torch.equal(mixed.chunk[rows], choice.chunk[rows])
        assert torch.equal(mixed.u[rows], choice.u[rows])
    assert not torch.equal(learnt.chunk[STEERED], untrained.chunk[STEERED])
    assert not torch.equal(learnt.chunk[~STEERED], untrained.chunk[~STEERED])
    if kind in FIRST_CANDIDATE:
        expected = candidates.chunks[:, 0]
    else:
        expected = config.untrained(space).act(features, prior, denoise).chunk
    assert torch.equal(untrained.chunk, expected)
