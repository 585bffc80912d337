"""The bench: the rival's environment is the collector's, runs are kept, and the report counts right."""

import json
import math
import os
import time
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.acting import Acts
from tests.helpers.point import PointAdapter, PointConfig
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.files import file_hash
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.artefact import save_artefact
from trimtab.policies.noise_samplers import prior_noise
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.recipes.bench.clock import CPU
from trimtab.recipes.bench.compiled import compiled_table, measure
from trimtab.recipes.bench.engine import OURS, variants
from trimtab.recipes.bench.methods import METHODS, Method, Setup, run_method
from trimtab.recipes.bench.overhead import compare
from trimtab.recipes.bench.processes import Job, work
from trimtab.recipes.bench.report import dip, sustained
from trimtab.recipes.bench.updates import measure_updates, updates_table
from trimtab.recipes.cli import main
from trimtab.recipes.cli.bench import BenchConfig, once
from trimtab.recipes.finetune.training import TuningConfig
from trimtab.rl.algorithms import BestOfNConfig, DSRLSACConfig
from trimtab.rl.budget import TrainConfig
from trimtab.rl.collector import Collector
from trimtab.rl.envs.metaworld import MetaworldStateConfig
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.statistics import p_below

GAMMA = 0.9
SMALL = [
    "--tasks=drawer-close",
    "--episode_length=20",
    "--num_envs=4",
    "--workers=0",
]
SAMPLES = [
    *SMALL,
    "--what=samples",
    "--methods=best_of_n,sb3_sac",
    "--env_steps=400",
    "--grid=200",
    "--n_episodes=4",
    "--final_episodes=3",
    "--base_episodes=5",
    "--batch_size=4",
]


def choose(features):
    """A noise that depends on the state, within the bound of 2: (B, d) -> (B, 2)."""
    angle = 3.0 * features.sum(-1, keepdim=True)
    return 1.9 * torch.cat([torch.sin(angle), torch.cos(angle)], -1)


@pytest.mark.parametrize("brink", [None, 0.1])
def test_the_rivals_environment_makes_the_collectors_transitions(brink):
    """Same noise in each state: the same observations, rewards, ends and true last observations."""
    from trimtab.recipes.bench.wrapper import NoiseVecEnv

    config, adapter = PointConfig(brink=brink), PointAdapter()
    space = FullNoiseConfig().build(adapter.noise_spec)
    with ChunkVectorEnv(config, 3, 0) as vec:
        rl = DSRLSACConfig(gamma=GAMMA, n_step=1)
        collector = Collector(PolicyRunner(adapter, config), vec, rl, "sparse", seed=5)
        collector.start(Acts(space, lambda features, prior: choose(features)))
        ours, episodes = [], []
        for _ in range(40):
            collector.begin()
            transitions, ended = collector.finish()
            ours += transitions
            episodes += [episode.success for episode in ended]
    theirs = []
    with ChunkVectorEnv(config, 3, 0) as vec:
        env = NoiseVecEnv(PolicyRunner(adapter, config), vec, space, GAMMA, "sparse", seed=5)
        before = env.reset()
        for _ in range(40):
            u = choose(torch.as_tensor(before)).numpy()
            after, rewards, dones, infos = env.step(u)
            for i in range(3):
                terminal = dones[i] and not infos[i]["TimeLimit.truncated"]
                following = infos[i]["terminal_observation"] if dones[i] else after[i]
                theirs.append((before[i], u[i], rewards[i], terminal, following))
            before = after
        assert env.ended == episodes and env.env_steps == collector.env_steps
    assert any(t.discount == 0.0 for t in ours) and not all(episodes) and any(episodes)
    assert len(ours) == len(theirs) == 120
    assert any(t.reward == pytest.approx(-10.0) for t in ours) == (brink is not None)  # what failing costs
    for transition, (features, u, reward, terminal, following) in zip(ours, theirs):
        assert np.array_equal(transition.features, features)
        assert np.allclose(transition.u, u, atol=1e-6)
        assert transition.reward == pytest.approx(reward)
        assert (transition.discount == 0.0) == terminal
        assert np.array_equal(transition.next_features, following)


