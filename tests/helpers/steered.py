"""A trained actor on a tiny base: its artefact, loaded and fed as LeRobot's commands do."""

import json
from pathlib import Path

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

import lerobot_policy_trimtab  # noqa: F401 - what LeRobot's commands import
from trimtab.adapters import load_adapter
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.artefact import save_artefact
from trimtab.policies.noise_space import FullNoiseConfig

STEERED = get_policy_class("trimtab")


def features_of(adapter):
    return adapter.features(adapter.example_conditioning(1, torch.Generator().manual_seed(0))).shape[-1]


def trained(adapter, noise):
    torch.manual_seed(0)
    actor = NoiseActor(
        features_of(adapter), noise.build(adapter.noise_spec), ActorConfig(hidden=16, layers=2)
    )
    for parameter in actor.net[-1].parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return actor.eval()


def artefact_of(options, out, noise=None, **more):
    adapter, noise = load_adapter(options), noise or FullNoiseConfig()
    actor = trained(adapter, noise)
    save_artefact(out, actor, noise, adapter, options, Path(options.path), {}, **more)
    return adapter, actor


def assert_no_pickle(folder):
    """Every file is text, or all of it is what a safetensors header describes."""
    for file in folder.iterdir():
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            length = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + length])
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            assert len(content) == 8 + length + max(ends), file.name
        elif file.suffix == ".json":
            json.loads(content)
        else:
            assert file.suffix == ".md" and content.decode("utf-8"), file.name


def load(folder, *changes):
    """As LeRobot's commands do, with changes from a command line."""
    config = PreTrainedConfig.from_pretrained(folder, cli_overrides=list(changes))
    return STEERED.from_pretrained(folder, config=config)


def processors(folder, config=None):
    overrides = {
        "device_processor": {"device": "cpu"},
        "rename_observations_processor": {"rename_map": {}},
    }
    config = config or PreTrainedConfig.from_pretrained(folder)
    return make_pre_post_processors(config, pretrained_path=str(folder), preprocessor_overrides=overrides)


def observations(adapter, steps, count=3):
    """Raw observations of ``count`` environments, one after another, as LeRobot's commands make them."""
    generator = torch.Generator().manual_seed(3)
    made = [adapter.example_observation(count, generator) for _ in range(steps)]
    return [{k: v[:, -1] if torch.is_tensor(v) else v for k, v in one.items()} for one in made]
