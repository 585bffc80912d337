"""Every recipe, from its files to its last command: parsed as a user's would be, and run on a tiny policy."""

import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from lerobot.envs.utils import preprocess_observation

from tests.benchmarks.full_size import FULL_SIZE, full_size
from trimtab.recipes.cli import COMMANDS, main
from trimtab.recipes.cli.adapt import AdaptConfig
from trimtab.recipes.cli.base import MakeBaseConfig
from trimtab.recipes.cli.compare import CompareConfig
from trimtab.recipes.cli.eval import EvaluateConfig
from trimtab.recipes.cli.export import ExportConfig
from trimtab.recipes.cli.lora import LoraConfig
from trimtab.recipes.cli.probe import ProbeConfig
from trimtab.recipes.cli.recipes import ADAPT, FOLDER, LORA, RECIPES
from trimtab.recipes.compare.from_recipe import FINE_TUNED, LEARN_NOTHING_NEW
from trimtab.recipes.compare.methods import make_method
from trimtab.recipes.embedded_base.suites import suite_tasks
from trimtab.recipes.finetune.training import LAYERS, TuningConfig, default_targets
from trimtab.recipes.support.options import config_file, parse
from trimtab.recipes.support.shared_configs import SELECTION_SEED
from trimtab.rl.envs.metaworld import resolve_task, split_tasks

