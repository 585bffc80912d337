"""stable-baselines3 as a method: its environment is the collector's, its replay right, its run a record."""

import json

import numpy as np
import pytest
import torch

from tests.benchmarks.sb3 import NoiseVecEnv, PriorBox, SB3SACConfig, learn, make_sac, sb3_noise
from tests.helpers.acting import Acts
from tests.helpers.point import PointAdapter, PointConfig
from trimtab.policies.noise_samplers import prior_noise
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.recipes.cli import main
from trimtab.rl.algorithms import DSRLSACConfig
from trimtab.rl.collector import Collector
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.runner import PolicyRunner

GAMMA = 0.9


def choose(features):
    """A noise that depends on the state, within the bound of 2: (B, d) -> (B, 2)."""
    angle = 3.0 * features.sum(-1, keepdim=True)
    return 1.9 * torch.cat([torch.sin(angle), torch.cos(angle)], -1)


@pytest.mark.parametrize("brink", [None, 0.1])
def test_the_rivals_environment_makes_the_collectors_transitions(brink):
    """Same noise in each state: the same observations, rewards, ends and true last observations."""
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


def test_a_comparison_with_it_keeps_what_is_there(tiny_base, tmp_path, capsys):
    output = tmp_path / "compare"
    command = ["compare", "--env.discover_packages_path=tests.benchmarks.sb3", f"--policy.path={tiny_base}"]
    command += ["--policy.device=cpu", "--env.type=metaworld_state", "--env.task=drawer-close"]
    command += ["--env.episode_length=20", "--methods=best_of_n,sb3_sac", "--seeds=0,", "--env_steps=400"]
    command += ["--grid=200", "--n_episodes=4", "--final_episodes=3", "--other_episodes=0", "--batch_size=4"]
    command += ["--num_envs=4", "--machine.workers=0", "--machine.threads=1", "--videos=0"]
    few = {"best_of_n": {"train": {"updates_per_transition": 2}, "rl": {"batch_size": 16}}}
    command += ["--isolate=false", f"--settings={json.dumps(few)}", f"--output_dir={output}"]
    assert main(command) == 0
    folder = output / "runs" / "drawer-close-v3"
    names = ["base.json", "best_of_n-seed0.json", "sb3_sac-seed0.json"]
    assert sorted(path.name for path in folder.glob("*.json")) == names
    for name, policies in (("best_of_n", {"actor", "acting"}), ("sb3_sac", {"actor"})):
        run = json.loads((folder / f"{name}-seed0.json").read_text())
        assert [point["grid"] for point in run["points"]] == [200, 400]
        for point in run["points"]:
            assert {key for key in point if isinstance(point[key], dict)} == policies
            assert point["actor"]["episodes"] == 4
        assert run["final"]["actor"]["episodes"] == 3 and run["cost"]["trainable_parameters"]["actor"] > 1000
        assert len(run["episodes"]) >= 10 and all(step <= 416 for step, _, _ in run["episodes"])
    table = (output / "compare.md").read_text()
    assert "| best_of_n, as deployed |" in table and "| best_of_n, best of K as in training |" in table
    assert table.count("| sb3_sac |") == 2 and (output / "curve.png").stat().st_size > 5000
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    capsys.readouterr()
    assert main([*command, "--methods=sb3_sac"]) == 0  # nothing is run twice
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")} == written
    assert capsys.readouterr().out.count("is there already") == 2
    assert main([*command, "--methods=sb3_sac", "--env_steps=200"]) == 0
    assert "other settings" in capsys.readouterr().out
    changed = {path.name for path in folder.glob("*.json") if path.stat().st_mtime_ns != written[path.name]}
    assert changed == {"sb3_sac-seed0.json"}
