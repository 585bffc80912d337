"""The lean Adam is torch's Adam, its state included; and an algorithm's updates in bfloat16."""

import copy

import pytest
import torch

from tests.rl.algorithms import test_best_of_n as best_of_n
from tests.rl.algorithms.test_dsrl_sac import make, make_batch
from trimtab.policies import precision
from trimtab.policies.passes import matmuls_in
from trimtab.rl.algorithms.optimizer import FusedAdam
from trimtab.rl.runs.processes import optimizers


def test_steps_and_state_are_those_of_torch():
    torch.manual_seed(0)
    first = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), ())]
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    ours, theirs = FusedAdam(first, 0.1), torch.optim.Adam(second, lr=0.1, fused=True)
    hooked = []  # once a step, though torch's own Adam has hooks of its own from its first instance on
    ours.register_step_pre_hook(lambda *args: hooked.append(1))
    for step in range(8):
        for one, other in zip(first, second):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        if step == 3:  # without a gradient for each: the parent's step, which passes over it
            first[1].grad = second[1].grad = None
        if step == 4:  # what a checkpoint does
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
        for optimizer in (ours, theirs):  # a step that the guard leaves out, and steps that it lets through
            optimizer.found_inf = torch.tensor(float(step == 6))
        before = [one.detach().clone() for one in first]
        ours.step()
        theirs.step()
        for one, other in zip(first, second):
            assert torch.equal(one, other)
        assert (step == 6) == all(torch.equal(one, was) for one, was in zip(first, before))
    for one, other in zip(ours.state_dict()["state"].values(), theirs.state_dict()["state"].values()):
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert [int(state["step"]) for state in ours.state_dict()["state"].values()] == [7, 6, 7]
    assert len(hooked) == 8
    ours.zero_grad()
    assert all(p.grad is None for p in first)


def test_a_rate_in_a_tensor_is_read_anew():
    """As CUDA graphs need it; the same steps as with numbers."""
    torch.manual_seed(0)
    first = [torch.nn.Parameter(torch.randn(3, 4))]
    second = [torch.nn.Parameter(first[0].detach().clone())]
    ours, theirs = FusedAdam(first, torch.tensor(0.1)), torch.optim.Adam(second, lr=0.1, fused=True)
    for rate in (0.1, 0.1, 0.05, 0.01):
        ours.param_groups[0]["lr"].fill_(rate)
        theirs.param_groups[0]["lr"] = rate
        first[0].grad = torch.randn(3, 4)
        second[0].grad = first[0].grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(first[0], second[0])


def test_rates_fall_to_the_share_that_is_asked():
    algorithm = make(learning_rate_end=0.2, learning_rate=1e-3)
    inner = list(optimizers(algorithm).values())
    assert len(inner) == 3
    for share, factor in ((0.0, 1.0), (0.25, 0.8), (1.0, 0.2), (1.5, 0.2), (0.5, 0.6)):
        algorithm.progress(share)
        rates = [group["lr"] for optimizer in inner for group in optimizer.param_groups]
        assert rates == pytest.approx([factor * 1e-3] * 3)
    steady = make(learning_rate=1e-3)
    steady.progress(1.0)
    assert all(o.param_groups[0]["lr"] == 1e-3 for o in optimizers(steady).values())


def test_bfloat16_update_is_near_the_exact_one(monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    exact, rough = make(actor_every=1), make(actor_every=1, precision="bfloat16")
    assert rough.matmul_dtype == torch.bfloat16
    batch, losses = make_batch(), []
    for algorithm in (exact, rough):
        torch.manual_seed(3)
        losses.append(algorithm.update(batch))
    assert losses[0]["critic_loss"] != losses[1]["critic_loss"]
    for name in ("critic_loss", "q_mean", "actor_loss", "entropy"):
        assert float(losses[1][name]) == pytest.approx(float(losses[0][name]), rel=0.05, abs=0.05)
    assert all(p.dtype == torch.float32 for p in rough.parameters())
    features = torch.randn(9, 3)
    for algorithm in (exact, rough):  # who acts does so in float32
        algorithm.actor.load_state_dict(exact.actor.state_dict())
    assert torch.equal(exact.actor(features)[0], rough.actor(features)[0])


def test_bfloat16_learns_as_float32_does(monkeypatch):
    """Over many updates: copies of the weights from before an optimiser's step would hold the loss up."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    ends = []
    for name in ("float32", "bfloat16"):
        # Squared errors can get to 0, cross-entropy cannot.
        algorithm = best_of_n.build(precision=name, critic_loss="squared")
        torch.manual_seed(3)
        losses = [float(algorithm.update(best_of_n.batch())["critic_loss"]) for _ in range(200)]
        ends.append(sum(losses[-20:]) / 20)
        assert ends[-1] < 0.05 * losses[0]
    assert 0.7 < ends[1] / ends[0] < 1.4
    batch, net = best_of_n.batch(), algorithm.critic.net
    with matmuls_in(torch.bfloat16):
        algorithm.critic(batch["features"], batch["chunk"])
    assert torch.equal(net.passed._copies[0], net.weights[0].bfloat16())