CONFIGS = {
    "adapt": AdaptConfig,
    "probe": ProbeConfig,
    "eval": EvaluateConfig,
    "export": ExportConfig,
    "lora": LoraConfig,
    "base": MakeBaseConfig,
    "compare": CompareConfig,
}
PLUGIN = "my_droid"  # the environment in openpi_droid's README
FAST = ["--eval.n_episodes=1", "--eval.batch_size=1", "--eval.videos=0"]
ALONE = [*FAST, "--eval.constant_candidates=0"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def read(path):
    return json.loads(path.read_text())


def parsed(command, *args):
    return parse(CONFIGS[command], command, list(args))


@pytest.fixture(scope="module")
def droid(tmp_path_factory):
    """The environment that openpi_droid's README shows, as a package that can be imported."""
    folder = tmp_path_factory.mktemp("plugin")
    text = (FOLDER / "openpi_droid" / "README.md").read_text()
    (folder / PLUGIN).mkdir()
    (folder / PLUGIN / "__init__.py").write_text(re.search(r"```python\n(.*?)```", text, re.S).group(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield [f"--env.discover_packages_path={PLUGIN}", "--env.type=my_droid"]


def given(name, droid):
    return droid if name == "openpi_droid" else []


# A tiny run puts them into Meta-World, with the settings of `metaworld`.
BENCHMARKS = "ogbench", "robomimic"


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in BENCHMARKS])
def test_tiny(name, tmp_path, capsys):
    """Probe, steer, evaluate, export, fine-tune: the recipe's own settings but for size and budget."""
    recipe, file = RECIPES[name], f"--config_path={name}"
    assert main(["probe", file, "--tiny=true", *ALONE, f"--output_dir={tmp_path / 'probe'}"]) == 0
    report = read(tmp_path / "probe" / "probe.json")
    assert report["deterministic"] and report["policy_type"] == recipe.policy_type
    run = tmp_path / "run"
    assert main(["adapt", file, "--tiny=true", *ALONE, f"--output_dir={run}"]) == 0
    check_settings(recipe, read(run / "config.json"))
    assert read(run / "results.json")["updates"] > 0
    artefact = read(run / "artefact" / "config.json")
    assert artefact["base"]["policy_type"] == recipe.policy_type
    cut = "n_action_steps" in recipe.read(ADAPT)["policy"]
    assert (
        artefact["base"]["n_action_steps"] == (2 if cut else None)
        and (artefact["n_action_steps"] == 2) == cut
    )
    again = [f"--policy.path={run / 'artefact'}", f"--output_dir={tmp_path / 'eval'}"]
    assert main(["eval", file, "--tiny=true", *again, *ALONE]) == 0
    assert set(read(tmp_path / "eval" / "results.json")["policies"]) >= {"base", "zero_noise", "steered"}
    assert main(["export", f"--run={run}", "--tiny=true"]) == 0
    assert (run / "export" / "README.md").is_file()
    assert main(["lora", file, "--tiny=true", *FAST, f"--output_dir={tmp_path / 'lora'}"]) == 0
    adapter = read(tmp_path / "lora" / "policy" / "adapter_config.json")
    targets = recipe.read(LORA)["peft"].get("target_modules")
    assert adapter["peft_type"] == "LORA" and (targets is None or adapter["target_modules"] == targets)
    assert read(tmp_path / "lora" / "results.json")["trained_parameters"] > 0
    compared = tmp_path / "compare"
    assert main(["compare", file, "--tiny=true", "--videos=0", f"--output_dir={compared}"]) == 0
    check_comparison(recipe, read(compared / "compare.json"), read(compared / "compare_config.json"))
    assert "steered" in capsys.readouterr().out


def check_comparison(recipe, found, used):
    """Every method has run, what was steered as the recipe says, and what stayed frozen is the base."""
    served = recipe.policy_type == "remote"
    methods = {row["method"] for row in found["methods"]}
    assert methods == {*LEARN_NOTHING_NEW, *(() if served else (FINE_TUNED,))}
    assert used["settings"]["residual"]["rl"]["batch_size"] == 8  # half of the time, at its usual 256
    if recipe.name == "metaworld":  # has a compare.yaml of its own
        return
    said, steered = recipe.read(ADAPT), used["settings"]["steered"]
    assert steered["rl"]["type"] == said["rl"]["type"] and steered["noise"] == said["noise"]
    assert "env_steps" not in steered["train"] and used["env_steps"] == 32
    if not served:
        assert used["settings"][FINE_TUNED]["tuning"]["peft"]["r"] == min(4, recipe.read(LORA)["peft"]["r"])


def check_settings(recipe, used):
    """The tiny run took the recipe's word for all that is neither size nor budget."""
    said = recipe.read(ADAPT)
    for name, value in said["noise"].items():
        assert used["noise"][name] == value, name
    for name, value in said["rl"].items():
        if name not in ("actor", "critic", "batch_size"):
            assert used["rl"][name] == value, name
    for part in ("actor", "critic"):
        for name, value in said["rl"].get(part, {}).items():
            assert name == "hidden" or used["rl"][part][name] == value, name
    inputs = said.get("observe", {}).get("inputs")
    assert inputs is None or used["observe"]["inputs"] == inputs
    assert used["policy"]["path"] != said["policy"]["path"]


@pytest.mark.parametrize("name", RECIPES)
def test_files(name, droid):
    """They are what the commands take, and steering and its baseline get the same policy, task and budget."""
    recipe, file = RECIPES[name], f"--config_path={name}"
    adapt = parsed("adapt", file, *given(name, droid))
    assert adapt.policy.path == recipe.checkpoint and adapt.rl.type == recipe.read(ADAPT)["rl"]["type"]
    probe, evaluated = (parsed(command, file, *given(name, droid)) for command in ("probe", "eval"))
    assert probe.policy == evaluated.policy == adapt.policy and probe.env == evaluated.env == adapt.env
    assert evaluated.eval.n_episodes == adapt.eval.n_episodes and evaluated.machine == adapt.machine
    assert probe.eval.n_episodes == ProbeConfig().eval.n_episodes, "a probe's own"
    assert adapt.eval.seed + adapt.eval.n_episodes < SELECTION_SEED
    lora = parsed("lora", file)
    assert lora.method == "lora"
    compared = parsed("compare", file, *given(name, droid))
    assert compared.policy == adapt.policy and compared.env.type == adapt.env.type
    served = name == "openpi_droid"  # what is there cannot be fine-tuned
    if name != "metaworld":
        assert compared.env_steps == adapt.train.env_steps and compared.observe == adapt.observe
        shorter = parsed("compare", file, *given(name, droid), "--env_steps=1000")
        assert (shorter.env_steps, shorter.grid) == (1000, 100) and shorter.isolate != served
        steered = make_method("steered", compared.settings["steered"])
        assert steered.rl == adapt.rl and steered.noise == adapt.noise
        budgeted = replace(steered.train, env_steps=adapt.train.env_steps)
        assert budgeted.at_pace_of(adapt.rl) == replace(adapt.train, log_every=budgeted.log_every)
        assert (FINE_TUNED in compared.names()) != served
    if served:
        return
    tuned = make_method(FINE_TUNED, compared.settings.get(FINE_TUNED)).tuning
    assert name == "metaworld" or all(
        getattr(tuned, field.name) == getattr(lora, field.name) for field in fields(TuningConfig)
    )
    assert lora.from_rollouts and lora.env_steps == adapt.train.env_steps
    assert asdict(lora.env) == asdict(adapt.env) and lora.policy == adapt.policy


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name].policy_type in FULL_SIZE])
def test_lora_at_published_size(name):
    """The layers that lora.yaml names are there in LeRobot's default size, and as many as the page says."""
    text = (FOLDER / name / "README.md").read_text()
    said = re.search(r"trains ([\d,]+) weights in LeRobot's default size", text)
    if said is None:  # a policy of a size of its own
        assert name in ("metaworld", "ogbench", "robomimic", "your_policy")
        return
    policy, peft = full_size(RECIPES[name].policy_type, "meta", 2)[0].policy, RECIPES[name].read(LORA)["peft"]
    modules = dict(policy.named_modules())
    pattern = peft.get("target_modules") or (policy._get_default_peft_targets() or {}).get("target_modules")
    if pattern:
        chosen = [module for key, module in modules.items() if re.fullmatch(pattern, key)]
    else:
        open_ = {key for key, _ in policy.named_parameters()}
        chosen = [modules[key] for key in default_targets(policy, RECIPES[name].policy_type, open_)]
    assert chosen and all(isinstance(module, LAYERS) for module in chosen)
    weights = [module.weight for module in chosen]
    count = sum(peft["r"] * (len(weight) + weight[0].numel()) for weight in weights)
    assert count == int(said.group(1).replace(",", ""))


