"""The search of one constant noise, and a constant as the start of a noise actor."""

import itertools
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from tests.helpers.faulty import FaultyConfig
from tests.helpers.point import PointAdapter, PointConfig
from trimtab.adapters import NoiseSpec, PolicyConfig, UserError
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.artefact import load_artefact
from trimtab.policies.noise_samplers import base_noise, constant_noise, steered_noise
from trimtab.policies.noise_space import (
    ConstantNoiseConfig,
    FullNoiseConfig,
    KnotNoiseConfig,
    MaskedNoiseConfig,
    RepeatNoiseConfig,
)
from trimtab.recipes.cli import main
from trimtab.rl.algorithms import DSRLSACConfig
from trimtab.rl.algorithms.golden_ticket import GoldenTicketConfig, TicketSearch, episodes_each, sizes
from trimtab.rl.budget import TrainConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.evaluation import evaluate
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.seeds import training_seed
from trimtab.rl.trainer import Trainer
from trimtab.rl.warm_start import read_constant


@pytest.mark.parametrize(
    "candidates, keep, expected",
    [(8, 0.5, [8, 4, 2]), (9, 0.5, [9, 5, 3, 2]), (5, 0.99, [5, 4, 3, 2]), (10, 0.01, [10])],
)
def test_sizes(candidates, keep, expected):
    assert sizes(candidates, keep) == expected


@pytest.mark.parametrize("budget", [14, 15, 29, 100, 999])
def test_the_budget_is_kept_and_nearly_used_up(budget):
    counts = [8, 4, 2]
    each = episodes_each(counts, budget)
    spent = sum(count * share for count, share in zip(counts, each, strict=True))
    assert min(each) >= 1 and budget - counts[-1] < spent <= budget
    assert each == sorted(each)  # the fewer are left, the closer they are looked at


def test_an_episode_lost_to_a_fault_is_no_failure_of_its_constant():
    """The environments of training go on after a fault; the search cannot."""
    config = FaultyConfig(fault="raise")
    rl = GoldenTicketConfig(candidates=4, budget=48)
    with ChunkVectorEnv(config, 4, 0, tolerant=True) as vec:
        seeking = TicketSearch(PolicyRunner(PointAdapter(), config), vec, rl, progress=False)
        with pytest.raises(UserError, match=r"--env.type: .*the physics exploded"):
            seeking.run()


def search(budget=120, seed=0, candidates=12, keep=0.5, **settings):
    lines, config = [], PointConfig(limit=35)
    runner = PolicyRunner(PointAdapter(), config)
    with ChunkVectorEnv(config, 8, 0) as vec:
        rl = GoldenTicketConfig(candidates=candidates, budget=budget, keep=keep)
        found = TicketSearch(
            runner, vec, rl, ConstantNoiseConfig(**settings), seed, lines.append, progress=False
        )
        return found.run(), found, lines, runner


def test_finds_a_constant_that_solves_one_side():
    ticket, run, lines, runner = search()
    seeds = range(1000, 1100)
    with ChunkVectorEnv(PointConfig(limit=35), 8, 0) as vec:
        base = evaluate(runner, vec, base_noise, seeds, progress=False)
        fed = evaluate(runner, vec, constant_noise(ticket.noise), seeds, progress=False)
        acted = evaluate(runner, vec, steered_noise(ticket.actor, True), seeds, progress=False)
    assert np.array_equal(fed.successes, acted.successes) and np.array_equal(fed.steps, acted.steps)
    goals = []
    for seed in seeds:
        env = PointConfig(limit=35).create_envs(1)["test_point"][0].envs[0]
        goals.append(float(env.reset(seed=seed)[0]["environment_state"][0]))
    side = np.sign(goals)
    solved = [fed.successes[side == which].mean() for which in (-1, 1)]
    assert max(solved) > 0.95 and min(solved) < 0.05  # all of one side, none of the other
    assert base.successes[side == (-1, 1)[int(np.argmax(solved))]].mean() < 0.6

    assert run.episodes <= 120 and run.episodes == ticket.episodes.sum() == lines[-1]["episodes"]
    assert [line["candidates"] for line in lines] == [12, 6, 3, 2]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert all(later["env_steps"] > former["env_steps"] for former, later in itertools.pairwise(lines))
    assert lines[-1]["env_steps"] == run.env_steps and run.updates == 0
    low, high = lines[-1]["best_ci95"]
    assert 0 <= low <= lines[-1]["best_success"] <= high <= 1
    assert json.loads(json.dumps(lines)) == lines


