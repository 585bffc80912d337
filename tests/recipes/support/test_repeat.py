"""What is needed to repeat a run is kept: plugins, places; and a type named anew brings its own defaults."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import tests.helpers.lane as lane
from tests.helpers.lane import SMALL, TRAIN
from tests.helpers.small_runs import HERE
from trimtab.adapters import UserError
from trimtab.recipes.cli import main
from trimtab.recipes.cli.adapt import AdaptConfig
from trimtab.recipes.support.option_dicts import (
    absolute,
    loaded_plugins,
    merge,
    repeatable,
    without_plugins,
)
from trimtab.recipes.support.options import parse, with_algorithm
from trimtab.rl.algorithms import BestOfNConfig, DSRLNAConfig, DSRLSACConfig
from trimtab.rl.algorithms.presets import PAPER

ROOT = Path(__file__).parents[3]
TRIMTAB = str(Path(sys.executable).with_name("trimtab"))
PLUGIN = "--env.discover_packages_path=tests.helpers.lane"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run started in the folder of its policy, with a plugin and a relative path."""
    root = tmp_path_factory.mktemp("repeat")
    lane.make_lane_policy(root / "base")
    before = Path.cwd()
    os.chdir(root)
    try:
        argv = ["adapt", "--policy.path=base", *SMALL, *TRAIN, "--checkpoint.every=80", "--output_dir=run"]
        assert main([*argv, PLUGIN]) == 0
    finally:
        os.chdir(before)
    return root / "run"


def test_the_config_of_a_run_names_plugin_and_places(run):
    config = json.loads((run / "config.json").read_text())
    assert config["env"]["discover_packages_path"] == "tests.helpers.lane"
    assert config["policy"]["path"] == str(run.parent / "base")
    training = json.loads((run / "artefact" / "config.json").read_text())["training"]
    assert training["plugins"] == {"env.discover_packages_path": "tests.helpers.lane"}
    assert "discover_packages_path" not in training["env"], "LeRobot's config has no such field"


