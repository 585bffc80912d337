"""Threads: what the user's environment says wins, the choice is made before torch is loaded and recorded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trimtab.recipes.support import console, shared_configs
from trimtab.recipes.support.shared_configs import MachineConfig
from trimtab.rl.runs.threads import machine_record, spin_briefly, threads_said

# Ends the process where it imports torch, and tells how threads would wait.
SPY = """
import os, sys

class Spy:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Spy())
"""


@pytest.fixture
def plain(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shared_configs, "default_threads", console.default_threads)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "3,2"}, 3),
        ({"MKL_NUM_THREADS": "2"}, 2),
        ({"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "1"}, 3),
        ({"OMP_NUM_THREADS": "0"}, None),
        ({"OMP_NUM_THREADS": "many"}, None),
        ({}, None),
    ],
)
def test_the_environment_says_how_many(values, said, plain, monkeypatch):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert threads_said() == said
    MachineConfig(workers=0).apply()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert torch.get_num_threads() == (said or cores)
    MachineConfig(workers=0, threads=2).apply()
    assert torch.get_num_threads() == 2, "--machine.threads wins over both"


def test_threads_spin_briefly_unless_the_environment_says_how_they_wait(plain, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    spin_briefly()
    assert machine_record() == {"threads": torch.get_num_threads(), "waiting": {"OMP_WAIT_POLICY": "ACTIVE"}}
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    spin_briefly()
    assert machine_record()["waiting"] == {"GOMP_SPINCOUNT": "7"}


def test_a_renderer_that_does_not_exist_is_one_line(tmp_path):
    """MuJoCo refuses to be imported then."""
    command = [TRIMTAB, "base", "--tasks=drawer-close", f"--output_dir={tmp_path / 'base'}"]
    environment = {**os.environ, "MUJOCO_GL": "foo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "--env.type: Meta-World cannot be loaded here: invalid value for environment variable" in lines[0]


TRIMTAB = str(Path(sys.executable).with_name("trimtab"))


@pytest.mark.parametrize(
    "command",
    [[TRIMTAB, "probe"], [TRIMTAB, "demo", "--help"], [sys.executable, "-m", "trimtab.rl.train"]],
    ids=["trimtab", "help", "accelerate"],
)
@pytest.mark.parametrize(
    ("user", "found"),
    [
        ({}, "None 1000"),
        ({"GOMP_SPINCOUNT": "9"}, "None 9"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
    ],
)
def test_every_way_in_decides_before_torch_is_imported(command, user, found, tmp_path, plain):
    (tmp_path / "sitecustomize.py").write_text(SPY)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), **user}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.strip().splitlines()[-1] == found, done.stderr
