"""The dataset of a robot's run is whole after each episode, whatever is killed."""

import contextlib
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from tests.helpers.robots import robot_config
from trimtab.adapters.errors import UserError
from trimtab.recipes.support import robot_dataset
from trimtab.recipes.support.robot_dataset import DatasetKeeper, update_dataset, write_dataset
from trimtab.rl.envs.nothing import NoEnvConfig
from trimtab.rl.envs.robot.episodes import RECORD, Chunk, EpisodeRecord

CAMERA = "observation.images.front"
STATE = "observation.state"


@pytest.fixture
def run(tmp_path):
    """A run's folder with two episodes of three steps."""
    for number, outcome in enumerate(("failure", "success")):
        write(tmp_path, number, outcome)
    return tmp_path


def write(run, number, outcome, seed=None, **facts):
    generator = np.random.default_rng(number if seed is None else seed)
    actions = generator.normal(size=(3, 5)).astype(np.float32)
    seen = [
        {
            STATE: generator.normal(size=7).astype(np.float32),
            CAMERA: generator.integers(0, 255, (8, 8, 3)).astype(np.uint8),
        }
        for _ in range(4)
    ]
    chunk = Chunk(actions, actions, np.zeros(3, bool), np.zeros(3), seen)
    EpisodeRecord(number, [chunk], outcome).write(run / "episodes", facts)


def update(run):
    return update_dataset(run / "episodes", run / "dataset", 10, "push")


def read(run):
    """Frames by episode, and the rewards."""
    dataset = LeRobotDataset("a/run", root=run / "dataset")
    frames = [dataset[index] for index in range(len(dataset))]
    return dataset.num_episodes, frames


def test_its_numbers_have_the_robots_names(tmp_path):
    """By which LeRobot leaves a gripper out of relative actions, and replays an episode."""
    names, states = [f"joint_{k}.pos" for k in range(5)], [f"s{k}" for k in range(7)]
    write(tmp_path, 0, "success", names=names, state_names=states)
    update(tmp_path)
    features = LeRobotDataset("a/run", root=tmp_path / "dataset").meta.features
    assert features["action"]["names"] == names and features[STATE]["names"] == states


def correct(run, number, outcome):
    record = run / "episodes" / f"{number:06d}" / RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"outcome": outcome}))


def test_it_has_the_episodes_that_count(run):
    write(run, 2, "abort")
    assert update(run) == 2
    count, frames = read(run)
    assert count == 2 and [frame["episode_index"].item() for frame in frames] == [0, 0, 0, 0, 1, 1, 1]
    assert [frame["next.reward"].item() for frame in frames] == [0.0] * 6 + [1.0]
    record = EpisodeRecord.read(run / "episodes" / "000001")
    for frame, seen, action in zip(
        frames[4:], record.chunks[0].seen, record.chunks[0].executed, strict=False
    ):
        assert np.array_equal(frame[STATE], seen[STATE]) and np.array_equal(frame["action"], action)
        assert np.array_equal((frame[CAMERA].permute(1, 2, 0) * 255).round(), seen[CAMERA])


def test_an_episode_is_appended_and_the_others_stay_as_they_are(run):
    update(run)
    _, before = read(run)
    first = run / "dataset" / "data" / "chunk-000" / "file-000.parquet"
    node = first.stat().st_ino
    write(run, 2, "timeout")
    assert update(run) == 3 and first.stat().st_ino == node
    count, frames = read(run)
    assert count == 3 and len(frames) == len(before) + 4
    assert all(np.array_equal(one[STATE], other[STATE]) for one, other in zip(before, frames, strict=False))
    total = np.stack([frame[STATE] for frame in frames])
    stats = LeRobotDataset("a/run", root=run / "dataset").meta.stats[STATE]
    np.testing.assert_allclose(stats["mean"], total.mean(0), rtol=1e-4)


def test_a_corrected_outcome_writes_it_anew(run):
    update(run)
    correct(run, 0, "success")
    assert update(run) == 2
    count, frames = read(run)
    assert count == 2 and [frame["next.reward"].item() for frame in frames] == [0, 0, 1, 0, 0, 1]
    correct(run, 0, "abort")
    assert update(run) == 1 and read(run)[0] == 1