def test_successes_are_those_of_the_paired_episodes():
    """Each constant's count is what it gets when it alone meets the seeds of its rounds."""
    ticket, run, _, runner = search(budget=24, candidates=4)
    first = training_seed(0)
    noises = run.draw()
    with ChunkVectorEnv(PointConfig(limit=35), 3, 0) as vec:
        for noise, won, count in zip(noises, ticket.successes, ticket.episodes, strict=True):
            alone = evaluate(
                runner, vec, constant_noise(noise), range(first, first + int(count)), progress=False
            )
            assert alone.successes.sum() == won
    rates = ticket.successes / ticket.episodes
    last = ticket.episodes == ticket.episodes.max()
    assert torch.equal(ticket.noise, noises[int(np.argmax(np.where(last, rates, -1.0)))])


def test_the_same_seed_repeats_exactly():
    first, second, other = search(30, 3, 4)[0], search(30, 3, 4)[0], search(30, 4, 4)[0]
    assert torch.equal(first.noise, second.noise) and not torch.equal(first.noise, other.noise)
    assert np.array_equal(first.successes, second.successes)


def test_constants_stay_where_an_actor_reaches():
    _, run, _, _ = search(20, 0, 8, bound=0.5)
    assert run.draw().abs().max() < 0.49
    _, run, _, _ = search(20, 0, 8, ticket="repeat")
    assert torch.equal(run.draw()[:, 0], run.draw()[:, 1])


@pytest.mark.parametrize(
    "settings, option",
    [
        ({"candidates": 1}, "--rl.candidates"),
        ({"keep": 1.0}, "--rl.keep"),
        ({"candidates": 8, "budget": 13}, "--rl.budget: 8 constants take at least 14 episodes"),
        ({"budget": 1_000_000}, "--rl.budget"),
    ],
)
def test_bad_settings(settings, option):
    with pytest.raises(UserError, match=option):
        GoldenTicketConfig(**settings)


SPEC = NoiseSpec((4, 2))


@pytest.mark.parametrize("noise", [FullNoiseConfig(), ConstantNoiseConfig(), KnotNoiseConfig(knots=4)])
def test_a_warm_start_is_the_constant_where_the_actor_acts_by_its_mean(noise, tmp_path):
    wanted = torch.randn(SPEC.shape, generator=torch.Generator().manual_seed(1)).clamp(-1.2, 1.2)
    save_file({"noise": wanted}, str(tmp_path / "best_constant.safetensors"))
    space = noise.build(SPEC)
    actor = NoiseActor(3, space, ActorConfig(hidden=16, layers=2))
    before = actor(torch.randn(5, 3))[1]
    actor.begin_at(read_constant(str(tmp_path / "best_constant.safetensors"), SPEC))
    features, prior = torch.randn(5, 3), torch.randn(5, *SPEC.shape)
    assert torch.allclose(actor.act(features, prior, deterministic=True), wanted.expand(5, -1, -1), atol=1e-5)
    assert torch.equal(actor(features)[1], before)  # it still explores


def test_a_repeated_constant_starts_a_repeated_actor():
    wanted = torch.tensor([[0.5, -1.0]]).expand(4, 2)
    actor = NoiseActor(3, RepeatNoiseConfig().build(SPEC), ActorConfig())
    actor.begin_at(wanted)
    made = actor.act(torch.randn(5, 3), torch.randn(5, 4, 2), deterministic=True)
    assert torch.allclose(made, wanted.expand(5, -1, -1), atol=1e-6)


@pytest.mark.parametrize(
    "noise, wanted, message",
    [
        (FullNoiseConfig(), torch.full((4, 2), 2.5), "--noise.bound: .* raise the bound to 2.6"),
        (RepeatNoiseConfig(), torch.arange(8.0).reshape(4, 2) / 8, "--noise.type: .*cannot make the noise"),
        (MaskedNoiseConfig(rows="0:2"), torch.zeros(4, 2), "--noise.type: .*afresh"),
    ],
)
def test_a_warm_start_that_the_space_cannot_make(noise, wanted, message):
    with pytest.raises(UserError, match=message):
        NoiseActor(3, noise.build(SPEC), ActorConfig()).begin_at(wanted)