def test_the_rival_warms_up_on_what_the_base_draws():
    from trimtab.recipes.bench.wrapper import PriorBox

    space = FullNoiseConfig(bound=2.0).build(PointAdapter().noise_spec)
    box = PriorBox(space)
    box.seed(3)
    drawn = np.stack([box.sample() for _ in range(4000)])
    assert all(box.contains(row) for row in drawn[:50])
    expected = prior_noise(space)(None, torch.randn(20_000, 2, 1, generator=torch.manual_seed(0)))
    assert drawn.mean() == pytest.approx(0.0, abs=0.05)
    assert drawn.std() == pytest.approx(float(expected.std()), rel=0.03)  # a uniform one: 1.15


def test_the_rivals_replay_keeps_terminals_and_time_limits_apart():
    """stable-baselines3's own buffer, filled by its own loop: a time limit is no terminal state."""
    from trimtab.recipes.bench.wrapper import NoiseVecEnv, SB3SACConfig, learn, make_sac

    config, adapter = PointConfig(), PointAdapter()
    space = FullNoiseConfig().build(adapter.noise_spec)
    with ChunkVectorEnv(config, 3, 0) as vec:
        env = NoiseVecEnv(PolicyRunner(adapter, config), vec, space, GAMMA, "sparse", seed=5)
        model = make_sac(SB3SACConfig(warmup_transitions=10_000, replay_capacity=3000), env, 2, seed=0)
        seen = []
        learn(model, env, 600, lambda steps, ended: seen.append((steps, ended)))
    buffer = model.replay_buffer
    filled = slice(0, buffer.pos)
    ends, limits = buffer.dones[filled], buffer.timeouts[filled]
    outcomes = [won for _, ended in seen for won in ended]
    assert ends.sum() == len(outcomes) and 0 < limits.sum() < ends.sum()
    assert (ends - limits).sum() == sum(outcomes)  # in this environment only success is terminal
    arrived = (
        np.abs(buffer.next_observations[filled][..., 0] - buffer.next_observations[filled][..., 1]) < 0.1
    )
    assert np.array_equal(arrived, (ends - limits) == 1)
    assert seen[-1][0] >= 600 > seen[-2][0]
    assert model.gamma == pytest.approx(0.99**2) and model._n_updates == 0


def test_the_rival_learns_and_its_mean_is_evaluated():
    from trimtab.recipes.bench.wrapper import NoiseVecEnv, SB3SACConfig, learn, make_sac, sb3_noise

    config, adapter = PointConfig(), PointAdapter()
    space = FullNoiseConfig(bound=2.0).build(adapter.noise_spec)
    with ChunkVectorEnv(config, 3, 0) as vec:
        env = NoiseVecEnv(PolicyRunner(adapter, config), vec, space, GAMMA, "sparse", seed=5)
        model = make_sac(SB3SACConfig(warmup_transitions=30, batch_size=16, hidden=16), env, 2, seed=0)
        before = [parameter.detach().clone() for parameter in model.actor.parameters()]
        chunks = []
        learn(model, env, 200, lambda steps, ended: chunks.append(steps))
    # One gradient step for each transition from the 33rd on; the last chunk ends the run before its own.
    assert model._n_updates == 3 * (len(chunks) - 11)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.actor.parameters()))
    features, prior = torch.randn(6, 2), torch.randn(6, 2, 1)
    with torch.no_grad():
        mean, _, _ = model.actor.get_action_dist_params(features)
    noise = sb3_noise(model, space)(features, prior)
    assert noise.shape == (6, 2, 1) and torch.allclose(noise.flatten(1), 2.0 * torch.tanh(mean), atol=1e-5)


def point_run(grid):
    """A short best-of-N run on the point, evaluated every ``grid`` steps."""
    method = Method(
        BestOfNConfig(num_candidates=4, target_candidates=2, batch_size=16, acting="thompson"),
        train=TrainConfig(first_update=16, warmup_transitions=0, updates_per_transition=1.0),
    )
    config, adapter = PointConfig(), PointAdapter()
    with ChunkVectorEnv(config, 3, 0) as vec:
        setup = Setup(adapter, Path(), config, vec, 300, grid, [1, 2, 3, 4], [5, 6], num_envs=3, workers=0)
        return run_method(method, setup, 0, "point")


def test_evaluations_leave_the_run_alone():
    often, once_ = point_run(60), point_run(300)
    assert [point["grid"] for point in often["points"]] == [60, 120, 180, 240, 300]
    assert [point["grid"] for point in once_["points"]] == [300]
    assert often["episodes"] == once_["episodes"] and often["updates"] == once_["updates"] > 0
    assert often["points"][-1]["actor"] == once_["points"][-1]["actor"]
    assert often["final"] == once_["final"]
    assert {"actor", "acting"} <= set(often["final"])
    assert often["final"]["acting"]["episodes"] == 2


