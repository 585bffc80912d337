"""The embedded generalist: its data, its training windows, its files, its refusals."""

import json

import numpy as np
import pytest
import torch

from trimtab.adapters import UserError
from trimtab.recipes.embedded_base.base import BaseConfig, cached_base, make_base
from trimtab.recipes.embedded_base.cloning import CloningConfig, make_policy, training_windows, widened
from trimtab.recipes.embedded_base.demonstrations import (
    REPO_ID,
    Operator,
    demonstrate,
    episodes_of,
    start_center,
)
from trimtab.rl.envs.hooks import check_base
from trimtab.rl.envs.metaworld import MetaworldStateConfig, MetaworldStateEnv


@pytest.fixture(scope="module")
def dataset(tiny_base):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset(REPO_ID, root=tiny_base / "demonstrations")


def test_demonstrations_are_a_lerobot_dataset(dataset, tiny_base):
    made = json.loads((tiny_base / "base.json").read_text())
    assert dataset.num_episodes == 6 and dataset.num_frames == made["frames"]
    frame = dataset[0]
    assert frame["observation.state"].shape == (4,)
    assert frame["observation.environment_state"].shape == (85,)
    assert frame["action"].shape == (4,) and frame["action"].abs().max() <= 1
    assert set(dataset.meta.tasks.index) == {"Press a button from the top", "Push and close a drawer"}
    success = np.asarray(dataset.hf_dataset.with_format("numpy")["next.success"][:]).reshape(-1)
    episode = np.asarray(dataset.hf_dataset.with_format("numpy")["episode_index"][:]).reshape(-1)
    ends = [success[episode == e][-1] for e in range(6)]
    assert np.mean(ends[:3]) == made["demonstration_success"]["button-press-topdown-v3"]
    assert np.mean(ends[3:]) == made["demonstration_success"]["drawer-close-v3"]


