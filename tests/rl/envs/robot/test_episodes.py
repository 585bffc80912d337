"""Folders of episodes that were broken by hand or by a disk are named in one line."""

import json
import shutil

import numpy as np
import pytest

from trimtab.adapters.errors import UserError
from trimtab.rl.envs.robot.episodes import RECORD, Chunk, EpisodeRecord, episode_folders
from trimtab.rl.envs.robot.outcomes import robot_outcomes


@pytest.fixture
def folder(tmp_path):
    actions, seen = np.zeros((2, 5), np.float32), [{"observation.state": np.zeros(7, np.float32)}] * 3
    chunk = Chunk(actions, actions, np.zeros(2, bool), np.zeros(2), seen)
    return EpisodeRecord(0, [chunk], "failure").write(tmp_path, {})


def test_a_corrected_outcome_is_read(folder):
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | {"outcome": "success"}))
    assert EpisodeRecord.read(folder).outcome == "success"


def test_what_a_person_has_finished_is_no_success_of_the_policy(folder):
    record = json.loads((folder / RECORD).read_text()) | {"outcome": "success", "steered": True}
    for number, steps in enumerate((0, 2)):
        copy = shutil.copytree(folder, folder.with_name(f"{number + 1:06}"))
        (copy / RECORD).write_text(json.dumps(record | {"human_steps": steps}))
    found = robot_outcomes(folder.parent)
    assert found["steered"].successes.tolist() == [True, False] and not found["base"].successes.any()


def test_only_numbers_are_episodes(folder):
    for name in ("000000 copy", "000000.old", "99", "000100"):
        shutil.copytree(folder, folder.with_name(name))
    assert [one.name for one in episode_folders(folder.parent)] == ["000000", "99", "000100"]


@pytest.mark.parametrize("content", ["[]", "{}", '{"outcome": ', '{"cameras": [], "steps": 2, "why": ""}'])
def test_a_record_spoilt_by_hand_is_named(folder, content):
    (folder / RECORD).write_text(content)
    with pytest.raises(UserError, match="000000 is no whole episode"):
        EpisodeRecord.read(folder)


@pytest.mark.parametrize("name", ["steps.safetensors", "chunks.safetensors"])
def test_a_file_cut_short_is_named(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    with pytest.raises(UserError, match="000000 is no whole episode"):
        EpisodeRecord.read(folder)
