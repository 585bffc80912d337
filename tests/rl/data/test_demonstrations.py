"""Demonstrations: transitions of a recorded dataset against hand-made ones, and their part in learning."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from tests.conftest import make_diffusion
from tests.helpers.point import PointAdapter, PointConfig, point_dataset
from tests.helpers.problem import problem
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.recipes.cli import main
from trimtab.recipes.embedded_base.demonstrations import (
    SEED_OFFSET,
    Operator,
    demonstrate,
    episodes_of,
    record,
)
from trimtab.rl.algorithms import BestOfNConfig, DSRLNAConfig, DSRLSACConfig
from trimtab.rl.budget import TrainConfig
from trimtab.rl.data.demonstration_data import DemosConfig, read_demonstrations, unreadable
from trimtab.rl.data.demonstrations import Demonstrations, make_transitions
from trimtab.rl.data.replay import Layout, ReplayBuffer
from trimtab.rl.data.returns import Returns, Transition
from trimtab.rl.envs.metaworld import MetaworldStateConfig, MetaworldStateEnv
from trimtab.rl.envs.vector import ChunkVectorEnv
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.trainer import Trainer

FEW = {"num_candidates": 2, "target_candidates": 1, "distilled_pairs": 1}
TASK, GAMMA, LIMIT = "drawer-close-v3", 0.9, 100
OTHER = "button-press-topdown-v3"


def record_with_care(root, tasks, episodes, limit):
    shown = {task: episodes_of(task, Operator(), episodes, limit, 0) for task in tasks}
    record(root, "trimtab/care", MetaworldStateConfig().fps, shown, episodes)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Three demonstrations, which succeed."""
    root = tmp_path_factory.mktemp("demos") / "data"
    record_with_care(root, [TASK], 3, LIMIT)
    return root


@pytest.fixture(scope="module")
def adapter(tiny_base):
    return load_adapter(PolicyConfig(path=str(tiny_base), device="cpu"))


def made(root, adapter, rl=None, reward="sparse", **settings):
    """(data, transitions, what makes them again, so many states at a time)"""
    rl = rl or BestOfNConfig(num_candidates=3, target_candidates=2, gamma=GAMMA, n_step=2)
    task = MetaworldStateEnv(TASK).task_description
    data = read_demonstrations(DemosConfig(root=str(root), **settings), adapter, reward, task)
    space = FullNoiseConfig().build(adapter.noise_spec)
    algorithm = rl.build(problem(4, space, math.prod(adapter.chunk_shape)))  # of features it sees none
    steps = adapter.chunk_shape[0]
    returns = Returns(reward, rl.gamma, rl.discount_per, steps, rl.bootstrap_at_time_limit)
    runner = PolicyRunner(adapter, MetaworldStateConfig())

    def make(size):
        data.config.batch_size = size
        return make_transitions(data, runner, algorithm, returns, None, 5, progress=False)

    return data, make(7), make


def test_transitions_are_those_made_by_hand(recorded, adapter):
    """Frames straight from the simulator, returns by plain loops, chunks led back to actions."""
    data, transitions, _ = made(recorded, adapter)
    steps = adapter.chunk_shape[0]
    unnormalise = adapter.postprocessor
    at = 0
    env = MetaworldStateEnv(TASK, episode_length=LIMIT)
    for episode in range(3):
        frames = list(demonstrate(env, Operator(), SEED_OFFSET + episode))
        length = len(frames)
        assert frames[-1]["next.success"][0] and data.episodes[episode].succeeded
        starts = list(range(0, length, steps))
        features = [
            adapter.features(
                adapter.observe(
                    {
                        key: torch.from_numpy(frame[key])[None, None]
                        for key in ("observation.state", "observation.environment_state")
                    }
                    | {"task": [frame["task"]]}
                )
            )[0].numpy()
            for frame in frames
        ]
        for number, start in enumerate(starts):
            found = transitions[at]
            at += 1
            total, weight, t = 0.0, 1.0, start
            while t < min(start + 2 * steps, length):  # two chunks
                total += weight * (float(frames[t]["next.success"][0]) - 1.0)
                weight *= GAMMA
                t += 1
            last = number + 2 >= len(starts)
            assert found.reward == pytest.approx(total, abs=1e-9)
            assert found.discount == pytest.approx(0.0 if last else weight, abs=1e-12)
            assert np.allclose(found.features, features[start], atol=1e-5)
            if not last:
                assert np.allclose(found.next_features, features[starts[number + 2]], atol=1e-5)
            executed = [frames[min(start + j, length - 1)]["action"] for j in range(steps)]
            chunk = torch.from_numpy(found.extra["chunk"]).unflatten(0, (1, steps, -1))
            assert np.allclose(unnormalise(chunk)[0].numpy(), np.stack(executed), atol=1e-5)
    env.close()
    assert at == len(transitions)


