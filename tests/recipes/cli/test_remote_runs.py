"""Whole runs on a policy that only a policy server has, as a user would start them."""

import json
import socket

import pytest

from tests.helpers.small_runs import POLICIES, SMALL, check_results
from trimtab.adapters import PolicyConfig, UserError
from trimtab.policies.artefact import load_artefact
from trimtab.recipes.cli import main

ENV = ["--env.type=pusht", "--env.obs_type=environment_state_agent_pos", "--env.episode_length=24"]
REMOTE = [
    '--policy.remote.keys={"observation.state": "observation/state", '
    '"observation.environment_state": "observation/environment_state"}',
    '--policy.remote.dims={"observation.state": 2, "observation.environment_state": 16}',
    "--policy.remote.n_action_steps=4",
    "--policy.device=cpu",
    "--machine.workers=0",
]
EVAL = ["--eval.n_episodes=4", "--eval.constant_candidates=0", "--eval.videos=0"]


@pytest.fixture(scope="module")
def run(policy_server, tmp_path_factory):
    output = tmp_path_factory.mktemp("remote") / "out"
    argv = ["adapt", f"--policy.path={policy_server}", *ENV, *SMALL, *REMOTE, "--eval.videos=0"]
    assert main([*argv, "--noise.type=repeat", f"--output_dir={output}"]) == 0
    return output


def test_adapt_steers_a_policy_on_a_server(run, policy_server):
    results = check_results(run, POLICIES, 6)
    assert results["env_steps"] >= 120 and results["updates"] > 0 and results["base_sha256"] is None
    base = json.loads((run / "artefact" / "config.json").read_text())["base"]
    assert base["path"] == policy_server and base["policy_type"] == "remote"
    assert len(base["answer"]) == 2 and base["tolerance"] > 0 and base["remote"]["n_action_steps"] == 4


def test_eval_takes_a_server_and_the_artefact_that_steers_it(run, policy_server, tmp_path, capsys):
    argv = ["eval", f"--policy.path={policy_server}", *ENV, *REMOTE, *EVAL]
    assert main([*argv, f"--output_dir={tmp_path / 'base'}"]) == 0
    text = capsys.readouterr().out
    assert f"base policy: {policy_server} (remote, parameters out of sight)" in text
    argv = [
        "eval",
        f"--policy.path={run / 'artefact'}",
        *ENV,
        *EVAL,
        "--policy.device=cpu",
        "--machine.workers=0",
    ]
    assert main([*argv, f"--output_dir={tmp_path / 'steered'}"]) == 0  # the artefact knows how to ask
    base = check_results(tmp_path / "base", POLICIES[:2], 4)["policies"]
    steered = check_results(tmp_path / "steered", [*POLICIES[:2], "steered"], 4)["policies"]
    assert base["base"] == steered["base"]


def test_an_artefact_follows_its_server_to_another_address(run, policy_server, tmp_path):
    artefact = tmp_path / "artefact"
    artefact.mkdir()
    for path in (run / "artefact").iterdir():
        (artefact / path.name).write_bytes(path.read_bytes())
    config = json.loads((artefact / "config.json").read_text())
    config["base"]["path"] = "ws://127.0.0.1:9"
    (artefact / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"nobody listens at ws://127.0.0.1:9"):
        load_artefact(PolicyConfig(path=str(artefact), device="cpu"))
    moved = load_artefact(PolicyConfig(path=str(artefact), device="cpu", base_path=policy_server))
    assert moved.base_folder == policy_server
    moved.adapter.close()
    config["base"]["answer"] = [9.0, 9.0]
    (artefact / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="another policy is served there"):
        load_artefact(PolicyConfig(path=str(artefact), device="cpu", base_path=policy_server))
    config["base"]["answer"] = None
    (artefact / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="steers a policy in a folder, not on a server"):
        load_artefact(PolicyConfig(path=str(artefact), device="cpu", base_path=policy_server))


def test_an_option_of_the_server_leaves_the_others_as_they_were(run, tmp_path, capsys):
    out = [f"--run={run}", "--policy.device=cpu", f"--output_dir={tmp_path / 'out'}"]
    assert main(["export", *out, "--policy.remote.timeout=300"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    remote = config["base"]["remote"]
    assert (remote["timeout"], remote["n_action_steps"], config["n_action_steps"]) == (300, 4, 4)
    assert "observation.environment_state" in remote["keys"] and config["training"]["success"]
    assert main(["export", *out, "--policy.remote.image_size=64"]) == 0
    assert "with another --policy.remote.image_size it is another policy" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["base"]["remote"]["n_action_steps"] == 4 and "success" not in config["training"]


def test_a_run_goes_on_with_a_server_that_rounds_elsewhere_and_with_more_patience(
    policy_server, tmp_path, capsys
):
    server = f"{policy_server}/rounds"
    out = f"--output_dir={tmp_path / 'out'}"
    more = ["--eval.videos=0", "--eval.constant_candidates=0", "--eval.n_episodes=2", "--checkpoint.every=40"]
    assert main(["adapt", f"--policy.path={server}", *ENV, *SMALL, *REMOTE, *more, out]) == 0
    before = json.loads((tmp_path / "out" / "results.json").read_text())["policies"]["base"]
    again = [
        f"--policy.path={server.replace('127.0.0.1', 'localhost')}",
        "--policy.remote.timeout=300",
        "--train.env_steps=160",
    ]
    capsys.readouterr()
    assert main(["adapt", "--resume=true", out, *again]) == 0
    assert "going on from" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["env_steps"] >= 160 and results["policies"]["base"] == before
    assert main(["adapt", "--resume=true", out, f"--policy.path={policy_server}"]) == 0  # rounded, the same
    assert main(["adapt", "--resume=true", out, f"--policy.path={policy_server}/libero"]) == 2


def test_a_server_that_cannot_be_used_is_a_one_line_error(policy_server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"ws://127.0.0.1:{free.getsockname()[1]}"
    cases = [
        (["eval", f"--policy.path={nobody}"], f"--policy.path: nobody listens at {nobody}"),
        (["adapt", f"--policy.path={policy_server}/ignores"], "ignores the noise it is sent"),
        (["eval", f"--policy.path={policy_server}/raises"], "failed: KeyError"),
        (
            ["adapt", f"--policy.path={policy_server}", "--policy.dtype=bfloat16"],
            "--policy.dtype: has no effect",
        ),
    ]
    for argv, message in cases:
        assert main([*argv, *ENV, *REMOTE]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert len(lines) == 1 and message in lines[0], lines
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_fails_during_a_run_ends_it_with_one_line(policy_server, tmp_path, capsys):
    argv = ["adapt", f"--policy.path={policy_server}/fades", *ENV, *SMALL, *REMOTE, "--eval.videos=0"]
    assert main([*argv, f"--output_dir={tmp_path / 'out'}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and "RuntimeError: out of memory" in lines[0]
    assert not (tmp_path / "out" / "artefact").exists()
