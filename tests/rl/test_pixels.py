"""Learning from pixels: every algorithm solves a small problem that only a camera shows."""

import copy

import pytest
import torch
from accelerate import Accelerator

from tests.helpers.pixels import PixelPointAdapter, PixelPointConfig
from tests.helpers.problem import problem
from trimtab.adapters import NoiseSpec
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_samplers import base_noise, steered_noise
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.policies.observe import ObserveConfig, build_observer
from trimtab.policies.residual import EditConfig
from trimtab.rl.algorithms import BestOfNConfig, DSRLNAConfig, DSRLSACConfig
from trimtab.rl.budget import TrainConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.evaluation import evaluate
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.trainer import Trainer

KINDS = {
    "dsrl_sac": (DSRLSACConfig, {}),
    "dsrl_na": (DSRLNAConfig, {}),
    "importance": (DSRLNAConfig, {"bootstrap": "importance"}),
    "best_of_n": (BestOfNConfig, {}),
    "regression": (BestOfNConfig, {"distillation": "regression"}),
    "best_of_n_edits": (BestOfNConfig, {"edit": EditConfig(scale=0.3)}),
}
SIDE, VECTOR, BATCH, A, K = 15, 2, 6, 4, 16
PIXELS = 3 * SIDE**2
OBSERVE = ObserveConfig(inputs=["state", "images"], cameras=["a"], image_size=SIDE, image_dim=8, shift=2)


def make(kind, **more):
    torch.manual_seed(0)
    cls, settings = KINDS[kind]
    sizes = {"actor": ActorConfig(hidden=16, layers=1), "critic": CriticConfig(hidden=16, layers=1)}
    space = FullNoiseConfig().build(NoiseSpec((2, 2)))
    config = cls(**sizes, **settings, **more)
    algorithm = config.build(problem(VECTOR, space, A, observe=OBSERVE))
    torch.nn.init.normal_(algorithm.actor.net[-1].weight, std=0.3)
    return algorithm


def make_batch():
    torch.manual_seed(1)
    seen = [torch.cat([torch.randn(BATCH, 2), torch.randint(0, 256, (BATCH, PIXELS))], 1) for _ in range(2)]
    batch = {
        "features": seen[0], "next_features": seen[1], "u": torch.rand(BATCH, 4) - 0.5,
        "reward": -torch.rand(BATCH), "discount": torch.full((BATCH,), 0.9), "chunk": torch.randn(BATCH, A),
    }  # fmt: skip
    for before in ("", "next_"):
        batch[f"{before}candidates"] = torch.randn(BATCH, K, A)
        batch[f"{before}candidates_u"] = torch.rand(BATCH, K, 4) - 0.5
    return batch