def test_candidates_are_what_the_policy_makes_of_their_noise(recorded, adapter):
    data, transitions, _ = made(recorded, adapter)
    steps = adapter.chunk_shape[0]
    rows = [row for e in data.episodes for row in range(e.first, e.first + len(e.rewards), steps)]
    for transition, row in list(zip(transitions, rows, strict=True))[::5]:
        conditioning = adapter.observe(data.history([row])).repeat_interleave(3)
        noise = torch.from_numpy(transition.extra["candidates_u"]).unflatten(1, adapter.noise_spec.shape)
        chunks = adapter.denoise(conditioning, noise).flatten(1)
        assert np.allclose(chunks, transition.extra["candidates"], atol=1e-4)
        assert np.abs(noise).max() <= 2.0
    assert np.array_equal(transitions[0].extra["next_candidates"], transitions[2].extra["candidates"])


def test_how_many_states_are_looked_at_together_changes_nothing(recorded, adapter):
    _, one, make = made(recorded, adapter)
    for first, second in zip(one, make(100), strict=True):
        assert first.reward == second.reward and np.allclose(first.features, second.features, atol=1e-5)
        assert np.allclose(first.extra["chunk"], second.extra["chunk"], atol=1e-5)


def test_an_episode_without_success_ends_at_a_time_limit(tmp_path, adapter):
    record_with_care(
        tmp_path / "short", [TASK], 1, 11
    )  # 11 actions, steps of 4: the last frame is the final state
    data, transitions, _ = made(
        tmp_path / "short",
        adapter,
        BestOfNConfig(**FEW, n_step=1, gamma=GAMMA),
    )
    episode = data.episodes[0]
    assert not episode.succeeded and len(episode.rewards) == 10 and episode.final == 10
    assert [t.discount for t in transitions] == pytest.approx([GAMMA**4, GAMMA**4, GAMMA**2])
    assert [t.reward for t in transitions] == pytest.approx([-1 - 0.9 - 0.81 - 0.729] * 2 + [-1.9])
    final = adapter.features(adapter.observe(data.history([10])))[0].numpy()
    assert np.allclose(transitions[-1].next_features, final)
    paper = BestOfNConfig(**FEW, n_step=1, bootstrap_at_time_limit=False)
    assert made(tmp_path / "short", adapter, paper)[1][-1].discount == 0.0
    # next.done does not tell a failure from a time limit. Where these do not bootstrap, it counts as one.
    assert made(tmp_path / "short", adapter, paper)[1][-1].reward == pytest.approx(-100.0)
    paper.discount_per = "chunk"
    assert made(tmp_path / "short", adapter, paper)[1][-1].reward == pytest.approx(-400.0)


def test_rewards_of_the_dataset(recorded, adapter):
    rl = BestOfNConfig(**FEW, n_step=1, gamma=GAMMA)
    data, transitions, _ = made(recorded, adapter, rl, "env")
    rewards = np.array(data.dataset.hf_dataset.with_format("numpy")["next.reward"][:]).reshape(-1)
    first = sum(GAMMA**t * rewards[t] for t in range(4))
    assert transitions[0].reward == pytest.approx(first)
    assert sum(t.reward for t in transitions) > 0  # each success pays


