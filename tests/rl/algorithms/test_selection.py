"""Best-of-N as the acting policy."""

import numpy as np
import torch

from trimtab.adapters import NoiseSpec, PolicyConfig, load_adapter
from trimtab.policies.acting import BestOfCandidates, draw_candidates
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.noise_samplers import prior_noise
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.rl.envs.metaworld import MetaworldStateConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.evaluation import evaluate
from trimtab.rl.runner import PolicyRunner


def test_the_selected_candidate_is_executed(tiny_base):
    adapter = load_adapter(PolicyConfig(path=str(tiny_base), device="cpu"))
    config = MetaworldStateConfig(task="drawer-close-v3", episode_length=8)
    space, asked = FullNoiseConfig().build(adapter.noise_spec), []

    def select(features, chunks):
        asked.append((features, chunks))
        return chunks.flatten(2).sum(-1).argmax(1)

    runner, policy = PolicyRunner(adapter, config), BestOfCandidates(space, 5, select)
    with ChunkVectorEnv(config, 2, 0) as vec:
        observations = vec.reset({0: 7, 1: 8})
        conditioning = runner.encode([observations[0], observations[1]], vec.task_descriptions)
        features = runner.features(conditioning)
        noise = torch.stack([runner.prior(5, torch.Generator().manual_seed(seed)) for seed in (1, 2)])
        assert noise.shape == (2, 5, *adapter.noise_spec.shape)
        choice, actions = runner.act(policy, conditioning, features, noise)
        for row in range(2):
            drawn = prior_noise(space)(None, noise[row])
            chunks = [adapter.denoise(conditioning[row], one.unsqueeze(0))[0] for one in drawn]
            best = max(range(5), key=lambda k, chunks=chunks: float(chunks[k].sum()))
            assert torch.allclose(choice.chunk[row], chunks[best], atol=1e-5)
            assert torch.allclose(choice.u[row], drawn[best].flatten(), atol=1e-6)
        expected = runner.executable(choice.chunk, conditioning)
        assert np.allclose(actions, expected, atol=1e-5)
        assert asked[0][1].shape[:2] == (2, 5) and torch.equal(asked[0][0], features)
        together = evaluate(runner, vec, policy, [3, 4, 5], progress=False)
    with ChunkVectorEnv(config, 1, 0) as vec:  # its draws belong to the episode, not to the environment
        alone = evaluate(runner, vec, policy, [3, 4, 5], progress=False)
    assert np.array_equal(together.steps, alone.steps)
    assert np.array_equal(together.successes, alone.successes)


def test_candidates_hold_the_actors_mean_what_lies_around_it_and_the_priors():
    """The mean, which is deployed, is far from any draw in many dimensions: it has to be among them."""
    spec = NoiseSpec((4, 3))
    space = FullNoiseConfig().build(spec)
    torch.manual_seed(0)
    actor = NoiseActor(3, space, ActorConfig(hidden=16, layers=1))
    torch.nn.init.normal_(actor.net[-1].weight)
    features, prior = torch.randn(4, 3), torch.randn(4, 5, *spec.shape)

    def drawn(proposed, mean=True):
        return draw_candidates(space, prior, lambda noise: noise, features, actor, proposed, mean)

    found = drawn(3)
    assert torch.equal(found.chunks.flatten(2), found.u)
    assert torch.equal(found.u[:, :2], drawn(0).u[:, :2])
    assert torch.allclose(found.u[:, 2], actor.choose(features, prior[:, 2], deterministic=True), atol=1e-6)
    mean, log_std = actor(features)
    for k, scale in ((3, 0.5), (4, 1.0)):
        z = mean + scale * log_std.exp() * prior[:, k].flatten(1)
        assert torch.allclose(found.u[:, k], space.squash(z), atol=1e-5)
    plain = drawn(3, mean=False)
    assert torch.allclose(plain.u[:, 2], actor.choose(features, prior[:, 2]), atol=1e-6)
    assert (plain.u[:, 2] - found.u[:, 2]).norm(dim=1).min() > 1.0