def gradients(module):
    return [parameter.grad is not None and bool(parameter.grad.any()) for parameter in module.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_td_loss_trains_the_encoder(kind):
    algorithm = make(kind)
    encoder, batch = algorithm.actor.encoder, algorithm.encode_batch(make_batch())
    assert batch["features"].shape == (BATCH, VECTOR + 8) and batch["features"].requires_grad
    assert not batch["next_features"].requires_grad
    index = torch.arange(2).expand(BATCH, 2)
    losses = {
        "actor": lambda: algorithm.actor_loss(batch)[0],
        "regression": lambda: algorithm.regression_loss(batch)[0],
        "distillation": lambda: algorithm.distillation_loss(
            batch, *((index,) if "best" in kind or kind == "regression" else algorithm.pairs(batch, 2))
        ),
    }
    if "edits" in kind:
        losses["edit"] = lambda: algorithm.edit_loss(batch, index)[0]
    for name, loss in losses.items():
        if hasattr(algorithm, f"{name}_loss"):
            loss().backward()
            assert not any(gradients(encoder)), name
            learns = {"distillation": "noise_critic", "edit": "edit"}.get(name, "actor")
            assert any(gradients(algorithm.get_submodule(learns))), name
    algorithm.critic_loss(batch, torch.zeros(BATCH))[0].backward()
    assert all(gradients(encoder))


@pytest.mark.parametrize("kind", KINDS)
def test_update_moves_the_encoder_once_by_the_critics_optimiser(kind):
    algorithm = make(kind, actor_every=1)
    before = copy.deepcopy(algorithm.actor.encoder.state_dict())
    head = algorithm.actor.net[-1].weight.clone()
    metrics = algorithm.update(make_batch())
    after = algorithm.actor.encoder.state_dict()
    for name, value in before.items():
        moved = (after[name] - value).abs()
        assert 0 < moved.max() <= 1.001e-3, name  # Adam's first step is the learning rate
    assert not torch.equal(head, algorithm.actor.net[-1].weight)
    assert all(torch.isfinite(value).all() for value in metrics.values())
    held = {id(p) for group in algorithm.actor_optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in algorithm.actor.encoder.parameters()}


def test_replayed_images_are_shifted_each_time_and_those_to_value_are_not():
    algorithm, batch = make("dsrl_sac"), make_batch()
    torch.manual_seed(0)
    first, again = algorithm.encode_batch(batch)["features"], algorithm.encode_batch(batch)["features"]
    assert torch.equal(first[:, :VECTOR], batch["features"][:, :VECTOR])
    assert not torch.equal(first, again)
    values = [algorithm.value(batch["features"], batch["u"], None) for _ in range(2)]
    assert torch.equal(*values)
    x = algorithm.actor.encoder(batch["features"])
    assert torch.equal(values[0], algorithm.critic(x, batch["u"]).min(0).values)


def test_normaliser_takes_the_vector_and_leaves_the_encoders_output():
    algorithm = make("best_of_n")
    algorithm.fit_normalizer(torch.randn(50, VECTOR) * 3 + 1)
    for network in (algorithm.actor, algorithm.critic, algorithm.target_critic, algorithm.noise_critic):
        assert (network.normalizer.std[:VECTOR] > 2).all()
        assert (network.normalizer.std[VECTOR:] == 1).all() and not network.normalizer.mean[VECTOR:].any()


@pytest.mark.parametrize(
    "kind, steps, pace, settings",
    [
        ("dsrl_sac", 1600, 1.5, {}),
        # With squared errors the critics are late in so short a run: 0.02.
        ("dsrl_na", 1200, 2.0, {"critic_loss": "logistic"}),
        ("best_of_n", 1200, 2.0, {}),
    ],
)
def test_solves_a_problem_that_only_a_camera_shows(kind, steps, pace, settings):
    """No constant noise solves it (`test_train.py`), so the actor has to see."""
    adapter, config = PixelPointAdapter(), PixelPointConfig(limit=35)
    rl = KINDS[kind][0](
        batch_size=32,
        gamma=0.95,
        actor=ActorConfig(hidden=64, layers=2),
        critic=CriticConfig(hidden=64, layers=2),
        **settings,
    )
    budget = TrainConfig(
        env_steps=steps, warmup_transitions=300, first_update=100, updates_per_transition=pace
    )
    with ChunkVectorEnv(config, 8, 0) as vec:
        observe = ObserveConfig(image_size=16, shift=1)
        adapter.observer = build_observer(observe, adapter, vec.task_descriptions)
        assert adapter.observer.config.inputs == ["images"]
        runner, noise = PolicyRunner(adapter, config), FullNoiseConfig()
        # Of eleven seeds dsrl_na ends nine at 1.00, one at 0.96 and seed 0 at 0.81.
        trainer = Trainer(runner, vec, Accelerator(cpu=True), budget, rl, noise, seed=1, progress=False)
        actor = trainer.run().actor
        seeds = range(1000, 1100)
        base = evaluate(runner, vec, base_noise, seeds, progress=False)
        steered = evaluate(runner, vec, steered_noise(actor, True), seeds, progress=False)
    assert 0.2 < base.success_rate < 0.5
    assert steered.success_rate > 0.9
    # Every observation is kept once: as many frames as transitions, and the ends of episodes.
    assert len(trainer.replay._frames) <= len(trainer.replay) + trainer.episodes + 8 * rl.n_step
