"""What a command line and a file say is what a command takes: texts, places, groups, and whose they are."""

import errno
import os
from pathlib import Path

import pytest

from tests.helpers.small_runs import HERE
from trimtab.adapters import UserError
from trimtab.recipes.cli import main
from trimtab.recipes.cli.adapt import AdaptConfig
from trimtab.recipes.cli.eval import EvaluateConfig
from trimtab.recipes.cli.lora import LoraConfig
from trimtab.recipes.cli.probe import ProbeConfig
from trimtab.recipes.support.option_dicts import merge, repeatable
from trimtab.recipes.support.options import parse

ENV = "--env.type=test_lane"
CONFIGS = {"adapt": AdaptConfig, "eval": EvaluateConfig, "lora": LoraConfig, "probe": ProbeConfig}


def read(*args):
    import tests.helpers.lane  # noqa: F401  registers the environment

    return parse(AdaptConfig, "adapt", [ENV, *args])


@pytest.mark.parametrize("text", ["pick block #2", "'quoted #3'", '"#4 and #5"', "#6 first", "no. 7"])
def test_a_text_is_taken_whole(text):
    """YAML would end it at the `#`."""
    assert read(f"--env.task={text}").env.task == text.strip("'\"")


@pytest.mark.parametrize("text", ["Task: pick up the cube", "[pick, place]"])
def test_what_yaml_takes_for_more_than_a_text_is_refused(text):
    with pytest.raises(UserError, match=r"--env.task: is a text, which YAML took for .*; quote it twice"):
        read(f"--env.task={text}")
    assert read(f'--env.task="{text}"').env.task == text


def test_home_is_where_the_shell_would_have_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("output_dir: ~/run\npolicy: {path: ~/base, tokenizer: ~/words}\n")
    config = read("--config_path=~/mine.yaml", "--demos.root=~/data", "--from_episodes=~/old")
    assert config.output_dir == tmp_path / "run" and config.from_episodes == tmp_path / "old"
    assert (config.policy.path, config.policy.tokenizer) == (str(tmp_path / "base"), str(tmp_path / "words"))
    assert config.demos.root == str(tmp_path / "data")
    lora = parse(LoraConfig, "lora", [ENV, "--dataset.repo_id=a/b", "--dataset.root=~/d"])
    assert lora.dataset.root == str(tmp_path / "d")


def test_the_episodes_of_a_robot_are_found_again_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("episodes").mkdir()
    assert repeatable({"from_episodes": "episodes"}) == {"from_episodes": str(tmp_path / "episodes")}


def test_what_is_said_to_be_empty_is(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("policy: {rename_map: {a: b}, dtype: float32}\nrl: {type: dsrl_na, gamma: 0.9}\n")
    config = read(f"--config_path={file}", "--policy.rename_map={}")
    assert config.policy.rename_map == {} and config.policy.dtype == "float32"
    assert read(f"--config_path={file}").policy.rename_map == {"a": "b"}
    assert merge({"rl": {"type": "x", "gamma": 1}}, {"rl": {}}) == {"rl": {"type": "x", "gamma": 1}}
    assert merge({"a": {"b": 1}}, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}


def test_a_budget_that_an_algorithm_does_not_spend_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--train.env_steps: has no effect on golden_ticket, which"):
        read("--rl.type=golden_ticket", "--train.env_steps=500")
    (tmp_path / "mine.yaml").write_text("rl: {type: dsrl_sac}\ntrain: {env_steps: 500}\n")
    assert read(f"--config_path={tmp_path / 'mine.yaml'}", "--rl.type=golden_ticket").rl.budget == 500


def test_an_artefacts_base_is_loaded_as_it_was_and_not_as_another_runs_file_says(tmp_path, monkeypatch):
    file = tmp_path / "recipe.yaml"
    file.write_text("policy: {path: other, n_action_steps: 20, dtype: bfloat16, device: cpu}\n")
    for artefact, steps, dtype in ((True, None, None), (False, 20, "bfloat16")):
        monkeypatch.setattr("trimtab.policies.artefact.is_artefact", lambda path, found=artefact: found)
        options = [ENV, f"--config_path={file}", "--policy.path=mine"]
        found = parse(EvaluateConfig, "eval", options).policy
        assert (found.path, found.device, found.n_action_steps, found.dtype) == ("mine", "cpu", steps, dtype)
        said = parse(EvaluateConfig, "eval", [*options, "--policy.n_action_steps=5"])
        assert said.policy.n_action_steps == 5


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS, errno.ENOENT])
@pytest.mark.parametrize("command", ["lora", "probe", "eval", "adapt"])
def test_a_disk_that_the_user_can_mend_is_one_line(number, command, monkeypatch, capsys, tmp_path):
    def fail(config):
        raise OSError(number, os.strerror(number), "/there/x")

    needed = ["--dataset.repo_id=a/b"] if command == "lora" else []
    monkeypatch.setattr(f"trimtab.recipes.cli.{command}.main", fail)
    monkeypatch.setattr("trimtab.recipes.cli.config_class", CONFIGS.get)
    argv = [command, ENV, HERE, *needed]
    if number == errno.ENOENT:  # not one of those: a bug, to be seen whole
        with pytest.raises(FileNotFoundError):
            main(argv)
        return
    assert main(argv) == 2
    assert capsys.readouterr().err.strip() == f"trimtab {command}: error: /there/x: {os.strerror(number)}"