def test_a_run_goes_on_from_another_folder_in_another_process(run, tmp_path):
    """As `trimtab adapt` prints it: the process that goes on has not loaded the environment before."""
    command = [TRIMTAB, "adapt", "--resume=true", f"--output_dir={run}", "--train.env_steps=320", HERE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    assert json.loads((run / "results.json").read_text())["env_steps"] >= 320


def test_the_config_of_a_run_is_evaluated_and_exported(run, capsys):
    argv = ["eval", f"--config_path={run / 'config.json'}", f"--policy.path={run / 'artefact'}", *SMALL[2:]]
    assert main([*argv, f"--output_dir={run.parent / 'eval'}"]) == 0
    assert loaded_plugins() == {"env.discover_packages_path": "tests.helpers.lane"}
    assert main(["export", f"--run={run}", "--policy.device=cpu"]) == 0
    assert "--env.discover_packages_path=tests.helpers.lane --env.type=test_lane" in (
        (run / "export" / "README.md").read_text()
    )
    again = json.loads((run / "export" / "adapt.json").read_text())
    assert again["env"]["discover_packages_path"] == "tests.helpers.lane"
    assert (
        parse(AdaptConfig, "adapt", [f"--config_path={run / 'export' / 'adapt.json'}"]).env.type
        == "test_lane"
    )


def test_a_plugin_that_is_gone_is_named(run, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    config["env"]["discover_packages_path"] = "no_such_package"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["adapt", f"--config_path={tmp_path / 'config.json'}"]) == 2
    assert "--env.discover_packages_path: " in capsys.readouterr().err


def test_the_line_that_refuses_another_algorithm_names_it(run, capsys):
    assert main(["adapt", "--resume=true", f"--output_dir={run}", "--rl.type=best_of_n"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert "--rl.type: " in line and "a run with dsrl_sac, not best_of_n" in line


def test_places_become_absolute_where_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "data", "words", "start.safetensors"):
        (tmp_path / name).mkdir()
    content = {
        "policy": {"path": "base", "tokenizer": "./words", "backbone": "user/not-here", "dtype": None},
        "demos": {"root": "data/../data", "share": 0.5},
        "train": {"warm_start": "start.safetensors"},
        "dataset": {"root": "data"},
        "seed": 0,
    }
    found = absolute(content)
    assert found["policy"] == {
        "path": str(tmp_path / "base"),
        "tokenizer": str(tmp_path / "words"),
        "backbone": "user/not-here",
        "dtype": None,
    }
    assert found["demos"] == {"root": str(tmp_path / "data"), "share": 0.5}
    assert found["train"]["warm_start"] == str(tmp_path / "start.safetensors")
    assert found["dataset"]["root"] == str(tmp_path / "data") and content["policy"]["path"] == "base"
    assert absolute({"policy": {"path": "ws://base:8000"}})["policy"]["path"] == "ws://base:8000"


def test_plugins_of_both_kinds_are_kept(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("my_worlds", "my_policies"):
        (tmp_path / f"{name}.py").write_text("__path__ = []\n")
    argv = ["--policy.discover_packages_path", "my_policies", "--env.discover_packages_path=my_worlds"]
    parse(AdaptConfig, "adapt", [*argv, "--env.type=pusht"])
    kept = repeatable({"env": {"type": "pusht"}, "seed": 1})
    assert kept["env"] == {"type": "pusht", "discover_packages_path": "my_worlds"}
    assert kept["policy"] == {"discover_packages_path": "my_policies"}
    assert without_plugins(kept) == {"env": {"type": "pusht"}, "policy": {}, "seed": 1}
    (tmp_path / "run.yaml").write_text(json.dumps(kept))
    parse(AdaptConfig, "adapt", [f"--config_path={tmp_path / 'run.yaml'}"])
    assert len(loaded_plugins()) == 2
    parse(AdaptConfig, "adapt", ["--env.type=pusht"])
    assert loaded_plugins() == {}


def read(*args):
    """As `adapt` reads its options."""
    return parse(AdaptConfig, "adapt", list(args))


def test_another_algorithm_over_a_recipe(capsys):
    config = read("--config_path=pi0_libero", "--rl.type=best_of_n", "--rl.num_candidates=4")
    assert asdict(config.rl) == asdict(BestOfNConfig(num_candidates=4))
    assert config.env.task == "libero_90" and config.noise.type == "repeat", "all else is the recipe's"
    assert (config.train.env_steps, config.train.updates_per_transition) == (100_000, 20.0)
    said = capsys.readouterr().out
    assert "--rl.type=best_of_n takes its own defaults; of the file's dsrl_sac, left out: rl.gamma" in said
    assert asdict(read("--config_path=pi0_libero", "--rl.type=dsrl_sac").rl)["gamma"] == 0.999


def test_another_algorithm_over_the_config_of_a_run(run):
    """It holds every default of the other, its pace too."""
    path = f"--config_path={run / 'config.json'}"
    config = read(path, "--rl.type=dsrl_na")
    assert asdict(config.rl) == asdict(DSRLNAConfig())
    assert config.train.first_update == 16, "named by the user"
    own = DSRLNAConfig.pace["updates_per_transition"]
    assert config.train.updates_per_transition == own
    saved = json.loads((run / "config.json").read_text())["train"]["updates_per_transition"]
    assert saved == DSRLSACConfig.pace["updates_per_transition"]


def test_other_noise_environment_and_preset(run, tmp_path, capsys):
    path = f"--config_path={run / 'config.json'}"
    config = read(path, "--noise.type=knots", "--noise.knots=2")
    assert (config.noise.type, config.noise.knots) == ("knots", 2)
    assert "left out" not in capsys.readouterr().out, "the run had all of its defaults"
    chosen = json.loads((run / "config.json").read_text())
    chosen["noise"]["bound"] = 2.25
    (tmp_path / "chosen.json").write_text(json.dumps(chosen))
    assert read(f"--config_path={tmp_path / 'chosen.json'}", "--noise.type=knots").noise.type == "knots"
    said = capsys.readouterr().out
    assert said.endswith("takes its own defaults; of the file's full, left out: noise.bound\n")
    assert read(path, "--env.type=pusht").env.type == "pusht"
    config = read(path, "--rl.type=dsrl_na", "--rl.preset=paper")
    assert config.rl.gamma == PAPER["dsrl_na"]["rl"]["gamma"] and config.rl.mode == "exact"
    config = read(path, "--rl.type=golden_ticket")
    assert (config.rl.type, config.noise.type) == ("golden_ticket", "constant")


def merged(content, given):
    below, content, given = with_algorithm(content, given)
    return merge(below, merge(content, given))


def test_a_golden_tickets_noise_goes_with_it():
    content = {"rl": {"type": "golden_ticket"}, "noise": {"type": "constant"}, "train": {"env_steps": 5}}
    best = {"rl": {"type": "best_of_n"}}
    assert merged(content, best) == {**best, "train": {"env_steps": 5}}
    assert merged(content, {"rl": {"type": "golden_ticket"}}) == content
    assert merged({"rl": {"gamma": 0.9}}, best) == {"rl": {"gamma": 0.9, "type": "best_of_n"}}
    assert merged({}, best) == best
    noise = {"noise": {"type": "full"}}
    assert merged({**content, **noise}, {"rl": {"type": "golden_ticket"}})["noise"] == noise["noise"]
    assert merged(noise, {"rl": {"type": "golden_ticket"}})["noise"] == noise["noise"]
    assert merged({**best, **noise}, {"rl": {"type": "golden_ticket"}})["noise"] == {"type": "constant"}
    assert merged(content, {**best, "noise": {"type": "full"}})["noise"] == noise["noise"]


@pytest.mark.parametrize("text", ["noise: full\n", "rl: best\nenv: 3\n", "1: {2: 3}\n", "policy: []\n"])
def test_odd_files_are_still_one_line(text, tmp_path, capsys):
    (tmp_path / "odd.yaml").write_text(text)
    for more in (["--rl.type=golden_ticket", "--env.type=pusht"], ["--rl.preset=paper"], []):
        assert main(["adapt", f"--config_path={tmp_path / 'odd.yaml'}", *more]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_fields_of_another_algorithm_on_the_command_line_are_still_refused():
    with pytest.raises(UserError, match="--rl"):
        read("--config_path=pi0_libero", "--rl.type=dsrl_sac", "--rl.num_candidates=4")
