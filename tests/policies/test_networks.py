"""Ensembles by batched matmul equal their members one by one."""

import pytest
import torch
from torch import nn

from trimtab.adapters import UserError
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig, CriticEnsemble
from trimtab.policies.networks import EnsembleMLP, FeatureNormalizer, mlp
from trimtab.policies.passes import matmuls_in


def member(net, index):
    """Member ``index`` of an ensemble, rebuilt from torch's own layers."""
    modules = []
    for layer, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        linear = nn.Linear(weight.shape[1], weight.shape[2])
        linear.weight.data, linear.bias.data = weight[index].T.clone(), bias[index, 0].clone()
        modules.append(linear)
        if layer < len(net.weights) - 1:
            modules += [nn.LayerNorm(weight.shape[2], elementwise_affine=False), nn.ReLU()]
    return nn.Sequential(*modules)


def test_ensemble_equals_separate_networks():
    torch.manual_seed(0)
    net, x = EnsembleMLP(3, 5, 2, 16, 2), torch.randn(7, 5)
    out = net(x)
    assert out.shape == (3, 7, 2)
    for index in range(3):
        assert torch.allclose(out[index], member(net, index)(x), atol=1e-5)
    apart = torch.randn(3, 7, 5)
    assert torch.allclose(net(apart)[1], member(net, 1)(apart[1]), atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_some_members_alone_give_what_they_give_among_all(dtype):
    torch.manual_seed(0)
    critic = CriticEnsemble(4, 3, CriticConfig(members=5, hidden=16, layers=2), (-20.0, 0.0))
    features, one, several = torch.randn(6, 4), torch.randn(6, 3), torch.randn(6, 2, 3)
    chosen = torch.tensor([4, 1])
    with torch.no_grad(), matmuls_in(dtype):
        for u in (one, several):
            everyone = critic._outputs(features, u)
            assert torch.allclose(critic._outputs(features, u, chosen), everyone[chosen], atol=1e-6)
            # Copies in bfloat16 are still those of all.
            assert torch.equal(critic._outputs(features, u), everyone)
            assert torch.equal(critic.smallest(features, u, 5), critic(features, u).min(0).values)
    with pytest.raises(ValueError, match="members can be chosen where no gradient"):
        critic._outputs(features, one, chosen)


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


def test_tanh_and_layer_norm():
    torch.manual_seed(0)
    x = torch.randn(7, 5)
    net = EnsembleMLP(2, 5, 1, 8, 2, activation="tanh")
    for index in range(2):
        rebuilt = [nn.Tanh() if isinstance(layer, nn.ReLU) else layer for layer in member(net, index)]
        assert torch.allclose(net(x)[index], nn.Sequential(*rebuilt)(x), atol=1e-6)
    first, norm, activation, *_ = modules = list(mlp(5, 3, 8, 2, "tanh", layer_norm=True))
    assert [type(m) for m in modules] == [nn.Linear, nn.LayerNorm, nn.Tanh] * 2 + [nn.Linear]
    h = first(x)
    scaled = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    assert torch.allclose(activation(norm(h)), torch.tanh(scaled), atol=1e-6)
    assert [type(m) for m in mlp(5, 3, 8, 1)] == [nn.Linear, nn.ReLU, nn.Linear]
    for config, option in ((ActorConfig, "--rl.actor.activation"), (CriticConfig, "--rl.critic.activation")):
        with pytest.raises(UserError, match=option):
            config(activation="gelu")