def test_the_list_is_instant_and_complete(capsys):
    times = []
    run = "from trimtab.recipes.cli import main; main(['recipes'])"
    code = f"import sys; {run}; print('torch' in sys.modules)"
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        times.append(time.perf_counter() - started)
    assert min(times) < 1.0 and done.stdout.strip().endswith("False")
    for recipe in RECIPES.values():
        assert f"{recipe.name} " in done.stdout and recipe.checkpoint in done.stdout
    assert {path.parent.name for path in FOLDER.glob(f"*/{LORA}")} == set(RECIPES)
    assert {path.parent.name for path in FOLDER.glob(f"*/{ADAPT}")} == {*RECIPES, "gym_mujoco"}
    assert main(["recipes", "pi0_libero"]) == 0
    out = capsys.readouterr().out
    assert str(FOLDER / "pi0_libero" / ADAPT) in out and "trimtab adapt --config_path=pi0_libero" in out
    assert main(["recipes", "pi1_libero"]) == 2
    assert "no recipe 'pi1_libero'; there are diffusion_pusht, " in capsys.readouterr().err
    assert main(["recipes", "--help"]) == 0


def test_the_suite_compares_what_its_base_was_shown():
    base, compared = (parsed(command, "--config_path=metaworld_suite") for command in ("base", "compare"))
    shown, tested, others = (
        split_tasks(tasks) for tasks in (base.tasks, compared.tasks, compared.other_tasks)
    )
    page = (FOLDER / "metaworld_suite" / "README.md").read_text(encoding="utf-8")
    tuned = split_tasks(re.search(r"--tasks=(button\S*)", page)[1])
    assert len(tested) >= 10 and {*tested, *tuned, *others} <= {*shown} and not {*tested} & {*tuned}
    kinds = {operator.kind for operator in base.demonstrators.values()}
    assert kinds == {"careful", "blind_spot", "shift", "clumsy"}
    assert {*map(resolve_task, base.demonstrators)} <= {*shown}


