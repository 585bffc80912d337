"""`trimtab export --push_to_hub` with the real client against a small Hub, and back from there."""

import json

import pytest
import torch
from huggingface_hub import HfApi
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from safetensors.torch import load, save

import lerobot_policy_trimtab  # noqa: F401 - what LeRobot's commands import
from tests.helpers.small_hub import small_hub
from tests.helpers.steered import artefact_of, observations
from trimtab.adapters import PolicyConfig, UserError
from trimtab.recipes.cli import main


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with small_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def pushed(hub, pusht_policy, tmp_path):
    """The base on the Hub, and an artefact of it exported there: (export command, adapter, actor)."""
    HfApi().create_repo("me/base")
    HfApi().upload_folder(repo_id="me/base", folder_path=pusht_policy)
    adapter, actor = artefact_of(PolicyConfig(path=str(pusht_policy), device="cpu"), tmp_path / "artefact")
    argv = [
        "export", f"--run={tmp_path / 'artefact'}", f"--output_dir={tmp_path / 'out'}", "--policy.device=cpu",
        "--policy.path=me/base", "--push_to_hub=me/steered",
    ]  # fmt: skip
    return argv, adapter, actor


def test_a_pushed_policy_loads_from_the_hub_and_acts_the_same(hub, pushed, tmp_path, capsys, pusht_policy):
    argv, adapter, actor = pushed
    assert main([*argv, "--private=true"]) == 0
    assert f"pushed to {hub.address}/me/steered" in capsys.readouterr().out
    files = hub.files("me/steered")
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert hub.repos["me/steered"]["private"] and not hub.repos["me/base"]["private"]
    assert "base_model: me/base" in files["README.md"].decode()
    said = json.loads(files["config.json"])["base"]
    assert said["path"] == "me/base" and said["revision"] == hub.repos["me/base"]["main"]

    # From the Hub alone, as `lerobot-eval --policy.path=me/steered` does.
    config = PreTrainedConfig.from_pretrained("me/steered")
    policy = get_policy_class("trimtab").from_pretrained("me/steered", config=config)
    assert (tmp_path / "cache") in policy.steered.base_folder.parents
    before, _ = make_pre_post_processors(config, pretrained_path="me/steered")
    batch = before(observations(adapter, 1)[0])
    timed = {k: torch.stack([v, v], 1) for k, v in batch.items() if k.startswith("observation")}
    conditioning = adapter.encode(timed)
    noise = actor.act(adapter.features(conditioning), torch.zeros(3, *adapter.noise_spec.shape), True)
    assert torch.equal(policy.predict_action_chunk(batch), adapter.denoise(conditioning, noise))

    # What happens to the base later does not touch it: the commit is named.
    other = {name: value + 0.5 for name, value in load(hub.files("me/base")["model.safetensors"]).items()}
    HfApi().upload_file(path_or_fileobj=save(other), path_in_repo="model.safetensors", repo_id="me/base")
    get_policy_class("trimtab").from_pretrained("me/steered")
    for revision, message in (
        ("f" * 40, r"the base policy of .* is not where it was: .*me/base at revision f+ \(RevisionNotFound"),
        ("main", "is not the base that .* steers: its weights have another hash"),
    ):
        changed = PreTrainedConfig.from_pretrained(
            "me/steered", cli_overrides=[f"--base.revision={revision}"]
        )
        with pytest.raises(UserError, match=message) as caught:
            get_policy_class("trimtab").from_pretrained("me/steered", config=changed)
        assert "\n" not in str(caught.value)


def test_what_the_hub_refuses_is_a_one_line_error(hub, pushed, capsys, monkeypatch):
    argv = pushed[0]
    hub.refuses = 403
    assert main(argv) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()  # below the progress of the download
    assert error.startswith("trimtab export: error: --push_to_hub: me/steered cannot be written")
    assert "rights" in error
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert main(argv) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("trimtab export: error: --") and "401" in error