def test_what_is_no_constant(tmp_path):
    save_file({"other": torch.zeros(4, 2)}, str(tmp_path / "other.safetensors"))
    save_file({"noise": torch.zeros(3, 2)}, str(tmp_path / "shape.safetensors"))
    for name, message in (
        ("other.safetensors", "holds no 'noise'"),
        ("shape.safetensors", r"holds noise of shape \(3, 2\), this policy takes \(4, 2\)"),
        ("nothing", "neither an artefact's folder nor a safetensors file"),
    ):
        with pytest.raises(UserError, match=f"--train.warm_start: .*{message}"):
            read_constant(str(tmp_path / name), SPEC)


def test_a_run_begins_at_its_warm_start(tmp_path):
    noise = torch.tensor([[0.7], [-0.4]])
    ticket = tmp_path / "ticket.safetensors"
    save_file({"noise": noise}, str(ticket))
    config = PointConfig(limit=35)
    with ChunkVectorEnv(config, 4, 0) as vec:
        runner = PolicyRunner(PointAdapter(), config)
        train = TrainConfig(
            env_steps=200,
            first_update=16,
            warmup_transitions=60,
            warm_start=str(ticket),
        )
        rl = DSRLSACConfig(batch_size=16, actor=ActorConfig(hidden=16, layers=2))
        trainer = Trainer(runner, vec, Accelerator(cpu=True), train, rl, FullNoiseConfig(), progress=False)
        untrained = steered_noise(trainer.algorithm.actor, True)
        seeds = range(1000, 1020)
        steered = evaluate(runner, vec, untrained, seeds, progress=False)
        fed = evaluate(runner, vec, constant_noise(noise), seeds, progress=False)
        assert np.array_equal(steered.successes, fed.successes) and np.array_equal(steered.steps, fed.steps)
    with ChunkVectorEnv(config, 4, 0) as vec:
        trainer = Trainer(
            PolicyRunner(PointAdapter(), config), vec, Accelerator(cpu=True), train, rl, FullNoiseConfig(),
            progress=False,
        )  # fmt: skip
        trainer.run()
    # While it warms up, the actor that is to learn acts as it began: around the constant, not around 0.
    first = trainer.replay._data["u"][: trainer.train.warmup_transitions].mean(0)
    assert torch.allclose(first, noise.flatten(), atol=0.35)
    assert first[0] > 0.3 and first[1] < -0.1


ENV = ["--env.type=metaworld_state", "--env.task=drawer-close-v3", "--env.episode_length=20"]
TINY = [
    "--num_envs=1",
    "--eval.n_episodes=2",
    "--eval.batch_size=1",
    "--eval.constant_candidates=0",
    "--eval.videos=0",
    "--machine.workers=0",
    "--policy.device=cpu",
]


def test_a_whole_run_leaves_an_artefact_to_start_from(tiny_base, tmp_path, capsys):
    search = ["adapt", f"--policy.path={tiny_base}", *ENV, *TINY, "--rl.type=golden_ticket"]
    options = ["--rl.candidates=3", "--rl.budget=8", f"--output_dir={tmp_path / 'ticket'}"]
    assert main([*search, *options]) == 0
    printed = capsys.readouterr().out
    assert "--noise.type=constant" in printed and "steered" in printed
    results = json.loads((tmp_path / "ticket" / "results.json").read_text())
    assert results["training_episodes"] <= 8 and results["env_steps"] > 0
    lines = [json.loads(line) for line in (tmp_path / "ticket" / "metrics.jsonl").read_text().splitlines()]
    assert [line["candidates"] for line in lines] == [3, 2]
    assert (tmp_path / "ticket" / "curve.png").stat().st_size > 0
    artefact = tmp_path / "ticket" / "artefact"
    steered = load_artefact(PolicyConfig(path=str(artefact), device="cpu"))
    prior = torch.randn(3, *steered.adapter.noise_spec.shape)
    fed = steered.actor.act(torch.randn(3, 89), prior, deterministic=True)
    assert torch.equal(fed[0], fed[1])
    assert torch.allclose(read_constant(str(artefact), steered.adapter.noise_spec), fed[0], atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--rl.type=golden_ticket", "--noise.type=full"], "--noise.type: golden_ticket seeks one noise"),
        (["--rl.type=golden_ticket", "--train.warm_start=x"], "--train.warm_start: golden_ticket draws all"),
        (["--train.warm_start=nowhere"], "--train.warm_start: nowhere is neither"),
    ],
)
def test_refused_in_one_line_before_any_work(options, message, tiny_base, tmp_path, capsys):
    argv = ["adapt", f"--policy.path={tiny_base}", *ENV, *TINY, *options, f"--output_dir={tmp_path / 'out'}"]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