def test_an_episode_that_was_recorded_anew_takes_the_place_of_the_old(run):
    update(run)
    shutil.rmtree(run / "episodes" / "000001")
    write(run, 1, "success", seed=7)
    update(run)
    there = EpisodeRecord.read(run / "episodes" / "000001").chunks[0].executed[-1]
    assert (read(run)[1][-1]["action"].numpy() == there).all()


def test_a_list_spoilt_by_hand_is_written_anew(run):
    update(run)
    (run / "dataset" / robot_dataset.OF_EPISODES).write_text("{")
    assert update(run) == 2 and read(run)[0] == 2


def test_learning_from_episodes_takes_their_rate_and_their_task(run, tmp_path):
    shutil.rmtree(run / "episodes" / "000000")
    write(run, 0, "failure", fps=12, task="push")
    write_dataset(run / "episodes", NoEnvConfig(), tmp_path / "anew")
    dataset = LeRobotDataset("a/run", root=tmp_path / "anew" / "dataset")
    assert (dataset.fps, dataset[0]["task"]) == (12, "push")


@pytest.mark.parametrize(
    "env, said", [(NoEnvConfig(), "no whole episode"), (robot_config(), "without a robot")]
)
def test_what_cannot_be_learnt_from_episodes_leaves_nothing(run, tmp_path, env, said):
    (run / "episodes" / "000001" / "steps.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match=said):
        write_dataset(run / "episodes", env, tmp_path / "anew")
    assert not (tmp_path / "anew").exists()


def test_nothing_is_written_where_nothing_is_new(run):
    update(run)
    node = (run / "dataset").stat().st_ino
    assert update(run) == 2 and (run / "dataset").stat().st_ino == node


@pytest.mark.parametrize("whole", [True, False])
def test_what_was_killed_is_taken_up(run, whole):
    update(run)
    if whole:  # between the two renames
        shutil.copytree(run / "dataset", run / ".dataset.part")
        (run / "dataset").rename(run / ".dataset.before")
    else:  # in the midst of an episode
        (run / ".dataset.part" / "images").mkdir(parents=True)
    write(run, 2, "timeout")
    assert update(run) == 3 and read(run)[0] == 3
    assert {path.name for path in run.iterdir()} == {"episodes", "dataset", ".dataset.lock"}


def test_what_fails_midway_leaves_the_dataset_as_it_was(run, monkeypatch):
    update(run)
    write(run, 2, "timeout")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lerobot.datasets.dataset_writer.DatasetWriter.save_episode", full)
    with pytest.raises(UserError, match=r"the dataset cannot be written: .*No space left"):
        update(run)
    assert read(run)[0] == 2


def test_a_disk_without_links_will_do(run, monkeypatch):
    def no(*args):
        raise OSError(1, "Operation not permitted")

    update(run)
    write(run, 2, "timeout")
    monkeypatch.setattr("os.link", no)
    assert update(run) == 3 and read(run)[0] == 3


def test_the_process_beside_a_run_that_was_killed_writes_what_is_left(run):
    keeper = DatasetKeeper(SimpleNamespace(fps=10, task="push"), run)
    keeper.written(clock=True)
    assert os.getpriority(os.PRIO_PROCESS, keeper.process.pid) == 19
    with contextlib.suppress(PermissionError):  # the tests beside it would starve it
        os.setpriority(os.PRIO_PROCESS, keeper.process.pid, 0)
    keeper.process.stdin.close()  # as if the run were gone
    assert keeper.process.wait(120) == 0 and read(run)[0] == 2


def test_an_outcome_that_is_none_waits_until_it_is_mended(run, monkeypatch):
    def mended():
        yield "\n"
        assert not (run / "dataset").exists()
        correct(run, 0, "success")

    correct(run, 0, "sucess")
    monkeypatch.setattr("sys.stdin", mended())
    robot_dataset.main(str(run / "episodes"), str(run / "dataset"), "10", "push")
    assert read(run)[0] == 2