def test_files_of_tasks_without_success():
    """Nothing to fine-tune on, so no recipe with all commands. The files are about the same tasks."""
    file = "--config_path=gym_mujoco"
    base, adapt, compared = (parsed(command, file) for command in ("base", "adapt", "compare"))
    assert compared.tasks == base.tasks == ",".join(suite_tasks("gym_mujoco"))
    assert adapt.policy.path == compared.policy.path.replace("{task}", adapt.env.id)
    assert adapt.train.reward == compared.reward == "env" and adapt.env.success == compared.env.success
    assert adapt.train.env_steps == compared.env_steps
    methods = [make_method(name, compared.settings.get(name)) for name in compared.names()]
    assert all(4 * method.chunks_before_learning() < compared.env_steps for method in methods)


def test_a_name_stands_for_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = FOLDER / "smolvla_libero"
    for command, file in (("adapt", ADAPT), ("eval", ADAPT), ("lora", LORA)):
        assert config_file("smolvla_libero", command) == where / file
    path = "recipes/configs/metaworld/paper_na.yaml"
    assert config_file(path, "adapt") == FOLDER / "metaworld/paper_na.yaml"
    (tmp_path / "smolvla_libero").write_text("seed: 3\n")  # a file of that name comes first
    assert config_file("smolvla_libero", "adapt") == Path("smolvla_libero")


def test_resume_of_a_tiny_run(tmp_path):
    """A tiny pi0 loads only where its narrow classes are; `--tiny` sees to that in a new process, too."""
    from trimtab.adapters import register_adapter
    from trimtab.adapters.lerobot.pi import PI0Adapter

    argv = ["adapt", "--tiny=true", f"--output_dir={tmp_path}"]
    assert main([*argv, "--config_path=pi0_libero", "--checkpoint.every=16", *ALONE]) == 0
    register_adapter("pi0", lambda: PI0Adapter)  # as in a new process
    assert main([*argv, "--resume=true"]) == 0
    again = ["adapt", "--tiny=true", f"--config_path={tmp_path / 'config.json'}", *ALONE]
    assert main([*again, f"--output_dir={tmp_path / 'again'}"]) == 0
    assert read(tmp_path / "again" / "config.json") == read(tmp_path / "config.json")


