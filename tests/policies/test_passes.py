"""The passes by hand give what torch's own layers and operations give, in values and gradients."""

import copy

import pytest
import torch
from torch import nn

from trimtab.adapters import NoiseSpec, UserError
from trimtab.policies import precision
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.gaussian import Limited
from trimtab.policies.networks import EnsembleMLP, mlp
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.policies.passes import matmuls_in

ACTIVATE = {"relu": torch.relu, "tanh": torch.tanh}


def plain(net, x, activation, layer_norm):
    """An ensemble's output by torch's differentiable operations."""
    last = len(net.weights) - 1
    for index, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        x = x @ weight + bias
        if index < last:
            x = nn.functional.layer_norm(x, x.shape[-1:]) if layer_norm else x
            x = ACTIVATE[activation](x)
    return x


def gradients(out, weight, *leaves):
    return torch.autograd.grad((out * weight).sum(), leaves)


@pytest.mark.parametrize("own", ["none", "one", "several"])
@pytest.mark.parametrize("activation, layer_norm", [("relu", True), ("relu", False), ("tanh", True)])
def test_ensemble_values_and_gradients(own, activation, layer_norm):
    torch.manual_seed(0)
    net = EnsembleMLP(3, 7, 2, 16, 3, layer_norm, activation).double()
    x = torch.randn(5, 7 if own == "none" else 4, dtype=torch.float64, requires_grad=True)
    leaves, full, args = [x], x, ()
    if own != "none":
        shape = (5, 3) if own == "one" else (5, 6, 3)
        beside = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        leaves.append(beside)
        full = x if own == "one" else x.repeat_interleave(6, 0)
        full, args = torch.cat([full, beside.flatten(0, -2)], 1), (beside,)
    leaves += list(net.parameters())
    out, expected = net(x, *args), plain(net, full, activation, layer_norm)
    assert torch.allclose(out, expected, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(net(x, *args), expected, atol=1e-12)
    weight = torch.randn_like(out)
    wanted = gradients(expected, weight, *leaves)
    for one, other in zip(gradients(out, weight, *leaves), wanted, strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, atol=1e-10)
    inputs = leaves[: 1 if own == "none" else 2]  # their gradients alone, as for the actor
    out = net.requires_grad_(False)(x, *args)
    for one, other in zip(gradients(out, weight, *inputs), wanted):
        assert torch.allclose(one, other, atol=1e-10)


@pytest.mark.parametrize("activation, layer_norm", [("relu", False), ("tanh", True)])
def test_plain_network_values_and_gradients(activation, layer_norm):
    torch.manual_seed(0)
    net, x = mlp(4, 6, 16, 3, activation, layer_norm).double(), torch.randn(5, 4, dtype=torch.float64)
    x.requires_grad_()
    out, expected = net(x), nn.Sequential(*net)(x)
    leaves, weight = [x, *net.parameters()], torch.randn_like(out)
    assert torch.allclose(out, expected, atol=1e-12)
    for found, wanted in zip(gradients(out, weight, *leaves), gradients(expected, weight, *leaves)):
        assert torch.allclose(found, wanted, atol=1e-10)


@pytest.mark.parametrize("mean_limit, clamp", [(0.9, False), (1.0, False), (1.0, True)])
def test_draw_values_and_gradients(mean_limit, clamp):
    """Against the same formulas in torch's differentiable operations; some means are beyond the limit."""
    torch.manual_seed(0)
    space = FullNoiseConfig(bound=1.3).build(NoiseSpec((2, 2)))
    config = ActorConfig(hidden=8, layers=1, mean_limit=mean_limit, log_std_clamp=clamp)
    actor = NoiseActor(3, space, config).double()
    nn.init.normal_(actor.net[-1].weight, std=4.0)
    features, eps = torch.randn(40, 3).double(), torch.randn(40, 4).double()
    drawn = actor.sample(features, eps)
    mean, raw = actor.net(actor.normalizer(features)).chunk(2, 1)
    if mean_limit < 1.0:
        assert (mean.abs() > actor.limit).any()
        mean = Limited.apply(mean, actor.limit)
    log_std = actor._bounded_log_std(raw)
    if clamp:
        assert (raw > 1.0).any() and (raw < -5.0).any() and torch.equal(log_std, raw.clamp(-5.0, 1.0))
    z = mean + log_std.exp() * eps
    normal = torch.distributions.Normal(mean, log_std.exp())
    expected = space.squash(z), (normal.log_prob(z) - space.log_slope(z)).sum(1), mean, log_std
    outputs = drawn.u, drawn.log_prob, drawn.mean, drawn.log_std
    leaves = list(actor.parameters())
    weights = [torch.randn_like(value) for value in expected]
    for count in (1, 2, 4):  # and where a loss takes only some of them
        first, second = (
            sum((value * weight).sum() for value, weight in zip(values[:count], weights))
            for values in (outputs, expected)
        )
        assert torch.allclose(first, second, rtol=1e-10)
        found = torch.autograd.grad(first, leaves, retain_graph=True)
        wanted = torch.autograd.grad(second, leaves, retain_graph=True)
        for one, other in zip(found, wanted):
            assert torch.allclose(one, other, rtol=1e-8, atol=1e-9)


def rounded(x):
    return x.bfloat16().float()


def test_bfloat16_is_near_and_follows_the_weights():
    torch.manual_seed(0)
    net, x = EnsembleMLP(2, 6, 1, 64, 3), torch.randn(50, 6)
    exact = net(x)
    with matmuls_in(torch.bfloat16):
        rough = net(x)
        found = torch.autograd.grad(rough.sum(), list(net.parameters()))
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert (rough - exact).norm() < 0.02 * exact.norm()
    assert not torch.equal(rough, rounded(rough))  # the last layer is not rounded
    for one, other in zip(found, torch.autograd.grad(exact.sum(), list(net.parameters()))):
        assert one.dtype == torch.float32 and (one - other).norm() < 0.05 * other.norm()
    other = copy.deepcopy(net)
    with torch.no_grad():
        net.weights[1].mul_(-1.0)
        with matmuls_in(torch.bfloat16):
            assert (net(x) - net(x).mean()).sub(rough - rough.mean()).norm() > 0.1 * rough.std()
            assert torch.equal(other(x), rough)
    assert torch.equal(other(x), exact)  # outside, float32 again


def test_backward_after_the_weights_moved_is_refused():
    net = EnsembleMLP(2, 3, 1, 8, 1)
    with matmuls_in(torch.bfloat16):
        out = net(torch.randn(4, 3)).sum()
    with torch.no_grad():
        net.weights[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_where_there_is_no_bfloat16_a_line_says_so(monkeypatch, capsys):
    cpu = torch.device("cpu")
    assert precision.matmul_dtype("--rl.precision", "float32", cpu) is None
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    assert precision.matmul_dtype("--rl.precision", "bfloat16", cpu) == torch.bfloat16
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    assert precision.matmul_dtype("--rl.precision", "bfloat16", cpu) is None
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match=r"--rl\.precision"):
        precision.require_precision("--rl.precision", "float16")
