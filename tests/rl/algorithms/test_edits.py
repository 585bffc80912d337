"""Edits of best-of-N: by hand, within their bounds, absent unless asked for, and good where no noise is."""

import math

import pytest
import torch

from tests.helpers.batches import transitions
from tests.helpers.problem import problem
from trimtab.adapters import NoiseSpec, UserError
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.policies.residual import EditConfig
from trimtab.rl.algorithms import BestOfNConfig

B, K, A, D, SCALE = 6, 5, 4, 3, 0.3
SMALL = {"actor": ActorConfig(hidden=32, layers=2), "critic": CriticConfig(hidden=32, layers=2, members=3)}
ALL = torch.ones(B, dtype=torch.bool)


def build(scale=SCALE, penalty=0.01, **settings):
    """One whose edits are no longer zero, and whose target critic is no copy of the critic."""
    torch.manual_seed(0)
    edit = EditConfig(scale=scale, exploration=0.2, penalty=penalty)
    config = BestOfNConfig(num_candidates=K, target_candidates=3, edit=edit, **SMALL, **settings)
    algorithm = config.build(problem(D, FullNoiseConfig().build(NoiseSpec((2, 1))), A))
    generator = torch.Generator().manual_seed(2)
    for value in algorithm.target_critic.parameters():
        value.data += 0.3 * torch.randn(value.shape, generator=generator)
    for value in algorithm.edit.net[-1].parameters() if scale else ():
        value.data = 0.3 * torch.randn(value.shape, generator=generator)
    return algorithm


def batch():
    return transitions(D, A, K)


INDEX = torch.tensor([[0, 2, 4]] * B)


def delta(algorithm, features, chunk):
    """The change of one chunk, layer by layer."""
    x = torch.cat([features, chunk])
    first, second, last = (layer for layer in algorithm.edit.net if isinstance(layer, torch.nn.Linear))
    x = torch.relu(first.weight @ x + first.bias)
    x = torch.relu(second.weight @ x + second.bias)
    limit = math.atanh(0.98)
    return SCALE * torch.tanh((last.weight @ x + last.bias).clamp(-limit, limit))


@pytest.mark.parametrize("kind", ["max", "sarsa", "softmax"])
def test_the_target_looks_at_candidates_and_their_edits(kind):
    algorithm, data, edited_won = build(target=kind, target_members=3), batch(), 0
    found = algorithm.td_target(data, INDEX)
    for row in range(B):
        features, values = data["next_features"][row], []
        chunks = [data["next_candidates"][row, k] for k in INDEX[row]]
        for chunk in chunks + [chunk + delta(algorithm, features, chunk) for chunk in chunks]:
            values.append(algorithm.target_critic(features[None], chunk[None]).min().item())
        weights = torch.softmax(torch.tensor(values) / 0.3, 0)
        value = {
            "max": max(values),
            "sarsa": values[0],
            "softmax": float((weights * torch.tensor(values)).sum()),
        }
        edited_won += values.index(max(values)) > 2
        expected = float(data["reward"][row]) + float(data["discount"][row]) * value[kind]
        assert found[row].item() == pytest.approx(max(-20.0, min(0.0, expected)), abs=1e-4)
    assert 0 < edited_won < B


def test_the_loss_of_edits_and_whom_it_reaches():
    algorithm, data = build(penalty=0.7), batch()
    loss, change = algorithm.edit_loss(data, INDEX)
    expected = 0.0
    for row in range(B):
        for place, k in enumerate(INDEX[row]):
            features, chunk = data["features"][row], data["candidates"][row, k]
            moved = delta(algorithm, features, chunk)
            assert torch.allclose(change[row, place], moved, atol=1e-6)
            value = algorithm.critic(features[None], (chunk + moved)[None]).mean()
            expected += (0.35 * (moved / SCALE).square().sum() - value).item() / (3 * B)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in algorithm.edit.parameters())
    others = (algorithm.critic, algorithm.noise_critic, algorithm.target_critic, algorithm.actor)
    assert all(parameter.grad is None for part in others for parameter in part.parameters())


@pytest.mark.parametrize("distillation", ["critic", "regression"])
def test_a_noise_is_worth_what_is_executed_for_it(distillation):
    """The noise critic, or the regression's weights, learn from the value of the edited chunk."""
    algorithm, data = build(distillation=distillation), batch()
    everything = torch.arange(K).expand(B, K)
    loss = (
        algorithm.distillation_loss
        if distillation == "critic"
        else lambda data, _: algorithm.regression_loss(data)[0]
    )
    found = loss(data, everything)
    moved = torch.stack(
        [
            torch.stack([c + delta(algorithm, f, c) for c in row])
            for f, row in zip(data["features"], data["candidates"])
        ]
    )
    plain, algorithm.edit = algorithm.edit, None
    assert found.item() == pytest.approx(
        loss(data | {"candidates": moved.detach()}, everything).item(), rel=1e-6
    )
    assert found.item() != pytest.approx(loss(data, everything).item(), rel=1e-5)
    algorithm.edit = plain
    found.backward()
    assert all(parameter.grad is None for parameter in plain.parameters())


def denoise(noise):
    return torch.cat([noise, noise.square()], 3).flatten(2).unflatten(2, (2, 2))