REFUSED = {
    "a type that is not there": (["adapt", "--tiny=oracle"], "--tiny: no tiny run of a 'oracle' policy"),
    "no recipe": (["adapt", "--tiny=true"], "--policy.path: name a recipe with --config_path"),
    "an unknown checkpoint": (["probe", "--tiny=true", "--policy.path=a/b"], "--tiny: cannot tell the type"),
    "another command": (["demo", "--tiny=true"], "--tiny: has no effect on demo"),
    "lora on a server": (["lora", "--tiny=remote"], "--tiny: no tiny run of a 'remote' policy"),
    "a recipe that is not there": (["adapt", "--config_path=pi7"], "--config_path: there is no file pi7, "),
    "adapt's option": (["probe", "--config_path=metaworld", "--rl.gamma=0.9"], "--rl.gamma: no such option"),
    "no target": (
        ["lora", "--config_path=smolvla_libero", "--tiny=true", "--peft.target_modules=nonsense"],
        "--peft.target_modules: nonsense matches no layer of this smolvla policy",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, message = REFUSED[name]
    assert main(argv) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and message in errors[0], errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["adapt", "probe", "eval", "lora", "compare"])
def test_a_recipe_with_an_unknown_field(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = RECIPES["smolvla_libero"].read(LORA if command == "lora" else ADAPT)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**content, "sped": 3}))
    for tiny in ([], ["--tiny=true"]):
        assert main([command, "--config_path=mine.yaml", *tiny]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(errors) == 1 and "--sped: no such option" in errors[0] and "mine.yaml" in errors[0], errors
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_demonstrations_without_the_policys_features(capsys, tmp_path):
    """A dataset of pusht for a policy that also wants an environment's state."""
    assert (
        main(
            ["lora", "--config_path=diffusion_pusht", "--tiny=true", *FAST, f"--output_dir={tmp_path / 'a'}"]
        )
        == 0
    )
    data = read(tmp_path / "a" / "config.json")["dataset"]
    base = read(tmp_path / "a" / "config.json")["policy"]["path"].replace("pixels", "metaworld_state")
    assert (
        main(["probe", "--config_path=metaworld", "--tiny=true", *ALONE, f"--output_dir={tmp_path / 'b'}"])
        == 0
    )
    argv = [f"--policy.path={base}", "--policy.device=cpu", f"--dataset.repo_id={data['repo_id']}"]
    capsys.readouterr()
    assert main(["lora", *argv, f"--dataset.root={data['root']}", f"--output_dir={tmp_path / 'c'}"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and "has no observation.environment_state, which the policy needs" in errors[0]
    assert not (tmp_path / "c").exists()


def test_what_the_droid_page_says_a_robot_gives_is_what_the_server_is_sent(droid):
    """Through LeRobot's own conversion, to the names in openpi's droid_policy.py."""
    camera = np.zeros((1, 48, 64, 3), np.uint8)
    pixels = {"exterior_image_1_left": camera, "wrist_image_left": camera}
    raw = {"pixels": pixels, "agent_pos": np.zeros((1, 7)), "environment_state": np.zeros((1, 1))}
    text = (FOLDER / "openpi_droid" / "README.md").read_text()
    assert all(f'"{name}"' in text for name in (*raw, *pixels))
    given = preprocess_observation(raw)
    remote = parsed("adapt", "--config_path=openpi_droid", *droid).policy.remote
    assert set(remote.keys) == set(given)
    assert remote.dims == {name: given[name].shape[1] for name in given if given[name].ndim == 2}
    cameras = {f"observation/{name}" for name in pixels}
    assert set(remote.keys.values()) == cameras | {
        "observation/joint_position",
        "observation/gripper_position",
    }


# The READMEs.

BENCHMARK = FOLDER / "gym_mujoco" / "README.md"
FINETUNE = FOLDER.parent / "finetune" / "README.md"
PAGES = [*(FOLDER / name / "README.md" for name in RECIPES), BENCHMARK, FINETUNE]


def commands(text):
    """Commands of a page that start with trimtab or `accelerate launch`, as argument lists."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        if re.match(r"\s*(trimtab|accelerate launch) ", line):
            yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_readmes(page, droid, capsys):
    """Local links lead somewhere, and every command is understood."""
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    found = list(commands(text))
    assert found
    for argv in found:
        if argv[0] == "accelerate":
            assert argv[2] == "--config_file" and (FOLDER.parents[1] / argv[3]).is_file()
            start = argv.index("trimtab.rl.train")
            argv = ["trimtab", "adapt", *argv[start + 1 :]]
        command, args = argv[1], [arg for arg in argv[2:] if not arg.startswith("--tiny=")]
        args += given(page.parent.name, droid) if len(args) < len(argv) - 2 else []  # tiny brings its own
        assert command in COMMANDS
        if command == "recipes":
            assert main(argv[1:]) == 0
        elif not {"--list_tasks=true", "--resume=true"} & set(args):
            parsed(command, *args)
    assert page in (BENCHMARK, FINETUNE) or {"adapt", "probe", "lora"} <= {argv[1] for argv in found}


@pytest.mark.parametrize("name", RECIPES)
def test_readmes_say_what_a_user_has_to_know(name):
    text = (FOLDER / name / "README.md").read_text()
    for heading in ("## Needs", "## Run", "## What to expect", "## What goes wrong", "## Not run"):
        assert heading in text, heading
    assert "--tiny=true" in text and "recipes/configs/accelerate/" in text
