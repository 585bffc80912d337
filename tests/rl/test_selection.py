"""Best-of-N as the acting policy."""

import numpy as np
import torch

from trimtab.adapters import PolicyConfig, load_adapter
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.policies.sources import candidate_noise, prior_noise
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
