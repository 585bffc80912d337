"""Best-of-N as the acting policy."""

import numpy as np
import torch

from trimtab.adapters import NoiseSpec, PolicyConfig, load_adapter
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.noise_samplers import candidate_noise, prior_noise, proposed_noise
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.rl.envs.metaworld import MetaworldStateConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.evaluation import evaluate
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.selection import SelectingRunner


def test_selecting_runner_executes_the_selected_candidate(tiny_base):
    adapter = load_adapter(PolicyConfig(path=str(tiny_base), device="cpu"))
    config = MetaworldStateConfig(task="drawer-close-v3", episode_length=8)
    space = FullNoiseConfig().build(adapter.noise_spec)
    source, asked = candidate_noise(space), []

    def select(features, chunks):
        asked.append((features, chunks))
        return chunks.flatten(2).sum(-1).argmax(1)

    runner = SelectingRunner(adapter, config, select, 5)
    with ChunkVectorEnv(config, 2, 0) as vec:
        observations = vec.reset({0: 7, 1: 8})
        conditioning = runner.encode([observations[0], observations[1]], vec.task_descriptions)
        noise = runner.prior(2, torch.Generator().manual_seed(1))
        assert noise.shape == (2, 5, *adapter.noise_spec.shape)
        actions = runner.decode(conditioning, source(None, noise))
        plain = PolicyRunner(adapter, config)
        best = [
            max(
                (
                    plain.candidates(
                        conditioning, prior_noise(space)(None, noise[row]).expand(2, -1, -1, -1)
                    )[row, k]
                    for k in range(5)
                ),
                key=lambda chunk: float(chunk.sum()),
            )
            for row in range(2)
        ]
        expected = plain.executable(torch.stack(best), conditioning)
        assert np.allclose(actions, expected, atol=1e-5)
        assert asked[0][1].shape[:2] == (2, 5) and torch.equal(asked[0][0], plain.features(conditioning))
        together = evaluate(runner, vec, source, [3, 4, 5], progress=False)
    with ChunkVectorEnv(config, 1, 0) as vec:  # its draws belong to the episode, not to the environment
        alone = evaluate(runner, vec, source, [3, 4, 5], progress=False)
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
    found = candidate_noise(space, actor, deterministic=True, proposed=3)(features, prior)
    assert torch.equal(found[:, 3:], candidate_noise(space)(features, prior)[:, 3:])
    assert torch.allclose(found[:, 0], actor.act(features, prior[:, 0], deterministic=True), atol=1e-6)
    mean, log_std = actor(features)
    for k, scale in ((1, 0.5), (2, 1.0)):
        z = mean + scale * log_std.exp() * prior[:, k].flatten(1)
        assert torch.allclose(found[:, k].flatten(1), space.squash(z), atol=1e-5)
    drawn = proposed_noise(actor, mean=False)(features, prior)
    assert torch.allclose(drawn[:, 0], actor.act(features, prior[:, 0]), atol=1e-6)
    assert (drawn[:, 0] - found[:, 0]).flatten(1).norm(dim=1).min() > 1.0
