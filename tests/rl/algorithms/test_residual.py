"""The residual policy: each loss against a hand-written reference, and a small problem that it must solve."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.helpers.batches import transitions
from tests.helpers.point import PointAdapter, PointConfig
from tests.helpers.problem import problem
from trimtab.adapters import NoiseSpec, UserError
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_samplers import base_noise
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.policies.residual import ResidualActor
from trimtab.recipes.cli import main
from trimtab.rl.algorithms import ResidualConfig
from trimtab.rl.budget import TrainConfig
from trimtab.rl.collector import Collector
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.evaluation import evaluate
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.trainer import Trainer

B, A, D = 6, 4, 3
SMALL = {"actor": ActorConfig(hidden=32, layers=2), "critic": CriticConfig(hidden=32, layers=2, members=3)}


def build(**settings):
    torch.manual_seed(0)
    config = ResidualConfig(**SMALL, **settings)
    space = FullNoiseConfig().build(NoiseSpec((2, 1)))
    return config.build(problem(D, space, A))


def trained(**settings):
    """One whose networks are no longer zero where they start so, and whose targets differ from them."""
    algorithm = build(**settings)
    generator = torch.Generator().manual_seed(2)
    for net in (algorithm.actor.net[-1], algorithm.target_actor.net[-1]):
        for value in net.parameters():
            value.data = torch.randn(value.shape, generator=generator)
    for value in algorithm.target_critic.parameters():
        value.data += 0.3 * torch.randn(value.shape, generator=generator)
    return algorithm


def batch():
    return transitions(D, A, 1)


def by_hand(actor, features, base, scale):
    """The correction of one state, layer by layer."""
    x = torch.cat([features, base])
    first, second, last = (layer for layer in actor.net if isinstance(layer, torch.nn.Linear))
    x = torch.relu(first.weight @ x + first.bias)
    x = torch.relu(second.weight @ x + second.bias)
    limit = np.arctanh(0.98)
    return scale * torch.tanh((last.weight @ x + last.bias).clamp(-limit, limit))


def test_td_target():
    algorithm, data = trained(scale=0.3, target_noise=0.6, target_clip=0.5), batch()
    eps = torch.randn(B, A, generator=torch.Generator().manual_seed(3))
    found = algorithm.td_target(data, eps)
    clipped = 0
    for row in range(B):
        features, base = data["next_features"][row], data["next_candidates"][row, 0]
        correction = by_hand(algorithm.target_actor, features, base, 0.3).detach().numpy()
        noise = 0.3 * np.clip(0.6 * eps[row].numpy(), -0.5, 0.5)
        clipped += int((np.abs(correction + noise) > 0.3).sum())
        chunk = base.numpy() + np.clip(correction + noise, -0.3, 0.3)
        value = algorithm.target_critic(features[None], torch.as_tensor(chunk)[None]).min().item()
        expected = float(data["reward"][row]) + float(data["discount"][row]) * value
        assert found[row].item() == pytest.approx(max(-20.0, min(0.0, expected)), abs=1e-5)
    assert clipped > 0


def test_critic_loss():
    algorithm, data = build(), batch()
    target = torch.arange(B, dtype=torch.float32)
    loss, values = algorithm.critic_loss(data, target)
    expected = sum(
        (algorithm.critic(data["features"][row][None], data["chunk"][row][None])[e, 0] - target[row]) ** 2 / B
        for row in range(B)
        for e in range(3)
    )
    assert values.shape == (3, B) and loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_actor_loss_and_whom_it_reaches():
    algorithm, data = trained(scale=0.3, penalty=0.7), batch()
    loss, correction = algorithm.actor_loss(data)
    expected = 0.0
    for row in range(B):
        features, base = data["features"][row], data["candidates"][row, 0]
        found = by_hand(algorithm.actor, features, base, 0.3)
        assert torch.allclose(found, correction[row], atol=1e-6)
        value = algorithm.critic(features[None], (base + found)[None]).mean()
        expected += (0.7 * (found / 0.3).square().mean() - value).item() / B
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in algorithm.actor.net.parameters())
    assert all(p.grad is None for p in algorithm.critic.parameters())


def test_targets_follow_slowly():
    algorithm = trained(tau=0.1, actor_every=1)
    before = {name: value.clone() for name, value in algorithm.state_dict().items()}
    algorithm.update(batch())
    after = algorithm.state_dict()
    for part in ("critic", "actor"):
        names = [name for name in before if name.startswith(f"{part}.net")]
        assert names and not any(torch.equal(after[name], before[name]) for name in names)
        for name in names:
            old = before[f"target_{name}"]
            assert torch.allclose(after[f"target_{name}"], old + 0.1 * (after[name] - old), atol=1e-6), name


def test_it_begins_as_the_base_and_stays_within_its_scale():
    actor = ResidualActor(D, A, 0.25, ActorConfig(hidden=16, layers=2))
    observations, chunks = torch.randn(5, D), torch.randn(5, 2, 2)
    assert torch.equal(actor.correct(observations, chunks), chunks)
    moved = actor.correct(observations, chunks, noise=10.0) - chunks
    assert moved.abs().max() <= 0.25 + 1e-6 and (moved.abs() > 0.2).any()


def test_the_collector_executes_the_corrected_chunk_and_keeps_both():
    adapter, config = PointAdapter(), PointConfig()
    space = FullNoiseConfig(bound=0.1).build(adapter.noise_spec)  # has no say in what the base draws
    with ChunkVectorEnv(config, 3, 0) as vec:
        rl = ResidualConfig(gamma=0.95, n_step=1)
        collector = Collector(PolicyRunner(adapter, config), vec, rl, "sparse", 7)
        algorithm = rl.build(problem(2, space, 2))
        algorithm.actor.correct = lambda features, chunks, noise: chunks * 0.0 + 1.0
        collector.start(algorithm)
        seen = []
        for _ in range(4):
            before = collector.rollout.features.clone()
            collector.begin()
            transitions, episodes = collector.finish()
            seen.append((before, transitions, {episode.seed for episode in episodes}))
    largest = 0.0
    for before, transitions, ended in seen:
        for i, transition in enumerate(transitions):
            assert np.allclose(transition.extra["chunk"], 1.0)
            base = transition.extra["candidates"].reshape(-1)
            largest = max(largest, float(np.abs(base).max()))
            if not ended:  # the point moved as the corrected chunk says, 0.15 per step
                assert transition.next_features[0] - before[i, 0].item() == pytest.approx(0.3, abs=1e-5)
    assert largest > 0.15  # noise within a bound of 0.1 could not have made it
    (_, first, ended), (_, second, _) = seen[0], seen[1]
    assert not ended
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.extra["next_candidates"], other.extra["candidates"])


def test_an_untrained_correction_leaves_evaluation_alone():
    adapter, config, algorithm = PointAdapter(), PointConfig(), ResidualConfig(**SMALL)
    learner = algorithm.build(problem(2, FullNoiseConfig().build(adapter.noise_spec), 2, None))
    with ChunkVectorEnv(config, 4, 0) as vec:
        plain = evaluate(PolicyRunner(adapter, config), vec, base_noise, range(20), progress=False)
        runner = PolicyRunner(adapter, config)
        corrected = evaluate(runner, vec, learner.deployed_policy(), range(20), progress=False)
    assert np.array_equal(plain.successes, corrected.successes)
    assert np.array_equal(plain.steps, corrected.steps)


def test_solves_the_point():
    adapter, config, lines = PointAdapter(), PointConfig(limit=35), []
    sizes = {"actor": ActorConfig(hidden=64, layers=2), "critic": CriticConfig(hidden=64, layers=2)}
    rl = ResidualConfig(scale=1.0, gamma=0.95, batch_size=64, exploration=0.3, **sizes)
    budget = TrainConfig(env_steps=2500, warmup_transitions=300, first_update=100, updates_per_transition=1.0)
    with ChunkVectorEnv(config, 8, 0) as vec:
        runner = PolicyRunner(adapter, config)
        trainer = Trainer(
            runner, vec, Accelerator(cpu=True), budget, rl, FullNoiseConfig(), 0, lines.append, False
        )
        algorithm = trainer.run()
        base = evaluate(runner, vec, base_noise, range(1000, 1100), progress=False)
        steered = evaluate(runner, vec, algorithm.deployed_policy(), range(1000, 1100), progress=False)
    assert 0.2 < base.success_rate < 0.5 and steered.success_rate > 0.95
    assert lines[-1]["correction_rms"] > 0.1 and lines[-1]["calibration_correlation"] > 0.5


def test_adapt_runs_it_and_export_refuses_it(tiny_base, tmp_path, capsys):
    output = tmp_path / "run"
    argv = ["adapt", f"--policy.path={tiny_base}", "--policy.device=cpu", "--env.type=metaworld_state"]
    argv += [
        "--env.task=drawer-close",
        "--env.episode_length=40",
        "--num_envs=4",
        "--machine.workers=0",
        "--machine.threads=1",
    ]
    argv += ["--rl.type=residual", "--rl.batch_size=16", "--train.env_steps=400", "--train.first_update=16"]
    argv += ["--train.warmup_transitions=16", "--eval.n_episodes=4", "--eval.constant_candidates=0"]
    assert main([*argv, "--eval.videos=0", f"--output_dir={output}"]) == 0
    results = json.loads((output / "results.json").read_text())
    assert results["policies"]["steered"]["episodes"] == 4 and results["updates"] > 0
    assert results["untrained_actor"] == results["policies"]["base"]
    weights = load_file(output / "residual" / "residual.safetensors")
    assert weights["net.0.weight"].abs().sum() > 0 and not (output / "artefact").exists()
    capsys.readouterr()
    assert main(["export", f"--run={output}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and "--run:" in lines[0] and "is a residual policy" in lines[0]
    warm = [*argv, "--train.warm_start=nowhere", f"--output_dir={tmp_path / 'warm'}"]
    assert main(warm) == 2 and "--train.warm_start: a residual policy" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["scale", "tau", "learning_rate"])
def test_bad_settings(field):
    with pytest.raises(UserError, match=f"--rl.{field}: must be positive"):
        ResidualConfig(**{field: 0.0})
    with pytest.raises(UserError, match=r"--rl\.exploration: cannot be negative"):
        ResidualConfig(exploration=-0.1)