def test_without_a_success_column_the_end_succeeds_and_a_line_says_so(tmp_path):
    root = point_dataset(tmp_path / "plain")
    data = read_demonstrations(DemosConfig(root=str(root)), PointAdapter(), "sparse", "reach the goal")
    assert [episode.succeeded for episode in data.episodes] == [True, True]
    assert [len(episode.rewards) for episode in data.episodes] == [10, 7]
    assert "no next.success, so every episode's end counts as success" in data.notes[0]
    assert data.episodes[0].chunk(8, 4).ravel() == pytest.approx([0.16, 0.18, 0.18, 0.18])
    with pytest.raises(UserError, match=r"--demos.success: the dataset has no column next.success"):
        read_demonstrations(DemosConfig(root=str(root), success="column"), PointAdapter(), "sparse", "")
    with pytest.raises(UserError, match=r"--train.reward: env needs the column next.reward"):
        read_demonstrations(DemosConfig(root=str(root)), PointAdapter(), "env", "")


@pytest.mark.parametrize("column, kind", [("next.success", "auto"), ("next.reward", "reward")])
def test_a_success_ends_a_demonstration(tmp_path, column, kind):
    root = point_dataset(tmp_path / "early", columns=(column,), success_at=5, episodes=(10, 4))
    data = read_demonstrations(DemosConfig(root=str(root), success=kind), PointAdapter(), "sparse", "")
    first, second = data.episodes
    assert first.succeeded and len(first.rewards) == 6 and first.final == 6
    assert not second.succeeded and len(second.rewards) == 3 and second.first == 10 and second.final == 13


def rewarded(root, rewards, fps=10, column="next.reward"):
    """A dataset of the point's with a reward for each step of each episode."""
    keys = ("observation.state", "observation.environment_state", "action", column)
    features = {key: {"dtype": "float32", "shape": (1,), "names": None} for key in keys}
    dataset = LeRobotDataset.create("test/point", fps, features, root=root, use_videos=False)
    for episode in rewards:
        for t, reward in enumerate(episode):
            value = np.array([0.01 * t], np.float32)
            frame = dict.fromkeys(keys, value) | {column: np.array([reward], np.float32)}
            dataset.add_frame({**frame, "task": "reach the goal"})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.mark.parametrize(
    ("rewards", "succeeded", "rule"),
    [
        ([[0, 0, 1], [0, 0, 0], [0, 1, 1]], [True, False, True], "0 without success and 1 with"),
        ([[0, 0, 0], [0, 0, 0]], [False, False], "0 without success and 1 with"),
        ([[0, 1, 0, 1], [0, 0]], [True, False], "0 without success and 1 with"),
        ([[-1, -1, 0], [-1, -1, -1]], [True, False], "-1 without success and 0 with"),
        ([[0, 0, 10], [0, 0, 0]], [True, False], "0 without success and 10 with"),
        ([[1, 1, 1], [0, 0, 0]], [True, False], "and 1 with, a label of whole episodes"),
        ([[-1, -1], [-1, -1]], [False, False], "-1 without success and 0 with"),
        ([[0.1, 0.4, 1.0], [0.1, 0.2, 0.3]], [True, True], "a guess"),
        ([[1, 1, 1], [1, 1, 0]], [True, True], "a guess"),  # for each step survived
        ([[0, 0, 10], [0, 5, 0]], [True, True], "a guess"),
    ],
)
def test_a_reward_that_says_success_and_no_other(tmp_path, rewards, succeeded, rule):
    root = rewarded(tmp_path / "data", rewards)
    data = read_demonstrations(DemosConfig(root=str(root)), PointAdapter(), "sparse", "reach the goal")
    assert [episode.succeeded for episode in data.episodes] == succeeded and rule in data.rule
    said = any("next.reward tells more than success" in note for note in data.notes)
    assert said == (rule == "a guess")
    if "label" in rule:
        assert [len(episode.rewards) for episode in data.episodes] == [3, 2], "no step is left out"


