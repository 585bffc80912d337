"""`trimtab compare`: real runs of every kind, what is kept and made again, and a report that counts right."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.helpers.problem import problem
from trimtab.adapters import NoiseSpec, UserError
from trimtab.policies.actor import ActorConfig
from trimtab.policies.artefact import is_artefact
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.recipes.cli import main
from trimtab.recipes.compare.comparison import Comparison, ended, once, only_option
from trimtab.recipes.compare.config import ALL, METHODS, CompareConfig
from trimtab.recipes.compare.folders import read_runs
from trimtab.recipes.compare.from_recipe import comparison
from trimtab.recipes.compare.methods import make_method
from trimtab.recipes.compare.runs import Meter
from trimtab.recipes.support.option_dicts import read_arguments
from trimtab.recipes.support.options import parse
from trimtab.rl.algorithms import BestOfNConfig

FEW = {"train": {"first_update": 4, "warmup_transitions": 0}}
SETTINGS = {
    "steered": {**FEW, "rl": {"batch_size": 8}},
    "residual": {**FEW, "rl": {"batch_size": 8}},
    "best_of_k": {**FEW, "rl": {"batch_size": 8, "num_candidates": 4, "target_candidates": 2}},
    "lora": {"tuning": {"steps": 2, "batch_size": 4, "peft": {"r": 2}}},
    "lora_rollouts": {"tuning": {"steps": 2, "batch_size": 4, "peft": {"r": 2}}},
}
TASK = "drawer-close-v3"


def options(base, output, **more):
    chosen = {
        "policy.path": base,
        "policy.device": "cpu",
        "env.type": "metaworld_state",
        "env.task": "drawer-close",
        "env.episode_length": 8,
        "settings": json.dumps(SETTINGS),
        "env_steps": 48,
        "grid": 24,
        "n_episodes": 2,
        "final_episodes": 3,
        "other_episodes": 2,
        "batch_size": 2,
        "num_envs": 2,
        "videos": 1,
        "isolate": "false",
        "machine.workers": 0,
        "machine.threads": 1,
        "output_dir": output,
    }
    return ["compare", *(f"--{key}={value}" for key, value in (chosen | more).items())]


@pytest.fixture(scope="module")
def compared(tiny_base, tmp_path_factory):
    """One seed of some methods, then two seeds of all; the files' times in between."""
    output = tmp_path_factory.mktemp("compare") / "out"
    first = "base,steered,lora_rollouts"
    assert main(options(tiny_base, output, methods=first, seeds=1)) == 0
    runs = output / "runs" / TASK
    before = {path.name: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    every = "zero_noise,golden_ticket,best_of_k,steered,lora,lora_rollouts,residual"
    assert main(options(tiny_base, output, methods=every, seeds=2, videos=0)) == 0
    return output, before


def test_every_method_has_its_budget_and_its_result(compared):
    output, _ = compared
    runs = output / "runs" / TASK
    for name in ("best_of_k", "steered", "residual", "lora_rollouts"):
        record = json.loads((runs / f"{name}-seed1.json").read_text())
        assert [point["grid"] for point in record["points"]] == [24, 48]
        assert record["points"][-1]["env_steps"] < 48 + 2 * 8 and record["updates"] >= 0
        assert record["cost"]["artefact_bytes"] > 1000 and record["cost"]["cpu_seconds"] > 0
        assert record["cost"]["peak_mb"] > 100 and record["cost"]["trainable_parameters"]["actor"] > 1000
    rollouts = json.loads((runs / "lora_rollouts-seed1.json").read_text())
    assert rollouts["points"][-1]["env_steps"] == 48  # to the step
    ticket = json.loads((runs / "golden_ticket-seed0.json").read_text())
    assert ticket["points"][0]["env_steps"] <= 48 and ticket["search_episodes"] == 48 // 8
    assert json.loads((runs / "lora-seed0.json").read_text())["points"][0]["env_steps"] == 0
    assert {"actor", "acting"} == set(json.loads((runs / "best_of_k-seed0.json").read_text())["final"])
    assert is_artefact(str(runs / "steered-seed1" / "artefact"))
    assert (runs / "lora-seed1" / "policy" / "adapter_model.safetensors").is_file()
    assert (runs / "residual-seed1" / "residual" / "residual.safetensors").is_file()


def test_the_report(compared):
    output, _ = compared
    found = json.loads((output / "compare.json").read_text())["methods"]
    rows = {(row["method"], row["policy"]): row for row in found if row["task"] == TASK}
    base = json.loads((output / "runs" / TASK / "base.json").read_text())
    assert rows["base", "policy"]["success"]["episodes"] == 3 and len(base["final"]["policy"]["won"]) == 3
    for name in ("steered", "lora_rollouts", "residual"):
        row = rows[name, "actor"]
        assert row["measure"] == "success" and row["success"]["episodes"] == 3 * len(row["seeds"])
        assert len(row["against_base"]["p"]) == len(row["seeds"])
        assert row["other_tasks"]["episodes"] == 2 * len(row["seeds"])
        off = row["base_afterwards"]
        assert off is None if name == "lora_rollouts" else off["flipped"] == 0 and off["change"] == 0.0
    text = (output / "report.html").read_text()
    assert text.count("data:video/mp4;base64,") >= 2 and "data:image/png;base64," in text
    assert not re.search(r"(src|href)='(?!data:)", text) and "http" not in re.sub(r"base64,[^']*", "", text)
    assert f"## {TASK}" in (output / "compare.md").read_text()
    assert (output / "curve.png").stat().st_size > 5000


def test_what_is_there_is_kept(compared, tiny_base, capsys, monkeypatch):
    output, before = compared
    monkeypatch.chdir(output.parent)  # where the runs' videos are found by a relative path
    runs = output / "runs" / TASK
    # (This test runs after those that read the report, which it makes anew.)
    assert set(before) == {"base.json", "steered-seed0.json", "lora_rollouts-seed0.json"}
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in runs.glob("*.json")}.items()
    made = {path.name: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert len(made) == 2 + 6 * 2
    changed = {**SETTINGS, "steered": {**SETTINGS["steered"], "noise": {"type": "repeat"}}}
    relative = options(tiny_base, output.name, methods="steered,lora", seeds=1, settings=json.dumps(changed))
    assert main(relative) == 0
    assert (output / "report.html").read_text().count("data:video/mp4;base64,") >= 1
    said = capsys.readouterr().out
    assert "lora-seed0.json is there already" in said and "steered-seed0.json was made with other" in said
    now = {path.name: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert {name for name in now if now[name] != made[name]} == {"steered-seed0.json"}
    record = json.loads((runs / "steered-seed0.json").read_text())
    assert record["settings"]["method"]["noise"]["type"] == "repeat"


def test_another_base_or_dataset_of_the_same_name_is_not_taken_for_the_one_before(tiny_base, tmp_path):
    """What else decides what a policy does, and what demonstrations hold, lies beside weights and names."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))

    def found():
        given = options(folder, tmp_path / "out", methods="base,lora", videos=0)[1:]
        made = Comparison(parse(CompareConfig, "compare", given))
        return [json.dumps(made.settings(TASK, name, seed)) for name, seed in (("base", None), ("lora", 0))]

    before = found()
    assert found() == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_inference_steps": 3}))
    other = found()
    assert all(one != two for one, two in zip(before, other, strict=True))
    info = folder / "demonstrations" / "meta" / "info.json"
    info.write_text(info.read_text() + " ")
    assert [one == two for one, two in zip(other, found(), strict=True)] == [True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (3, "--settings.steered: is a group of options"),
        ({"train": {"episodes": 5}}, "--settings.steered.train.episodes: is the comparison's: --env_steps,"),
        ({"train": {"log_every": 5}}, "--settings.steered.train.log_every: is the comparison's: --grid,"),
    ],
)
def test_what_a_method_cannot_have_for_itself(changes, message):
    with pytest.raises(UserError, match=message):
        make_method("steered", changes)


PLUGIN = """
from dataclasses import dataclass
from lerobot.envs.configs import EnvConfig
from trimtab.rl.envs.metaworld import MetaworldStateConfig

@EnvConfig.register_subclass("my_drawer")
@dataclass
class MyDrawer(MetaworldStateConfig):
    pass
"""


def test_a_run_of_its_own_process(tiny_base, tmp_path, capfd, monkeypatch):
    """It knows the plugins of the command line, and its options though another command began meanwhile."""
    (tmp_path / "my_drawers").mkdir()
    (tmp_path / "my_drawers" / "__init__.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    more = {"env.type": "my_drawer", "env.discover_packages_path": "my_drawers", "env.task": TASK}
    argv = options(
        tiny_base, tmp_path / "out", methods="base", isolate="true", videos=0, other_episodes=0, **more
    )

    def beside_another(command):
        (tmp_path / "out" / "compare_config.json").write_text("{}")
        return ended(command)

    with monkeypatch.context() as patched:
        patched.setattr("trimtab.recipes.compare.comparison.ended", beside_another)
        assert main(argv) == 0
    record = json.loads((tmp_path / "out" / "runs" / TASK / "base.json").read_text())
    assert record["final"]["policy"]["episodes"] == 3 and record["others"] == {}
    assert record["settings"]["env"]["type"] == "my_drawer"
    assert main([*argv, "--only=drawer-close-v3,steered,0"]) == 2
    assert "--only: 'drawer-close-v3,steered,0' is no run" in capfd.readouterr().err


@pytest.mark.parametrize("task", ["", "place it: left", "no. 1 #2", TASK])
def test_a_run_is_named_whatever_its_task(task):
    assert read_arguments([only_option(task, "base", None)]) == {"only": f"{task},base"}
    assert read_arguments([only_option(task, "lora", 3)]) == {"only": f"{task},lora,3"}


ENV = ["--env.type=metaworld_state", "--env.task=drawer-close-v3"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--policy.path: name the base policy"),
        (["--policy.path=x"], "--env.type: name the environment"),
        (["--policy.path=/nowhere", *ENV], "--policy.path: "),
        (["--methods=base,sac"], "--methods: there is no 'sac'; choose from base, zero_noise"),
        (["--seeds=0,x"], "--seeds: is a list such as 0,1,2"),
        (["--seeds=-1"], "--seeds: is a list such as 0,1,2"),
        (["--reward=dense"], "--reward: 'dense' is none of sparse, env"),
        (["--env_steps=0"], "--env_steps: must be at least 1"),
        (["--final_episodes=0"], "--final_episodes: must be at least 1"),
        (["--grid=3000"], "--grid: --env_steps=20000 must be a multiple"),
        (["--settings={sac: {}}"], "--settings: there is no method 'sac'"),
        ([*ENV, "--config_path=demos.yaml"], "--demos.repo_id: compare replays no demonstrations"),
        (["--policy.path=x", "--robot.type=mujoco_arm"], "--robot.type: people start its episodes"),
        (["--n_episodes=0"], "--n_episodes: must be at least 1"),
        (["--runs=[/nowhere]"], "--runs: there is no folder /nowhere"),
        (
            ["--policy.path=ws://x:1", *ENV],
            "--methods: what is on a policy server cannot be fine-tuned: leave out lora, lora_rollouts",
        ),
    ],
)
def test_bad_options(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demos.yaml").write_text("{train: {env_steps: 800}, demos: {repo_id: a/b}}")
    assert message in refused([*argv, f"--output_dir={tmp_path / 'out'}"], capsys)
    assert not (tmp_path / "out").exists()


def refused(argv, capsys):
    capsys.readouterr()
    assert main(["compare", *argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


def test_bad_settings_and_budgets(tiny_base, tmp_path, capsys):
    argv = [f"--policy.path={tiny_base}", *ENV, f"--output_dir={tmp_path / 'out'}"]
    bad = "--settings={steered: {rl: {gama: 1}}}"
    assert "--settings.steered.rl: " in refused([*argv, "--methods=steered", bad], capsys)
    bad = "--settings={steered: {rl: {gamma: 2}}}"
    assert "--rl.gamma: must be at least 0" in refused([*argv, "--methods=steered", bad], capsys)
    bad = "--settings={steered: {tuning: {}}}"
    assert "'tuning' is none of rl, noise, train" in refused([*argv, "--methods=steered", bad], capsys)
    line = refused([*argv, "--methods=dsrl_sac_paper"], capsys)
    assert "--env_steps: dsrl_sac_paper begins to learn after 6004 chunks of 4 steps" in line
    assert "this base was not trained on hammer-v3" in refused([*argv, "--tasks=hammer"], capsys)
    assert "this base was not trained on hammer-v3" in refused([*argv, "--other_tasks=hammer"], capsys)
    (tmp_path / "bare").mkdir()
    for path in tiny_base.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path / "bare")
    bare = [f"--policy.path={tmp_path / 'bare'}", *ENV, "--methods=lora"]
    assert "--dataset.repo_id: 'lora' learns from demonstrations" in refused(bare, capsys)
    assert not (tmp_path / "out").exists()


def test_once_runs_what_is_missing_or_of_other_settings(tmp_path):
    path, calls = tmp_path / "a" / "run.json", []

    def run():
        calls.append(1)
        return {"value": len(calls)}

    assert once(path, {"x": 1, "y": [2]}, run)["value"] == 1
    assert once(path, {"y": [2], "x": 1}, run)["value"] == 1
    assert once(path, {"x": 2, "y": [2]}, run)["value"] == 2
    assert json.loads(path.read_text())["settings"] == {"x": 2, "y": [2]}


def test_bench_says_what_replaced_it(capsys):
    assert main(["bench", "--what=engine"]) == 2
    said = capsys.readouterr().err
    assert "is gone: `trimtab compare` compares methods" in said and len(said.splitlines()) == 1


def test_names_and_seeds():
    config = CompareConfig(methods="steered,base,steered", seeds="3")
    assert config.names() == ["base", "steered"] and config.seed_list() == [0, 1, 2]
    assert CompareConfig(seeds="4,1").seed_list() == [4, 1]
    assert set(ALL.split(",")) <= set(METHODS)


def summary(won):
    count = won.count("1")
    return {"successes": count, "episodes": len(won), "success_rate": count / len(won), "won": won}


def test_successes_while_learning_are_counted_whole(tmp_path):
    """0.29 of 100 episodes are 29, though 0.29 * 100 is a little less."""
    results = {"policies": {"steered": summary("110")}, "evaluation_seeds": [0, 2], "seed": 3}
    (tmp_path / "results.json").write_text(json.dumps({**results, "env": {"type": "e", "task": "t"}}))
    line = {"success_rate": 0.29, "success_window": 100, "env_steps": 400}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    ((run,), _) = read_runs([tmp_path])
    assert run["points"][0]["actor"] == {
        **{"successes": 29, "episodes": 100, "success_rate": 0.29, "return_mean": None}
    }
    assert (run["task"], run["method"], run["seed"]) == ("t", "steered", 3)


def test_fine_tuning_takes_the_time_of_all_its_parts(tmp_path):
    shared = {"evaluation_seeds": [0, 2], "env": {"type": "e", "task": "t"}, "from_rollouts": True}
    sizes = {"method": "lora", "trained_parameters": 5, "saved_bytes": 7}
    seconds = {"base_evaluation": 100.0, "rollouts": 1.0, "recording": 2.0, "training": 4.0}
    results = {"policies": {"fine_tuned": summary("110")}, **shared, **sizes, "seconds": seconds}
    (tmp_path / "results.json").write_text(json.dumps(results))
    ((run,), _) = read_runs([tmp_path])
    assert run["cost"]["wall_seconds"] == 7.0


def burn(seconds, done):
    """CPU time, most of it the system's; then wait to be told to end."""
    with open("/dev/zero", "rb", buffering=0) as zeros:
        while sum(os.times()[:2]) < seconds:
            zeros.read(1 << 20)
    done.wait()


def test_cpu_time_of_workers_counts_and_stays_when_they_end():
    context, meter = multiprocessing.get_context("fork"), Meter()
    done = context.Event()
    worker = context.Process(target=burn, args=(0.3, done), daemon=True)
    worker.start()
    deadline = time.monotonic() + 30
    while meter.cpu() - time.process_time() < 0.28 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert time.monotonic() < deadline
    done.set()
    worker.join()
    assert meter.cpu() - time.process_time() >= 0.28


@pytest.mark.parametrize("own", [0, 2])
def test_weights_that_best_of_k_needs_are_the_critics_and_the_actors_if_it_proposes(own):
    sizes = {"actor": ActorConfig(hidden=8, layers=1), "critic": CriticConfig(hidden=8, layers=1)}
    config = BestOfNConfig(num_candidates=4, actor_candidates=own, deployed_candidates=1, **sizes)
    space = FullNoiseConfig().build(NoiseSpec((2, 1)))
    learner = config.build(problem(3, space, 4))
    actor, critic = (sum(p.numel() for p in part.parameters()) for part in (learner.actor, learner.critic))
    assert learner.trained_parameters() == {
        "actor": actor,
        "acting": critic + (actor if own else 0),
    }


def test_a_recipe_keeps_what_is_not_the_comparisons_own():
    train = {"env_steps": 1200, "episodes": 40, "log_every": 5, "first_update": 7}
    found = comparison({"train": train, "rl": {"type": "dsrl_sac"}, "eval": {"n_episodes": 9}}, None, False)
    assert found["settings"]["steered"] == {"rl": {"type": "dsrl_sac"}, "train": {"first_update": 7}}
    assert (found["env_steps"], found["n_episodes"], found["final_episodes"]) == (1200, 9, 9)


@pytest.fixture(scope="module")
def folders(tiny_base, tmp_path_factory):
    """A run folder each of adapt and of lora."""
    place = tmp_path_factory.mktemp("folders")
    shared = [f"--policy.path={tiny_base}", "--policy.device=cpu", *ENV, "--env.episode_length=20"]
    shared += ["--eval.n_episodes=3", "--eval.batch_size=3", "--eval.videos=0"]
    shared += ["--machine.workers=0", "--machine.threads=1"]
    adapt = ["--num_envs=2", "--train.env_steps=60", "--train.first_update=8", "--rl.type=dsrl_sac"]
    adapt += ["--rl.batch_size=8", "--train.warmup_transitions=0", "--eval.constant_candidates=0"]
    assert main(["adapt", *shared, *adapt, f"--output_dir={place / 'adapt'}"]) == 0
    data = ["--dataset.repo_id=a/b", f"--dataset.root={tiny_base / 'demonstrations'}", "--steps=2"]
    assert main(["lora", *shared, *data, "--peft.r=2", f"--output_dir={place / 'lora'}"]) == 0
    return place


def test_run_folders(folders, tmp_path):
    output = tmp_path / "out"
    names = f"[{folders / 'adapt'}, {folders / 'lora'}]"
    assert main(["compare", f"--runs={names}", f"--output_dir={output}"]) == 0
    rows = {row["method"]: row for row in json.loads((output / "compare.json").read_text())["methods"]}
    assert set(rows) == {"base", "zero_noise", "dsrl_sac (full)", "lora, demonstrations"}
    steered = rows["dsrl_sac (full)"]
    assert steered["success"]["episodes"] == 3 and len(steered["against_base"]["p"]) == 1
    assert steered["env_steps"][0] >= 60 and steered["artefact_mb"] > 0.1
    assert rows["lora, demonstrations"]["against_base"]["ci95"] and (output / "report.html").is_file()


def test_episodes_that_a_person_began_are_not_paired(folders, tmp_path):
    robot = shutil.copytree(folders / "adapt", tmp_path / "robot")
    results = json.loads((robot / "results.json").read_text())
    assert results["paired"]
    (robot / "results.json").write_text(json.dumps(results | {"paired": False}))
    assert main(["compare", f"--runs=[{robot}]", f"--output_dir={tmp_path / 'out'}"]) == 0
    rows = {one["method"]: one for one in json.loads((tmp_path / "out/compare.json").read_text())["methods"]}
    assert rows["dsrl_sac (full)"]["against_base"] is None
    assert rows["dsrl_sac (full)"]["success"]["episodes"] == 3


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("results.json", {"base_sha256": "other"}, "have not the same base policy"),
        ("config.json", {"env": {"type": "pusht"}}, "have not the same environment"),
        ("results.json", {"evaluation_seeds": [5, 7]}, "was evaluated on seeds [5, 7]"),
        ("results.json", {"env": None}, "was not evaluated in an environment"),
        ("results.json", {}, "is a second run of dsrl_sac (full), seed 0"),
    ],
)
def test_runs_that_cannot_be_compared(file, changes, message, folders, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(folders / "adapt", other)
    content = json.loads((other / file).read_text()) | changes
    (other / file).write_text(json.dumps(content))
    argv = [f"--runs=[{folders / 'adapt'}, {other}]", f"--output_dir={tmp_path / 'out'}"]
    assert message in refused(argv, capsys)
    assert not (tmp_path / "out").exists()
    (other / "results.json").unlink()
    assert "holds no results.json" in refused(argv, capsys)


def test_what_ends_a_comparison_ends_the_run_in_its_own_process():
    """As a job scheduler does it: SIGTERM to the command alone. The exit code is what a shell would say."""
    before = signal.getsignal(signal.SIGTERM)
    end = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    end.start()
    assert ended([sys.executable, "-S", "-c", "import time; time.sleep(60)"]) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert ended([sys.executable, "-S", "-c", "raise SystemExit(2)"]) == 2
