"""The methods of a comparison: what their names say, what they learn from, and what a run of one leaves."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from lerobot.configs.default import DatasetConfig

from tests.benchmarks.sb3 import SB3SACConfig
from tests.helpers.point import PointAdapter, PointConfig
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.identity import file_hash
from trimtab.recipes.compare.config import METHODS, CompareConfig
from trimtab.recipes.compare.methods import (
    Demonstrations,
    FilteredCloning,
    Steering,
    base_episodes,
    good_demonstrations,
    make_method,
)
from trimtab.recipes.compare.runs import Run
from trimtab.recipes.compare.summary import label
from trimtab.recipes.embedded_base.demonstrations import REPO_ID
from trimtab.recipes.finetune.training import TuningConfig
from trimtab.recipes.support.session import Session
from trimtab.recipes.support.shared_configs import MachineConfig
from trimtab.rl.algorithms import BestOfNConfig, GoldenTicketConfig
from trimtab.rl.algorithms.acting import LoadedBase
from trimtab.rl.algorithms.presets import PAPER
from trimtab.rl.budget import TrainConfig
from trimtab.rl.envs.metaworld import MetaworldStateConfig
from trimtab.rl.evaluation import evaluate


@contextmanager
def begin(adapter, env, folder, dataset=None, **settings):
    """A small run of a comparison; ``folder`` is the base's."""
    small = {"env_steps": 300, "grid": 300, "num_envs": 3, "n_episodes": 4, "final_episodes": 2, "videos": 0}
    config = CompareConfig(**(small | settings))
    session = Session(adapter, env, config.episodes, MachineConfig(workers=0))
    base = LoadedBase(adapter, PolicyConfig(path=str(folder), device="cpu"), folder)
    with session.evaluation_environments() as vec:
        yield Run(config, session, base, vec, "a run", 0, dataset)


def point_run(grid, tmp_path):
    """A short best-of-N run on the point, evaluated every ``grid`` steps."""
    method = Steering(
        BestOfNConfig(num_candidates=4, target_candidates=2, batch_size=16, acting="thompson"),
        train=TrainConfig(first_update=16, warmup_transitions=0, updates_per_transition=1.0),
    )
    with begin(PointAdapter(), PointConfig(), tmp_path, grid=grid) as run:
        found = method.learn(run)
        return found | {
            **{"points": run.points, "episodes": run.episodes, "trained": run.trained},
            "final": run.evaluate(run.config.final_seeds, "final"),
        }


def test_evaluations_leave_the_run_alone(tmp_path):
    often, once_ = point_run(60, tmp_path), point_run(300, tmp_path)
    assert [point["grid"] for point in often["points"]] == [60, 120, 180, 240, 300]
    assert [point["grid"] for point in once_["points"]] == [300]
    assert often["episodes"] == once_["episodes"] and often["updates"] == once_["updates"] > 0
    assert often["points"][-1]["actor"] == once_["points"][-1]["actor"]
    assert often["final"] == once_["final"]
    assert set(often["final"]) == set(often["trained"]) == {"actor", "acting"}
    assert often["final"]["acting"]["episodes"] == 2


@pytest.mark.parametrize("restart", [0.0, 1.0])
def test_the_end_of_a_run_is_evaluated_on_what_has_learnt_anew(restart, tmp_path):
    method = Steering(
        BestOfNConfig(num_candidates=4, target_candidates=2, batch_size=16),
        train=TrainConfig(first_update=16, warmup_transitions=0, updates_per_transition=0.5, restart=restart),
    )
    with begin(PointAdapter(), PointConfig(), tmp_path) as run:
        add_point, seen = run.add_point, []
        run.add_point = lambda *at: (seen.append(run.policies["actor"].actor), add_point(*at))
        method.learn(run)
        assert (run.policies["actor"].actor is not seen[-1]) == bool(restart)


def test_filtered_behaviour_cloning_trains_a_copy_of_the_base(drawer_base):
    env = MetaworldStateConfig(task="drawer-close-v3", episode_length=100)
    adapter = load_adapter(PolicyConfig(path=str(drawer_base), device="cpu"))
    before = {name: value.clone() for name, value in adapter.policy.state_dict().items()}
    hashed = file_hash(drawer_base)
    tuning = TuningConfig(method="full", steps=20, learning_rate=5e-4, batch_size=16)
    small = {"env_steps": 1600, "grid": 800, "num_envs": 4, "n_episodes": 3}
    with begin(adapter, env, drawer_base, **small) as run:
        found = FilteredCloning(tuning).learn(run)
        final = run.evaluate(run.config.final_seeds, "final")
    assert [point["env_steps"] for point in run.points] == [800, 1600]  # to the step
    assert {key for key in run.points[0] if isinstance(run.points[0][key], dict)} == {"actor"}
    assert run.points[0]["actor"]["episodes"] == 3 and final["actor"]["episodes"] == 2
    rounds = {step for step, won, _ in run.episodes if won}  # fine-tuned after each with a success
    assert rounds and found["updates"] == 20 * len(rounds)
    assert run.trained["actor"] == sum(p.numel() for p in adapter.policy.parameters())
    assert all(torch.equal(before[name], value) for name, value in adapter.policy.state_dict().items())
    assert file_hash(drawer_base) == hashed