@pytest.mark.parametrize("column", ["next.success", "next.is_success", "success"])
@pytest.mark.parametrize("label", [[0, 0, 1], [1, 1, 1]])
def test_success_goes_by_the_names_that_environments_have_for_it(tmp_path, column, label):
    root = rewarded(tmp_path / "data", [label, [0, 0, 0]], column=column)
    data = read_demonstrations(DemosConfig(root=str(root)), PointAdapter(), "sparse", "reach the goal")
    assert [episode.succeeded for episode in data.episodes] == [True, False] and not data.notes
    assert data.rule == column + ", a label of whole episodes" * (label[0] == 1)
    assert data.episodes[0].successes.tolist() == [False, False, True]


@pytest.mark.parametrize(("fps", "warned"), [(50, True), (30, False)])
def test_a_run_says_how_success_was_told_and_warns_of_another_rate(tmp_path, capsys, fps, warned):
    root, config = rewarded(tmp_path / "data", [[0, 0, 1], [0, 0, 0]], fps=fps), PointConfig()
    with ChunkVectorEnv(config, 2, 0) as vec:
        rl = BestOfNConfig(num_candidates=4, target_candidates=2, batch_size=32, **SMALL)
        Trainer(
            PolicyRunner(PointAdapter(), config), vec, Accelerator(cpu=True), TrainConfig(), rl,
            FullNoiseConfig(), 0, demos=DemosConfig(root=str(root)),
        )  # fmt: skip
    said = capsys.readouterr().out
    assert "2 episodes, 1 succeed; " in said and "told by next.reward, which is 0 without success" in said
    assert ("the dataset has 50 frames a second, the environment 30 (--env.fps)" in said) == warned


def old_dataset(root, version="v2.1"):
    """A folder of the format before LeRobot 0.4."""
    rewarded(root, [[0, 1]])
    info = root / "meta" / "info.json"
    content = json.loads(info.read_text()) | {"codebase_version": version}
    info.write_text(json.dumps({name: value for name, value in content.items() if value}))
    return root


@pytest.mark.parametrize(
    ("version", "line"),
    [
        ("v2.0", "its format is v2.0, and LeRobot converts from v2.1 on"),
        ("v1.6", "its format is v1.6, and LeRobot converts from v2.1 on"),
        (None, "its meta/info.json has no codebase_version"),
    ],
)
def test_a_dataset_that_lerobot_does_not_convert(tmp_path, version, line):
    config = DemosConfig(root=str(old_dataset(tmp_path / "old", version)))
    with pytest.raises(UserError, match=line):
        read_demonstrations(config, PointAdapter(), "sparse", "")