def test_samples_through_both_engines_and_again(tiny_base, tmp_path, capsys):
    output = tmp_path / "bench"
    command = ["bench", f"--base={tiny_base}", *SAMPLES, f"--output_dir={output}"]
    small = {"first_update": 64, "warmup_transitions": 0, "updates_per_transition": 2.0}
    assert METHODS["best_of_n"].settings()["train"].items() >= small.items()
    assert main([*command, "--seeds=0"]) == 0
    folder = output / "runs" / "drawer-close-v3"
    names = ["base.json", "best_of_n-seed0.json", "sb3_sac-seed0.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name, policies in (("best_of_n", {"actor", "acting"}), ("sb3_sac", {"actor"})):
        run = json.loads((folder / f"{name}-seed0.json").read_text())
        assert [point["grid"] for point in run["points"]] == [200, 400]
        for point in run["points"]:
            assert {key for key in point if isinstance(point[key], dict)} == policies
            assert point["actor"]["episodes"] == 4
        assert run["final"]["actor"]["episodes"] == 3
        assert len(run["episodes"]) >= 10 and all(step <= 416 for step, _, _ in run["episodes"])
    assert json.loads((folder / "base.json").read_text())["base"]["episodes"] == 5
    table = (output / "samples.md").read_text()
    assert (
        "| best_of_n | actor |" in table and "| best_of_n | best of N |" in table and "| sb3_sac |" in table
    )
    assert (output / "samples.png").stat().st_size > 5000
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    assert main([*command, "--seeds=0", "--methods=sb3_sac"]) == 0  # nothing is run twice
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert capsys.readouterr().out.count("is there already") == 2
    assert main([*command, "--seeds=0", "--methods=sb3_sac", "--n_episodes=3"]) == 0
    assert "other settings" in capsys.readouterr().out
    changed = {path.name for path in folder.iterdir() if path.stat().st_mtime_ns != written[path.name]}
    assert changed == {"sb3_sac-seed0.json"}


def test_filtered_behaviour_cloning_trains_a_copy_of_the_base(drawer_base):
    env = MetaworldStateConfig(task="drawer-close-v3", episode_length=100)
    adapter = load_adapter(PolicyConfig(path=str(drawer_base), device="cpu"))
    before = {name: value.clone() for name, value in adapter.policy.state_dict().items()}
    hashed = file_hash(drawer_base)
    method = Method(None, tuning=TuningConfig(method="full", steps=20, learning_rate=5e-4, batch_size=16))
    with ChunkVectorEnv(env, 3, 0) as vec:
        setup = Setup(adapter, drawer_base, env, vec, 1600, 800, [1, 2, 3], [5, 6], num_envs=4, workers=0)
        run = run_method(method, setup, 0, "rival")
    assert [point["env_steps"] for point in run["points"]] == [800, 1600]  # to the step
    assert {key for key in run["points"][0] if isinstance(run["points"][0][key], dict)} == {"actor"}
    assert run["points"][0]["actor"]["episodes"] == 3 and run["final"]["actor"]["episodes"] == 2
    rounds = {step for step, won, _ in run["episodes"] if won}  # fine-tuned after each with a success
    assert rounds and run["updates"] == 20 * len(rounds)
    assert run["trained_parameters"] == sum(p.numel() for p in adapter.policy.parameters())
    assert all(torch.equal(before[name], value) for name, value in adapter.policy.state_dict().items())
    assert file_hash(drawer_base) == hashed


def test_methods_are_what_their_names_say():
    """The paper's settings, and those that make our SAC the rival's."""
    from trimtab.recipes.bench.wrapper import SB3SACConfig
    from trimtab.rl.algorithms.presets import PAPER

    paper, short = METHODS["dsrl_sac_paper"], METHODS["dsrl_sac_paper_short"]
    for name, value in PAPER["dsrl_sac"]["rl"].items():
        have = getattr(paper.rl, name)
        if isinstance(value, dict):
            assert all(getattr(have, key) == entry for key, entry in value.items())
        else:
            assert have == value
    assert paper.num_envs == 4 and paper.noise.bound == 1.5 and paper.train.warmup_transitions == 6004
    assert paper.rl == short.rl and short.train.warmup_transitions == short.train.first_update == 800
    ours, theirs = METHODS["dsrl_sac_as_sb3"], SB3SACConfig()
    for name in ("learning_rate", "batch_size", "gamma", "tau", "initial_temperature"):
        assert getattr(ours.rl, name) == getattr(theirs, name)
    assert ours.rl.actor.hidden == ours.rl.critic.hidden == theirs.hidden
    assert ours.rl.actor.layers == ours.rl.critic.layers == theirs.layers and ours.rl.actor_every == 1
    assert ours.rl.n_step == 1 and ours.rl.backup_entropy and not ours.rl.critic.layer_norm
    assert ours.rl.target_entropy is None and theirs.target_entropy_per_dim == -0.25  # our default too
    for name in ("warmup_transitions", "updates_per_transition", "replay_capacity"):
        assert ours.settings()["train"][name] == getattr(theirs, name)
    assert len({json.dumps(method.settings(), sort_keys=True) for method in METHODS.values()}) == len(METHODS)


def test_once_runs_what_is_missing_or_of_other_settings(tmp_path, capsys):
    path, calls = tmp_path / "a" / "run.json", []

    def run():
        calls.append(1)
        return {"value": len(calls)}

    assert once(path, {"x": 1, "y": [2]}, run)["value"] == 1
    assert once(path, {"y": [2], "x": 1}, run)["value"] == 1
    assert once(path, {"x": 2, "y": [2]}, run)["value"] == 2
    assert json.loads(path.read_text())["settings"] == {"x": 2, "y": [2]}


def test_engine_with_few_repetitions(tiny_base, tmp_path):
    output = tmp_path / "bench"
    few = ["--widths=16", "--repetitions=2", "--updates=3", "--transitions=30"]
    assert (
        main(["bench", "--what=engine", f"--base={tiny_base}", *SMALL, *few, f"--output_dir={output}"]) == 0
    )
    found = json.loads((output / "engine.json").read_text())
    assert found["setting"]["transitions"] == 32 and found["setting"]["threads"] == 1
    rows = found["widths"]["16"]
    assert set(rows) == {
        *("sb3", "like_for_like", "like_for_like_bf16"),
        *("layer_norm", "layer_norm_bf16", "default", "default_bf16"),
    }
    for name, row in rows.items():
        assert len(row["updates_per_second"]) == 2 and min(row["updates_per_second"]) > 0
        if name != "sb3":
            for ours, theirs, ratio in zip(
                row["updates_per_second"], rows["sb3"]["updates_per_second"], row["ratios"]
            ):
                assert ratio == pytest.approx(ours / theirs, rel=0.01)
            assert row["ratio"] == pytest.approx(sum(row["ratios"]) / 2, abs=0.002)  # the median of two
    assert "| 3x16 | sb3 |" in (output / "engine.md").read_text()


def test_compiled_beside_eager(monkeypatch):
    """Real turns of both; the compiler's backend is the one that needs no C++ compiler."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, options: compile_(f, backend="eager"))
    row = measure(DSRLSACConfig, 16, repetitions=2, updates=2)
    assert row["compiled"] and len(row["ratios"]) == 2
    assert row["ratio"] == pytest.approx(sum(row["ratios"]) / 2, abs=0.002)
    assert "| `dsrl_sac` | 3x16 |" in compiled_table({"dsrl_sac": {"16": row}})


def test_updates_of_each_algorithm_beside_dsrl_sac():
    rows = measure_updates(16, repetitions=2, updates=2)
    assert list(rows) == [
        f"{name}{end}" for name in ("dsrl_sac", "dsrl_na", "best_of_n") for end in ("", "_bf16")
    ]
    assert all(row["ms"] > 0 and len(row["ratios"]) == 2 for row in rows.values())
    assert rows["dsrl_sac"]["ratios"] == rows["dsrl_sac_bf16"]["ratios"] == [1.0, 1.0]
    assert rows["best_of_n"]["ratio"] > 1
    assert "| 3x16 | `dsrl_na_bf16` |" in updates_table({"16": rows})


def test_one_process_is_timed_from_its_first_update_on(tiny_base, tmp_path):
    job = Job(str(tiny_base), "drawer-close-v3", 20, "dsrl_sac", 2, 150, 0.5, str(tmp_path / "found.json"))
    started = time.perf_counter()
    work(job)
    elapsed = time.perf_counter() - started
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["env_steps_per_second"] > 20 / elapsed  # of 150 steps, learning begins within the first 130
    # Chunks of at most 8 steps, the last of an episode 4: one transition for each, half an update for that.
    assert 0.5 / 8 <= found["updates_per_env_step"] <= 0.5 / 4
    assert set(found["shares"]) == {f"seconds_share/{n}" for n in ("learner_waits", "envs_wait", "denoise")}


@pytest.mark.skipif(not os.environ.get("TRIMTAB_PROCESSES"), reason="takes minutes; set TRIMTAB_PROCESSES=1")
def test_two_processes_beside_one(tiny_base, tmp_path, capsys):
    output = tmp_path / "bench"
    few = ["--env_steps=150", "--repetitions=1", "--num_envs=2", "--updates_per_transition=0.5"]
    argv = ["bench", "--what=processes", f"--base={tiny_base}", *SMALL, *few, f"--output_dir={output}"]
    assert main(argv) == 0
    found = json.loads((output / "processes.json").read_text())
    one, two = (found["processes"][count] for count in ("1", "2"))
    (ratio,) = found["ratios"]
    assert ratio == pytest.approx(two["median"] / one["median"], rel=0.02) and ratio > 0.1
    # A process's own batches per environment step of all: half as many, each of two processes' halves.
    assert two["updates_per_env_step"] == pytest.approx(one["updates_per_env_step"] / 2, rel=0.4)
    assert "processes_wait" in "".join(two["shares"]) and "processes_wait" not in "".join(one["shares"])
    assert "| 2 |" in capsys.readouterr().out
    assert main([*argv, "--algorithm=golden_ticket"]) == 2


def points(*rates):
    return [
        {"grid": 2000 * (i + 1), "actor": {"successes": round(100 * rate), "episodes": 100}}
        for i, rate in enumerate(rates)
    ]


def test_overhead_of_a_steered_policy(tiny_base, tmp_path, capsys):
    adapter, noise = load_adapter(PolicyConfig(path=str(tiny_base), device="cpu")), FullNoiseConfig()
    width = adapter.features(adapter.example_conditioning(1, torch.Generator())).shape[-1]
    actor = NoiseActor(width, noise.build(adapter.noise_spec), ActorConfig(hidden=8, layers=1))
    artefact = tmp_path / "artefact"
    save_artefact(artefact, actor, noise, adapter, PolicyConfig(path=str(tiny_base)), tiny_base, {})
    argv = ["bench", "--what=overhead", f"--artefact={artefact}", "--chunks=4"]
    assert main([*argv, f"--output_dir={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "overhead.json").read_text())
    assert found["setting"]["actions_per_chunk"] == adapter.chunk_shape[0]
    for row in (found, found["policy_alone"]):
        assert row["ratio"] == pytest.approx(row["steered_ms"] / row["base_ms"], abs=2e-2)
        assert 0.2 < row["paired_ratio"] < 5.0
    assert found["policy_alone"]["base_ms"] < found["base_ms"]
    assert "| with processors |" in capsys.readouterr().out
    assert main(["bench", "--what=overhead", f"--artefact={tiny_base}"]) == 2
    assert "--artefact: " in capsys.readouterr().err
    assert main(["bench", "--what=overhead"]) == 2


def test_overhead_compares_medians_and_neighbours():
    """By hand: medians 2 and 3; ratios 1, 1.5, 2, 0.5, 3."""
    row = compare({"base": [1.0, 2.0, 3.0, 2.0, 1.0], "steered": [1.0, 3.0, 6.0, 1.0, 3.0]})
    assert (row["base_ms"], row["steered_ms"], row["ratio"]) == (2000.0, 3000.0, 1.5)
    assert row["paired_ratio"] == 1.5 and row["quartiles"] == [1.0, 2.0]


def test_sustained():
    assert sustained(points(0.5, 0.95, 0.8, 0.9, 0.97), "actor") == 8000
    assert sustained(points(0.9, 0.9), "actor") == 2000
    assert sustained(points(0.95, 0.95, 0.89), "actor") is None
    assert sustained(points(0.1, 0.2, 0.9), "actor") == 6000

    def plain(rates):  # by the definition
        for i in range(len(rates)):
            if all(rate >= 0.9 for rate in rates[i:]):
                return 2000 * (i + 1)
        return None

    rng = np.random.default_rng(0)
    for _ in range(200):
        rates = [float(rate) for rate in rng.choice([0.85, 0.9, 0.95], size=rng.integers(1, 7))]
        assert sustained(points(*rates), "actor") == plain(rates)


def test_p_below_counts_all_ways_to_deal_the_successes():
    for won, of, base_won, base_of in ((0, 3, 4, 5), (1, 4, 3, 4), (3, 3, 1, 5), (0, 2, 0, 4), (2, 5, 2, 3)):
        successes = won + base_won
        deals = list(combinations(range(of + base_of), successes))  # who succeeds
        few = sum(sum(who < of for who in deal) <= won for deal in deals)
        assert p_below(won, of, base_won, base_of) == pytest.approx(float(Fraction(few, len(deals))))
    assert p_below(10, 50, 180, 300) < 1e-6 and p_below(30, 50, 180, 300) > 0.4
    for wrong in ((1, 0, 1, 2), (3, 2, 1, 2), (-1, 2, 1, 2), (1, 2, 3, 2)):
        with pytest.raises(ValueError):
            p_below(*wrong)


def test_dip_against_every_window_by_hand():
    rng = np.random.default_rng(1)
    episodes = [[100 * (i + 1), int(rng.random() < (0.2 if 40 <= i < 80 else 0.7)), 1] for i in range(140)]
    base = {"successes": 195, "episodes": 300}
    found = dip(episodes, base, window=20, until=12_000)
    below, lowest, windows = 0, math.inf, 0
    for start in range(140):
        window = episodes[start : start + 20]
        if len(window) < 20 or window[-1][0] > 12_000:
            continue
        won = sum(success for _, success, _ in window)
        windows += 1
        p = sum(
            math.comb(195 + won, k) * math.comb(320 - 195 - won, 20 - k) for k in range(won + 1)
        ) / math.comb(320, 20)
        below += p <= 0.05
        if won < lowest:
            lowest, at, lowest_p = won, window[-1][0], p
    assert found == {
        "windows": windows,
        "below": below,
        "lowest": lowest / 20,
        "at": at,
        "p": pytest.approx(lowest_p),
    }
    assert windows == 101 and 0 < below < windows
    assert dip(episodes[:19], base, window=20) is None
    assert dip([[i, 1, 1] for i in range(60)], base)["below"] == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("what", "both"),
        ("methods", "best_of_n,magic"),
        ("methods", ","),
        ("seeds", "0,x"),
        ("seeds", "-1"),
        ("widths", "0"),
        ("grid", 30_000),
        ("env_steps", 0),
        ("final_episodes", -1),
        ("chunks", 1),
        ("episode_length", 501),
        ("device", "tpu"),
    ],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(UserError) as error:
        BenchConfig(**{option: value})
    assert error.value.option == f"--{option}"


def test_a_gpu_is_asked_for_where_there_is_one_and_a_use_for_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device: 'cuda' is not usable here"):
        BenchConfig(device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert BenchConfig(device="cuda", what="updates").device == "cuda"
    with pytest.raises(UserError, match="--device: 'cuda' is for --what=samples, engine, updates"):
        BenchConfig(device="cuda", what="compile")


def test_on_a_gpu_the_engine_is_measured_with_graphs_too():
    assert [*variants(CPU)] == [f"{name}{half}" for name in OURS for half in ("", "_bf16")]
    found = variants(torch.device("cuda"))
    assert len(found) == 12
    assert found["default_bf16_graph"] == {
        **{"every": 2, "norm": True},
        **{"precision": "bfloat16", "engine": "cuda_graph"},
    }


def test_bench_needs_a_base_and_keeps_out_of_other_folders(tiny_base, tmp_path, capsys):
    assert main(["bench"]) == 2
    assert "--base" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("hands off")
    assert main(["bench", f"--base={tiny_base}", *SMALL, f"--output_dir={tmp_path}"]) == 2
    assert "--output_dir" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_missing_rival_is_one_line(tiny_base, tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "trimtab.recipes.bench.wrapper", raising=False)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    output = tmp_path / "bench"
    assert main(["bench", f"--base={tiny_base}", *SAMPLES, f"--output_dir={output}"]) == 2
    assert "pip install 'stable-baselines3>=2.9'" in capsys.readouterr().err
