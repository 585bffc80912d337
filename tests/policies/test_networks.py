"""Ensembles by batched matmul equal their members one by one."""

import pytest
import torch
from torch import nn

from tests.helpers.ensemble import member
from trimtab.adapters import UserError
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig, CriticEnsemble
from trimtab.policies.networks import EnsembleMLP, FeatureNormalizer, Head, mlp


@pytest.mark.parametrize("actions", [None, 1, 6], ids=["one", "one_of_many", "many"])
@pytest.mark.parametrize("activation, layer_norm", [("relu", True), ("relu", False), ("tanh", True)])
def test_an_ensemble_is_its_members_in_values_and_gradients(actions, activation, layer_norm):
    torch.manual_seed(0)
    net = EnsembleMLP(3, 7, 16, 3, layer_norm, activation).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    shape = (5, 3) if actions is None else (5, actions, 3)
    u = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    values, weight = net(x, u), torch.randn(3, *shape[:-1]).double()
    assert values.shape == weight.shape
    found = torch.autograd.grad((values * weight).sum(), [x, u, net.weights[0], net.weights[2]])
    states = x.repeat_interleave(actions or 1, 0)
    activate = nn.ReLU if activation == "relu" else nn.Tanh
    members = [member(net, index, layer_norm, activate) for index in range(3)]
    expected = torch.stack([one(torch.cat([states, u.flatten(0, -2)], 1)) for one in members])
    expected = expected.view(weight.shape)
    assert torch.allclose(values, expected, atol=1e-12)
    gradients = torch.autograd.grad((expected * weight).sum(), [x, u], retain_graph=True)
    layers = [[layer for layer in one if isinstance(layer, nn.Linear)] for one in members]
    for index in (0, 2):
        parts = [layer[index].weight for layer in layers]
        parts = torch.autograd.grad((expected * weight).sum(), parts, retain_graph=True)
        gradients += (torch.stack([part.T for part in parts]),)
    for one, other in zip(found, gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


def test_some_members_alone_give_what_they_give_among_all():
    torch.manual_seed(0)
    critic = CriticEnsemble(4, 3, CriticConfig(members=5, hidden=16, layers=2), (-20.0, 0.0))
    features, one, several = torch.randn(6, 4), torch.randn(6, 3), torch.randn(6, 2, 3)
    chosen = torch.tensor([4, 1])
    for u in (one, several):
        everyone = critic.net(features, u)
        assert torch.allclose(critic.net(features, u, chosen), everyone[chosen], atol=1e-6)
        assert torch.equal(critic.smallest(features, u, 5), critic(features, u).min(0).values)


def test_dropout_is_drawn_for_each_input_unit_and_member():
    """One hidden layer: mean and variance over many inputs that are alike, by hand."""
    torch.manual_seed(0)
    net, share, rows = EnsembleMLP(2, 5, 32, 1, True, "relu").double(), 0.25, 20_000
    x, u = torch.randn(1, 3).double(), torch.randn(1, 2).double()
    with torch.no_grad():
        found = net(x.expand(rows, -1), u.expand(rows, -1), dropout=share)
        for index, plain in enumerate(net(x, u)[:, 0]):
            hidden = member(net, index)[:-1](torch.cat([x, u], 1))[0]
            terms = hidden * net.weights[1][index, :, 0]
            deviation = (share / (1 - share) * terms.square().sum()).sqrt()
            assert deviation > 0.02 and abs(found[index].mean() - plain) < 4 * deviation / rows**0.5
            assert abs(found[index].std() / deviation - 1.0) < 0.03
    centred = found - found.mean(1, keepdim=True)
    together = (centred[0] * centred[1]).mean() / (centred[0].std() * centred[1].std())
    assert abs(together) < 4 / rows**0.5, "each member drops its own"


def test_a_critic_drops_units_in_its_loss_alone():
    torch.manual_seed(0)
    size = CriticConfig(members=2, hidden=32, layers=2, dropout=0.5)
    critic, plain = CriticEnsemble(4, 3, size, (-20.0, 0.0)), CriticConfig(members=2, hidden=32, layers=2)
    same = CriticEnsemble(4, 3, plain, (-20.0, 0.0))
    same.load_state_dict(critic.state_dict())
    features, u, target = torch.randn(6, 4), torch.randn(6, 3), -10 * torch.rand(6)
    assert torch.equal(critic(features, u), same(features, u))
    assert torch.equal(critic.smallest(features, u, 2), same.smallest(features, u, 2))
    first, second = (critic.regress(features, u, target) for _ in range(2))
    assert first[0] != second[0] and not torch.equal(first[1], same(features, u))
    for share in (-0.1, 1.0):
        with pytest.raises(UserError, match="dropout: is a share"):
            CriticConfig(dropout=share)


def test_under_autocast_the_last_layer_stays_in_float32_and_weights_are_read_anew():
    torch.manual_seed(0)
    net, x, u = EnsembleMLP(2, 6, 64, 3, True, "relu"), torch.randn(50, 4), torch.randn(50, 2)
    exact = net(x, u)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        rough = net(x, u)
        found = torch.autograd.grad(rough.sum(), list(net.parameters()))
        head = mlp(4, 2, 8, 1)(x)
        with torch.no_grad():
            net.weights[1].mul_(-1.0)
        moved = net(x, u)
    for out in (rough, head):
        assert out.dtype == torch.float32 and not torch.equal(out, out.bfloat16().float())
    assert not torch.equal(rough, exact) and (rough - exact).norm() < 0.02 * exact.norm()
    assert (moved - moved.mean()).sub(rough - rough.mean()).norm() > 0.1 * rough.std()
    with torch.no_grad():
        net.weights[1].mul_(-1.0)
    expected = torch.autograd.grad(net(x, u).sum(), list(net.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and (one - other).norm() < 0.05 * other.norm()


def test_members_start_different():
    critic = CriticEnsemble(4, 3, CriticConfig(members=4, hidden=8, layers=1))
    values = critic(torch.randn(5, 4), torch.randn(5, 3))
    assert values.shape == (4, 5)
    assert values.std(0).min() > 0


def test_normalizer_standardises_and_does_not_blow_up_constants():
    features = torch.randn(500, 3) * torch.tensor([5.0, 0.1, 0.0]) + torch.tensor([1.0, 2.0, 3.0])
    normalizer = FeatureNormalizer(3)
    assert torch.equal(normalizer(features), features.clamp(-10, 10))
    normalizer.fit(features)
    out = normalizer(features)
    assert torch.allclose(out.mean(0), torch.zeros(3), atol=1e-4)
    assert torch.allclose(out.std(0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-2)
    surprise = normalizer(torch.tensor([[1.0, 2.0, 3.001]]))
    assert surprise[0, 2].abs() < 0.2
    assert normalizer(torch.full((1, 3), 1e9)).max() == 10


def test_plain_networks():
    torch.manual_seed(0)
    x = torch.randn(7, 5)
    first, norm, activation, *_ = modules = list(mlp(5, 3, 8, 2, "tanh", layer_norm=True))
    assert [type(m) for m in modules] == [nn.Linear, nn.LayerNorm, nn.Tanh] * 2 + [Head]
    h = first(x)
    scaled = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    assert torch.allclose(activation(norm(h)), torch.tanh(scaled), atol=1e-6)
    assert [type(m) for m in mlp(5, 3, 8, 1)] == [nn.Linear, nn.ReLU, Head]
    for config, option in ((ActorConfig, "--rl.actor.activation"), (CriticConfig, "--rl.critic.activation")):
        with pytest.raises(UserError, match=option):
            config(activation="gelu")


def test_critics_begin_where_they_are_told():
    """About there for all inputs, also near the ends of the bounds; and they still tell inputs apart."""
    torch.manual_seed(0)
    features, u = torch.randn(64, 4), torch.randn(64, 3)
    for value, low, high in ((0.3, 0.2, 0.45), (100.0, 99.9, 100.0), (-5.0, 0.0, 0.02)):
        critic = CriticEnsemble(4, 3, CriticConfig(hidden=16, layers=2), (0.0, 100.0))
        assert critic(features, u).median() > 40.0
        critic.begin_at(value)
        values = critic(features, u)
        assert low < values.median() < high and values.std() > 0