def test_methods_are_what_their_names_say():
    """The paper's settings, and those that make our SAC stable-baselines3's."""
    paper, short = make_method("dsrl_sac_paper"), make_method("dsrl_sac_paper_short")
    for name, value in PAPER["dsrl_sac"]["rl"].items():
        have = getattr(paper.rl, name)
        if isinstance(value, dict):
            assert all(getattr(have, key) == entry for key, entry in value.items())
        else:
            assert have == value
    assert paper.num_envs == 4 and paper.noise.bound == 1.5 and paper.train.warmup_transitions == 6004
    assert paper.rl == short.rl and short.train.warmup_transitions == short.train.first_update == 800
    assert short.rl.gamma == PAPER["dsrl_sac"]["rl"]["gamma"] and short.rl.backup_entropy
    other = make_method("dsrl_na_paper", reward="env")
    assert other.rl.mode == "exact" and other.num_envs == 4 and other.train.reward == "env"
    row = label({"method": "dsrl_sac_paper_short", "policy": "actor"})
    assert row == "DSRL-SAC, paper's settings, short warm-up"  # 800 of 6004 chunks: not the paper's budget
    ours, theirs = make_method("dsrl_sac_as_sb3"), SB3SACConfig()
    for name in ("learning_rate", "batch_size", "gamma", "tau", "initial_temperature"):
        assert getattr(ours.rl, name) == getattr(theirs, name)
    assert ours.rl.actor.hidden == ours.rl.critic.hidden == theirs.hidden
    assert ours.rl.actor.layers == ours.rl.critic.layers == theirs.layers and ours.rl.actor_every == 1
    assert ours.rl.n_step == 1 and ours.rl.backup_entropy and not ours.rl.critic.layer_norm
    assert ours.rl.target_entropy is None and theirs.target_entropy_per_dim == -0.25  # our default too
    for name in ("warmup_transitions", "updates_per_transition", "replay_capacity"):
        assert ours.settings()["train"][name] == getattr(theirs, name)
    small = {"first_update": 64, "warmup_transitions": 0, "updates_per_transition": 2.0}
    assert make_method("best_of_n").settings()["train"].items() >= small.items()
    methods = {name: make_method(name) for name in METHODS}
    same = {"steered", "best_of_k"}  # further names of best_of_n
    told = {json.dumps([m.settings(), m.uses]) for name, m in methods.items() if name not in same}
    assert len(told) == len(methods) - len(same)


def test_a_method_can_be_changed_by_its_name():
    other = make_method("steered", {"noise": {"type": "repeat"}, "rl": {"actor": {"hidden": 7}}})
    assert other.noise.type == "repeat" and other.rl.actor.hidden == 7
    assert other.rl.critic == make_method("steered").rl.critic
    assert make_method("steered", {"num_envs": 3}).num_envs == 3
    assert make_method("base", None) == make_method("base")


def test_a_search_gets_the_episodes_that_fit_were_all_as_long_as_the_longest(tmp_path):
    with begin(PointAdapter(), PointConfig(limit=35), tmp_path, n_episodes=8) as run:
        session, seeds = run.session, run.session.eval.seeds
        steps = evaluate(session.runner, run.vec, session.own_noise, seeds, progress=False).steps
        found = GoldenTicketConfig(candidates=16, budget=100).within(
            700, lambda: int(base_episodes(run).steps.max())
        )
    assert min(steps) < max(steps) == 35
    assert (found.budget, found.candidates) == (20, 4)  # 4 and 2 of them, twice, are 12; 8, 4 and 2 are 28


def test_fine_tuning_learns_from_the_demonstrations_that_are_named_and_succeed(tiny_base):
    adapter = load_adapter(PolicyConfig(path=str(tiny_base), device="cpu"))
    env = MetaworldStateConfig(task="drawer-close-v3")
    data = DatasetConfig(REPO_ID, root=str(tiny_base / "demonstrations"))

    def good(episodes):
        named = replace(data, episodes=episodes)
        with begin(adapter, env, tiny_base, dataset=named, n_episodes=1) as run:
            return good_demonstrations(run)

    dataset, count = good(None)
    assert count == len(dataset.episodes) > 0
    first, *rest = dataset.episodes
    assert good([first])[0].episodes == [first] and good([first, 99])[1] == 1
    if rest:
        assert good(rest)[0].episodes == rest
    with pytest.raises(UserError, match=r"no demonstration of .* succeeds"):
        good([99])
    assert Demonstrations.uses == ("dataset",)
