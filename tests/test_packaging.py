"""What pyproject.toml and its neighbours say must agree with each other and with the folders."""

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PLUGIN = "recipes.lerobot_plugin"  # installed as lerobot_policy_trimtab


def test_every_folder_with_code_is_a_listed_package():
    layers = ("adapters", "policies", "rl", "recipes")
    folders = {file.parent.relative_to(ROOT) for layer in layers for file in (ROOT / layer).rglob("*.py")}
    names = {".".join(folder.parts) for folder in folders} - {PLUGIN}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert listed == [*sorted(f"trimtab.{name}" for name in names), "lerobot_policy_trimtab"]


def test_the_citation_names_the_version_and_the_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = PROJECT["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


def test_the_lock_holds_no_address():
    assert "://" not in (ROOT / "requirements.lock").read_text()


def test_ci_runs_the_same_targets_everywhere():
    local = (ROOT / ".ci" / "run").read_text().splitlines()[-2:]
    steps = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["tests"]["steps"]
    assert (
        local
        == ["make lint", "make test"]
        == [step["run"] for step in steps if "make" in step.get("run", "")]
    )