def test_it_acts_by_the_best_of_candidates_and_their_edits():
    """Edited ones with exploration noise, none beyond the bounds; the base's own where it does not steer."""
    algorithm = build()
    features, steered = torch.randn(B, D), torch.tensor([True, True, False, True, True, True])
    candidates = algorithm.propose(features, torch.randn(B, K, 2, 1), denoise, True)
    edited, algorithm.config.edit.exploration = 0, 3.0
    for _ in range(20):
        choice = algorithm.act(features, None, denoise, candidates, steered)
        for row in range(B):
            (k,) = (k for k in range(K) if torch.equal(candidates.u[row, k], choice.u[row]))
            change = (choice.chunk[row] - candidates.chunks[row, k]).abs().max()
            assert change <= SCALE + 1e-6
            edited += bool(change > 0)
            if not steered[row]:
                assert k == 0 and change == 0
    assert 20 < edited <= 100
    algorithm.config.edit.exploration = 0.2
    torch.manual_seed(3)
    values, seen = {}, algorithm.select
    algorithm.select = lambda features, chunks: values.setdefault(
        "index", seen(features, values.setdefault("chunks", chunks))
    )
    algorithm.act(features, None, denoise, candidates, steered)
    chunks = values["chunks"]
    assert chunks.shape == (B, 2 * K, 2, 2) and torch.equal(chunks[:, :K], candidates.chunks)
    best = algorithm.critic(
        features.unsqueeze(1).expand(-1, 2 * K, -1).flatten(0, 1), chunks.flatten(2).flatten(0, 1)
    )
    assert torch.equal(values["index"], best.mean(0).view(B, -1).argmax(1))
    exact = algorithm.edited(features, candidates.chunks.flatten(2)).view_as(candidates.chunks)
    noise = chunks[:, K:] - exact
    assert 0.1 * SCALE < noise.std() < 0.25 * SCALE


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_deployed_is_noise_denoise_edit(count):
    algorithm = build(deployed_candidates=count)
    features, prior = torch.randn(B, D), torch.randn(B, count, 2, 1)
    choice = algorithm.deployed_policy().act(features, prior, denoise)
    edit, algorithm.edit = algorithm.edit, None
    plain = algorithm.deployed_policy().act(features, prior, denoise)
    algorithm.edit = edit
    if count == 1:
        expected = plain.chunk.flatten(1)
        expected = torch.stack([c + delta(algorithm, f, c) for f, c in zip(features, expected)])
        assert torch.allclose(choice.chunk.flatten(1), expected, atol=1e-6)
        assert torch.equal(choice.u, plain.u)
    value = [algorithm.critic(features, one.chunk.flatten(1)).mean(0) for one in (plain, choice)]
    assert count == 1 or ((value[1] >= value[0]).all() and (value[1] > value[0]).any())
    acting = algorithm.policies()["acting"]
    one, other = (acting.act(features, torch.ones(B, K, 2, 1), denoise).chunk for _ in range(2))
    assert torch.equal(one, other), "no exploration noise in an evaluation"
    both, off = (build(scale, deployed_candidates=count).trained_parameters() for scale in (SCALE, 0.0))
    size = sum(parameter.numel() for parameter in edit.parameters())
    assert all(both[name] == off[name] + size for name in ("actor", "acting"))


def test_without_edits_there_is_nothing_of_them():
    """And with them all else begins as it does without, and draws what it draws without."""
    off, on = build(0.0), build()
    assert off.edit is None and not any("edit" in name for name in [*off.state_dict(), *vars(off)][:-1])
    for name, value in off.state_dict().items():
        assert torch.equal(value, on.state_dict()[name])
    states = []
    for algorithm in (off, on):
        torch.manual_seed(7)
        metrics = algorithm.update(batch())
        states.append(torch.get_rng_state())
        assert ("edit_loss" in metrics) == (algorithm is on)
    assert torch.equal(*states)


@pytest.mark.parametrize("name", ["scale", "exploration", "penalty"])
def test_bad_settings(name):
    with pytest.raises(UserError, match=rf"--rl\.edit\.{name}: cannot be negative"):
        EditConfig(**{name: -0.1})


def test_edits_solve_what_no_noise_does():
    """Chunks have to come near a place that the observation tells, and the base makes none that does."""
    torch.manual_seed(0)
    edit = EditConfig(scale=1.0, exploration=0.5, penalty=0.01)
    rl = BestOfNConfig(num_candidates=4, batch_size=64, distilled_pairs=2, edit=edit, **SMALL)
    algorithm = rl.build(problem(D, FullNoiseConfig().build(NoiseSpec((2, 1))), 2, (-2.0, 0.0)))

    def base(noise):
        return 0.3 * torch.tanh(noise)

    def distance(features, chunk):
        return (chunk[..., 0] - 0.8 * features[:, :2]).abs().amax(-1)

    def look(rows):
        features = torch.randn(rows, D).sign()
        return features, algorithm.propose(features, torch.randn(rows, 4, 2, 1), base, True)

    for _ in range(250):
        features, candidates = look(64)
        choice = algorithm.act(features, None, base, candidates, torch.ones(64, dtype=torch.bool))
        pairs = {"candidates": candidates.chunks.flatten(2), "candidates_u": candidates.u}
        data = {
            "features": features,
            "next_features": features,
            "chunk": choice.chunk.flatten(1),
            "u": choice.u,
        }
        data |= {**pairs, "next_candidates": pairs["candidates"], "discount": torch.zeros(64)}
        algorithm.update(data | {"reward": -distance(features, choice.chunk).clamp_max(2.0)})
    features, candidates = look(200)
    assert distance(features.repeat_interleave(4, 0), candidates.chunks.flatten(0, 1)).min() > 0.45
    for name, policy in algorithm.policies().items():
        chunk = policy.act(features, torch.randn(200, policy.draws, 2, 1), base).chunk
        assert (distance(features, chunk) < 0.3).float().mean() > 0.9, name