def test_an_old_dataset_comes_with_the_command_that_converts_it(tmp_path, tiny_base, capsys):
    root = old_dataset(tmp_path / "old")
    command = f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=me/old --root={root}"
    config = DemosConfig(repo_id="me/old", root=str(root))
    with pytest.raises(UserError) as caught:
        read_demonstrations(config, PointAdapter(), "sparse", "")
    assert "is in 2.1 format" in str(caught.value) and f"{command} --push-to-hub=false" in str(caught.value)
    assert str(caught.value).count("python -m") == 1, "LeRobot's own is for a dataset on the Hub"
    argv = ["lora", f"--policy.path={tiny_base}", "--dataset.repo_id=me/old", f"--dataset.root={root}"]
    assert main([*argv, "--policy.device=cpu", f"--output_dir={tmp_path / 'out'}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert command in line and "\n" not in line
    from lerobot.scripts import convert_dataset_v21_to_v30 as script  # the command is there

    assert "--push-to-hub" in Path(script.__file__).read_text()
    other = unreadable("--demos.root", "me/x", None, ValueError("what is wrong\nand more"))
    assert str(other) == "--demos.root: cannot read me/x as a LeRobotDataset: what is wrong and more"


def test_history_repeats_an_episodes_first_frame(tmp_path):
    adapter = PointAdapter()
    adapter.n_obs_steps = 3
    root = point_dataset(tmp_path / "history")
    data = read_demonstrations(DemosConfig(root=str(root)), adapter, "sparse", "")
    seen = data.history([0, 1, 5, 10, 12])["observation.state"]
    assert seen.shape == (5, 3, 1)
    expected = [[0, 0, 0], [0, 0, 0.01], [0.03, 0.04, 0.05], [0.1, 0.1, 0.1], [0.1, 0.11, 0.12]]
    assert torch.allclose(seen[:, :, 0], torch.tensor(expected))


def test_a_policy_with_a_history_of_two(tmp_path):
    """A real LeRobot policy sees from a dataset what it sees in `select_action`'s queue."""
    adapter = load_adapter(PolicyConfig(path=str(make_diffusion(tmp_path / "policy")), device="cpu"))
    features = {
        "observation.state": {"dtype": "float32", "shape": (2,), "names": None},
        "observation.environment_state": {"dtype": "float32", "shape": (16,), "names": None},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
    }
    dataset = LeRobotDataset.create("test/two", 10, features, root=tmp_path / "data", use_videos=False)
    rng = np.random.default_rng(0)
    frames = [
        {name: rng.uniform(-0.5, 0.5, entry["shape"]).astype(np.float32) for name, entry in features.items()}
        for _ in range(6)
    ]
    for frame in frames:
        dataset.add_frame({**frame, "task": "x"})
    dataset.save_episode()
    dataset.finalize()
    data = read_demonstrations(DemosConfig(root=str(tmp_path / "data")), adapter, "sparse", "x")
    found = adapter.features(adapter.observe(data.history([0, 3])))
    for row, (earlier, now) in zip(found, [(0, 0), (2, 3)], strict=True):
        alone = {
            key: torch.from_numpy(np.stack([frames[earlier][key], frames[now][key]]))[None]
            for key in ("observation.state", "observation.environment_state")
        }
        assert torch.allclose(row, adapter.features(adapter.observe({**alone, "task": ["x"]}))[0], atol=1e-6)


def test_cameras(tmp_path):
    """Pictures of a dataset reach the policy as an environment's do: channels first, between 0 and 1."""
    policy = make_diffusion(tmp_path / "policy", images=True)
    adapter = load_adapter(PolicyConfig(path=str(policy), device="cpu"))
    shapes = {key: feature.shape for key, feature in adapter.config.input_features.items()}
    features = {"action": {"dtype": "float32", "shape": (2,), "names": None}}
    for key, shape in shapes.items():
        camera = len(shape) == 3
        features[key] = {
            "dtype": "image" if camera else "float32",
            "shape": (*shape[1:], 3) if camera else tuple(shape),
            "names": ["height", "width", "channels"] if camera else None,
        }
    dataset = LeRobotDataset.create("test/camera", 10, features, root=tmp_path / "data", use_videos=False)
    rng, frames = np.random.default_rng(0), []
    for _ in range(3):
        frames.append(
            {
                name: rng.integers(0, 256, entry["shape"]).astype(np.uint8)
                if entry["dtype"] == "image"
                else rng.uniform(-0.5, 0.5, entry["shape"]).astype(np.float32)
                for name, entry in features.items()
            }
        )
        dataset.add_frame({**frames[-1], "task": "x"})
    dataset.save_episode()
    dataset.finalize()
    data = read_demonstrations(DemosConfig(root=str(tmp_path / "data")), adapter, "sparse", "x")
    batch = data.history([2])
    for key, shape in shapes.items():
        wanted = np.stack([frames[1][key], frames[2][key]])
        if len(shape) == 3:
            wanted = wanted.transpose(0, 3, 1, 2) / 255.0
        assert np.allclose(batch[key][0].numpy(), wanted, atol=1e-6), key
    assert adapter.features(adapter.observe(batch)).isfinite().all()


def test_only_episodes_of_the_task_take_part(tmp_path, adapter):
    record_with_care(tmp_path / "two", [TASK, OTHER], 2, 9)
    data, _, _ = made(tmp_path / "two", adapter)
    assert [episode.first for episode in data.episodes] == [0, 9]
    assert "2 of 4 episodes are of the task" in data.notes[0]
    nameless = read_demonstrations(DemosConfig(root=str(tmp_path / "two")), adapter, "sparse", "")
    assert "the environment names no task; all 4 take part" in nameless.notes[0]
    named, _, _ = made(tmp_path / "two", adapter, episodes=[1, 3])
    assert len(named.episodes) == 2 and named.history([0])["task"] != named.history([9])["task"]
    with pytest.raises(UserError, match=r"--demos.episodes: the dataset has episodes 0 to 3, got 4"):
        made(tmp_path / "two", adapter, episodes=[4])


def test_what_does_not_fit_is_refused(tmp_path, recorded):
    with pytest.raises(UserError, match=r"--demos.root: there is no folder"):
        made(tmp_path / "none", PointAdapter())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--demos.root: cannot read .* no meta.info.json; it holds nothing"):
        made(tmp_path / "empty", PointAdapter())
    with pytest.raises(UserError, match=r"--demos.root: cannot read .* LeRobotDataset: .*it holds empty"):
        made(tmp_path, PointAdapter())
    with pytest.raises(UserError, match=r"--demos.repo_id: its actions have 4 numbers, the policy's 1"):
        made(recorded, PointAdapter())
    for settings, option in (
        ({"share": 0.0}, "share"),
        ({"schedule": "none"}, "schedule"),
        ({"success": "none"}, "success"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(UserError, match=f"--demos.{option}"):
            DemosConfig(**settings)


def test_processors_that_do_not_lead_back_are_refused(tmp_path):
    adapter = PointAdapter()
    adapter.postprocessor = lambda chunk: 2.0 * chunk
    root = point_dataset(tmp_path / "plain")
    rl = BestOfNConfig(**FEW)
    with pytest.raises(UserError, match=r"--demos.repo_id: .*the critic cannot be told what was executed"):
        made(root, adapter, rl)


def test_mixing():
    def transition(number):
        return Transition(np.full(2, number), np.zeros(1), -1.0, 0.9, np.full(2, number))

    layout = Layout(2, 1)
    replay = ReplayBuffer(10, layout, 0)
    for number in range(3):
        replay.add(transition(number))
    demos = Demonstrations(DemosConfig(root="x", share=0.25), [transition(n) for n in (10, 11)], layout, 0)
    batch = demos.mix(replay, 8, 0.0)
    assert batch["features"].shape == (8, 2)
    assert ((batch["features"][:, 0] >= 10) == torch.tensor([True] * 2 + [False] * 6)).all()
    assert batch["u"][:2].isnan().all() and not batch["u"][2:].isnan().any()
    assert (demos.mix(replay, 8, 0.9)["features"][:, 0] >= 10).sum() == 2
    falling = Demonstrations(DemosConfig(root="x", schedule="linear"), [transition(10)], layout, 0)
    counts = [int((falling.mix(replay, 8, at)["features"][:, 0] >= 10).sum()) for at in (0.0, 0.5, 0.75, 1.0)]
    assert counts == [4, 2, 1, 0]


SMALL = {"actor": ActorConfig(hidden=32, layers=2), "critic": CriticConfig(hidden=32, layers=2)}


@pytest.mark.parametrize(
    "rl",
    [
        BestOfNConfig(num_candidates=4, target_candidates=2, batch_size=32, **SMALL),
        BestOfNConfig(
            num_candidates=4, target_candidates=2, batch_size=32, distillation="regression", **SMALL
        ),
        DSRLNAConfig(num_candidates=4, batch_size=32, **SMALL),
        DSRLNAConfig(num_candidates=4, batch_size=32, bootstrap="noise_critic", **SMALL),
        DSRLNAConfig(mode="exact", batch_size=32, **SMALL),
    ],
    ids=["best_of_n", "regression", "na", "na_noise_critic", "na_exact"],
)
def test_every_algorithm_of_chunks_learns_beside_them_and_none_uses_their_noise(rl, tmp_path):
    """Their ``u`` is NaN, so a finite loss shows that none of it was used."""
    root, lines, config = point_dataset(tmp_path / "plain"), [], PointConfig()
    with ChunkVectorEnv(config, 4, 0) as vec:
        runner = PolicyRunner(PointAdapter(), config)
        train = TrainConfig(env_steps=240, warmup_transitions=20, first_update=20, log_every=40)
        demos = DemosConfig(root=str(root), schedule="linear")
        trainer = Trainer(
            runner,
            vec,
            Accelerator(cpu=True),
            train,
            rl,
            FullNoiseConfig(),
            0,
            lines.append,
            False,
            demos=demos,
        )
        algorithm = trainer.run()
    assert algorithm.updates > 50
    assert len(trainer.demonstrations) == 5 + 4
    assert all(parameter.isfinite().all() for parameter in algorithm.parameters())
    shares = [line["demo_share"] for line in lines]
    assert shares == sorted(shares, reverse=True) and shares[-1] == 0.0


def test_what_no_replay_keeps_is_one_line():
    one = Transition(np.zeros(3), np.zeros(2), np.nan, 0.5, np.zeros(3))
    with pytest.raises(UserError, match=r"--demos.*NaN or Inf in 'reward'.*--demos.episodes"):
        Demonstrations(DemosConfig(root="x"), [one], Layout(3, 2), 0)


def test_statistics_of_the_features_count_demonstrations_too(tmp_path):
    root, config = point_dataset(tmp_path / "plain"), PointConfig()
    with ChunkVectorEnv(config, 4, 0) as vec:
        rl = BestOfNConfig(num_candidates=4, target_candidates=2, batch_size=32, **SMALL)
        train = TrainConfig(env_steps=200, warmup_transitions=20, first_update=20)
        trainer = Trainer(
            PolicyRunner(PointAdapter(), config), vec, Accelerator(cpu=True), train, rl, FullNoiseConfig(), 0,
            progress=False, demos=DemosConfig(root=str(root)),
        )  # fmt: skip
        seen, fit = [], trainer.algorithm.fit_normalizer
        trainer.algorithm.fit_normalizer = lambda features: (seen.append(features.clone()), fit(features))
        trainer.run()
    ours = trainer.demonstrations.all_features()
    assert torch.equal(seen[0][-len(ours) :], ours) and len(seen[0]) >= 20 + len(ours)


def test_dsrl_sac_cannot_use_them(tmp_path, tiny_base, recorded, capsys):
    with pytest.raises(UserError, match=r"--demos.repo_id: dsrl_sac cannot learn from demonstrations"):
        DemosConfig(root="x").check(DSRLSACConfig())
    DemosConfig().check(DSRLSACConfig())
    argv = ["adapt", f"--policy.path={tiny_base}", "--env.type=metaworld_state", f"--env.task={TASK}"]
    argv += ["--policy.device=cpu", f"--demos.root={recorded}", f"--output_dir={tmp_path / 'out'}"]
    assert main([*argv, "--rl.type=dsrl_sac"]) == 2
    assert "--demos.repo_id: dsrl_sac cannot learn" in capsys.readouterr().err
    assert main([*argv, "--rl.type=best_of_n", "--demos.episodes=[7]"]) == 2
    assert "--demos.episodes: the dataset has episodes 0 to 2, got 7" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
