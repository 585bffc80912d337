"""Several processes of one run, started as a user would start them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator

from tests.helpers.two_processes import TRAIN, make_trainer

ROOT = Path(__file__).parents[3]
LAUNCH = [
    *(sys.executable, "-m", "trimtab.rl.launch"),  # accelerate launch, but for signals
    *("--config_file", str(ROOT / "recipes" / "configs" / "accelerate" / "cpu_2_processes.yaml"), "-m"),
]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    command = [*LAUNCH, "tests.helpers.two_processes", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENV, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_averaged_and_clipped_gradients_are_those_of_the_union_batch(run):
    for said in run[1]:
        assert set(said["gap"]) == {"critic", "actor", "alpha"}
        for alone, *together in said["gap"].values():
            assert len(together) == 3 and max(together) < 1e-9 < 1e-4 < alone


def test_weights_are_the_same_and_experience_is_not(run):
    first, second = run[1]
    assert first["size"] == second["size"] == 2
    assert first["updates"] == second["updates"] >= 200
    assert first["weights"] == second["weights"]
    assert first["edits"] == second["edits"] is not None
    assert not set(first["seeds"]) & set(second["seeds"])
    assert first["shard"] + second["shard"] == first["transitions"] == second["transitions"]
    assert min(first["shard"], second["shard"]) > 100
    assert first["fitted_on"] == second["fitted_on"] and first["fitted_on"][0] >= 20


def test_sigterm_to_the_launcher_leaves_one_checkpoint_and_exit_code_0(run):
    """The code is asserted where it was run. Both processes stopped at the same chunk, beyond the last of
    the regular checkpoints.
    """
    folder, said = run
    assert [one["stopped"] for one in said] == ["SIGTERM", "SIGTERM"]
    steps = said[0]["env_steps"]
    assert steps == said[1]["env_steps"] and 800 <= steps < 1000
    assert (folder / "checkpoints" / "last").resolve().name == f"{steps:06d}"


def test_one_writes_what_all_have_done(run):
    folder, (first, second) = run
    assert second["lines"] == [] and first["lines"]
    last = first["lines"][-1]
    assert last["env_steps"] >= 800 and last["episodes"] == first["episodes"] == second["episodes"]
    assert last["transitions"] == first["transitions"] and "seconds_processes_wait" in last
    newest = folder / "checkpoints" / "last"
    owns = [json.loads((newest / f"process-{rank}.json").read_text()) for rank in range(2)]
    assert owns[0]["weights"] == owns[1]["weights"]


def test_the_replay_is_resharded_for_another_number_of_processes(run):
    folder, (first, _) = run
    trainer, lines = make_trainer(
        folder / "checkpoints", Accelerator(cpu=True), train=replace(TRAIN, env_steps=1000)
    )
    found, notes = trainer.checkpoints.newest()
    assert not notes and found.processes == 2
    with trainer.vec:
        (note, *_) = trainer.resume(found)
        assert note.startswith(f"the checkpoint is of 2 processes, this run has 1: {first['transitions']}")
        assert len(trainer.replay) == first["transitions"] and trainer.updates == first["updates"]
        assert trainer.collector.rollout.upcoming[0] > max(first["seeds"])
        trainer.run()
    assert trainer.env_steps >= 1000 and lines[-1]["updates"] > first["updates"]