def test_training_windows_equal_lerobots_own(dataset):
    """LeRobot's dataset with delta timestamps gives the same windows and the same padding."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    fps = dataset.fps
    windows = LeRobotDataset(
        REPO_ID,
        root=dataset.root,
        delta_timestamps={"action": [i / fps for i in range(8)], "observation.state": [0.0]},
    )
    policy, preprocessor, _ = make_policy(dataset.meta, CloningConfig())
    ours = training_windows(dataset, policy.config, preprocessor)
    last = int(dataset.meta.episodes["dataset_to_index"][0]) - 1
    index = torch.tensor([0, 5, last - 3, last, last + 1, len(dataset) - 1])
    batch = ours[index]
    for row, frame in enumerate(index.tolist()):
        item = windows[frame]
        expected = preprocessor({"action": item["action"], "observation.state": item["observation.state"]})
        assert torch.allclose(batch["action"][row], expected["action"].reshape(8, 4), atol=1e-6)
        assert torch.equal(batch["action_is_pad"][row], item["action_is_pad"])
        assert torch.allclose(
            batch["observation.state"][row], expected["observation.state"].reshape(1, 4), atol=1e-6
        )


def test_coordinates_that_stood_still_are_not_magnified(dataset):
    stats = widened(dataset.meta.stats)
    original = dataset.meta.stats["observation.environment_state"]
    low, high = (stats["observation.environment_state"][name] for name in ("min", "max"))
    still = (original["max"] - original["min"]) < 1e-3
    assert still.any() and (high - low)[still].min() >= 1.0
    assert np.array_equal(low[~still], original["min"][~still])


def test_lerobot_loads_and_normalises_the_environment_state(tiny_base):
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    from lerobot.policies.factory import make_pre_post_processors

    policy = DiffusionPolicy.from_pretrained(tiny_base)
    assert policy.config.noise_scheduler_type == "DDIM" and policy.config.prediction_type == "sample"
    pre, post = make_pre_post_processors(policy.config, pretrained_path=str(tiny_base))
    env = MetaworldStateEnv("button-press-topdown-v3")
    observation, _ = env.reset(seed=0)
    raw = torch.as_tensor(observation["environment_state"], dtype=torch.float32)[None]
    batch = pre({"observation.state": torch.zeros(1, 4), "observation.environment_state": raw})
    assert batch["observation.environment_state"].abs().max() <= 3
    assert not torch.allclose(batch["observation.environment_state"], raw)
    assert post(torch.zeros(1, 4, 4)).shape == (1, 4, 4)


def test_operators():
    rng = np.random.default_rng(0)
    careful, spot = Operator(), Operator("blind_spot", 1.0, 0.1, center=0.0)
    assert not careful.error(np.zeros(3), rng).any()
    for x in (-0.05, 0.05):
        error = spot.error(np.array([x, 0.6, 0.0]), rng)
        assert np.sign(error[0]) == np.sign(x) and 0.08 <= abs(error[0]) <= 0.13 and not error[1:].any()
    shift = np.stack([Operator("shift", 1.0, 0.1).error(np.zeros(3), rng) for _ in range(200)])
    sizes = np.linalg.norm(shift, axis=1)
    assert sizes.min() >= 0.05 and sizes.max() <= 0.13 and not shift[:, 2].any()
    assert np.abs(shift.mean(0)).max() < 0.03
    half = [Operator("shift", 0.5, 0.1).error(np.zeros(3), rng).any() for _ in range(400)]
    assert 0.4 < np.mean(half) < 0.6


def test_a_careful_expert_succeeds_and_a_blind_one_misses():
    def rate(operator):
        env, won = MetaworldStateEnv("button-press-topdown-v3", episode_length=160), 0
        for seed in range(8):
            *_, last = demonstrate(env, operator, seed)
            won += last["next.success"][0]
        return won / 8

    assert rate(Operator()) >= 0.9
    assert rate(Operator("blind_spot", 1.0, 0.14, center=0.0)) <= 0.2


def test_center_is_the_middle_of_the_start_states():
    assert abs(start_center(MetaworldStateEnv("button-press-topdown-v3"))) < 0.05


def test_cache_is_found_again_and_keyed_by_everything(tmp_path, capsys):
    config = BaseConfig(
        tasks="reach", demonstrators={}, episodes=1, episode_length=9, cloning=CloningConfig(steps=2)
    )
    folder = cached_base(config, tmp_path)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert cached_base(config, tmp_path) == folder
    assert "(cached)" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    keys = {config.resolved().key(), BaseConfig(tasks="reach", demonstrators={}).resolved().key()}
    assert len(keys) == 2
    assert [p.name for p in tmp_path.iterdir()] == [folder.name], "nothing half-made is left"


def test_interrupted_making_leaves_nothing(tmp_path, monkeypatch):
    from trimtab.recipes.embedded_base import base

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(base, "clone", interrupt)
    config = BaseConfig(tasks="reach", demonstrators={}, episodes=1, episode_length=5).resolved()
    with pytest.raises(KeyboardInterrupt):
        make_base(config, tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_task_that_the_base_does_not_know(tiny_base):
    check_base(MetaworldStateConfig(task="drawer-close"), tiny_base)
    with pytest.raises(
        UserError, match=r"--env.task: this base was not trained on hammer-v3; it knows button"
    ):
        check_base(MetaworldStateConfig(task="hammer-v3"), tiny_base)
    with pytest.raises(UserError, match="no task 'drawr-close'"):
        check_base(MetaworldStateConfig(task="drawr-close"), tiny_base)


def test_damaged_record(tmp_path):
    (tmp_path / "base.json").write_text("{")
    with pytest.raises(UserError, match=r"--policy.path: .*base.json is damaged"):
        check_base(MetaworldStateConfig(task="reach-v3"), tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tasks": "hammer,hammer-v3"}, "--tasks: a task is named twice"),
        ({"tasks": ""}, "--tasks: name at least one"),
        ({"tasks": "hamer"}, "--tasks: Meta-World has no task 'hamer'"),
        ({"tasks": "reach", "demonstrators": {"push": Operator()}}, "--demonstrators: push-v3 is not among"),
        ({"episode_length": 501}, "--episode_length: must be between 1 and 500"),
        ({"seed": 401}, "--seed: must be between 0 and 400"),
        ({"cloning": CloningConfig(horizon=7)}, "--cloning.horizon: must be a multiple of 2"),
        ({"cloning": CloningConfig(down_dims=(30,))}, "--cloning.down_dims: needs positive multiples of 8"),
        ({"episodes": 0}, "--episodes: must be at least 1"),
        ({"cloning": CloningConfig(steps=0)}, "--cloning.steps: must be at least 1"),
        ({"cloning": CloningConfig(n_action_steps=9)}, "cannot exceed --cloning.horizon"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        BaseConfig(**settings).resolved()


@pytest.mark.parametrize(
    "settings", [{"kind": "drunk"}, {"p_bad": 1.5}, {"p_bad": -0.1}, {"offset": -1}, {"noise": -1}]
)
def test_bad_operators(settings):
    with pytest.raises(UserError, match="--demonstrators"):
        Operator(**settings)


def test_a_clumsy_hand_lets_go_once_and_goes_on():
    env = MetaworldStateEnv("pick-place-v3", episode_length=160)
    careful, clumsy = (
        [float(frame["action"][3]) for frame in demonstrate(env, Operator(kind, 1.0, 0.05, noise=0.0), 5)]
        for kind in ("careful", "clumsy")
    )
    env.close()
    apart = next(i for i, (one, other) in enumerate(zip(careful, clumsy, strict=False)) if one != other)
    assert careful[apart] > 0.5 and clumsy[apart : apart + 15] == [-1.0] * 15
    assert max(clumsy[apart + 15 :]) > 0.5  # and grasps again


def test_a_task_has_demonstrations_of_its_own_number():
    operator = Operator(episodes=2)
    assert len(list(episodes_of("reach-v3", operator, 5, 20, 0))) == 2
    with pytest.raises(UserError, match="episodes must be at least 1, got 0"):
        Operator(episodes=0)
