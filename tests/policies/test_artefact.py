"""Artefacts: every noise space comes back the same, old files act as they did, a constant is small."""

import json
import math
from dataclasses import replace

import draccus
import pytest
import torch

from tests.conftest import make_diffusion
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.files import POSTPROCESSOR, PREPROCESSOR, state_files
from trimtab.policies import artefact
from trimtab.policies.actor import ActorConfig, NoiseActor, constant_actor
from trimtab.policies.artefact import load_artefact, save_artefact
from trimtab.policies.critic import CriticConfig, CriticEnsemble
from trimtab.policies.noise_space import (
    ConstantNoiseConfig,
    FullNoiseConfig,
    KnotNoiseConfig,
    MaskedNoiseConfig,
    NoiseSpaceConfig,
    RepeatNoiseConfig,
    ResidualNoiseConfig,
)
from trimtab.policies.observe import ObserveConfig, build_observer
from trimtab.rl.algorithms.presets import PAPER

FEATURES = 18


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = make_diffusion(tmp_path_factory.mktemp("base") / "diffusion")
    return folder, load_adapter(PolicyConfig(path=str(folder), device="cpu"))


def save(base, out, noise, actor):
    folder, adapter = base
    return save_artefact(out, actor, noise, adapter, PolicyConfig(path=str(folder)), folder, {})


def load(path):
    return load_artefact(PolicyConfig(path=str(path), device="cpu"))


def trained(base, noise):
    torch.manual_seed(0)
    actor = NoiseActor(FEATURES, noise.build(base[1].noise_spec), ActorConfig(hidden=16, layers=2))
    for parameter in actor.net[-1].parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return actor.eval()


@pytest.mark.parametrize(
    "noise",
    [
        FullNoiseConfig(),
        FullNoiseConfig(unit="bound"),
        RepeatNoiseConfig(),
        KnotNoiseConfig(knots=3),
        MaskedNoiseConfig(rows="0:4", columns="01:2"),
        ResidualNoiseConfig(),
        ConstantNoiseConfig(ticket="repeat"),
    ],
    ids=lambda noise: noise.type,
)
def test_every_noise_space_comes_back(base, tmp_path, noise):
    actor = trained(base, noise)
    loaded = load(save(base, tmp_path / "artefact", noise, actor))
    features, prior = torch.randn(4, FEATURES), torch.randn(4, *base[1].noise_spec.shape)
    for deterministic in (False, True):
        noise = actor.act(features, prior, deterministic)
        assert torch.equal(loaded.actor.act(features, prior, deterministic), noise)


def test_live_entries_decide_what_a_masked_actor_steers(base, tmp_path, monkeypatch):
    adapter = base[1]
    live = torch.zeros(adapter.noise_spec.shape, dtype=torch.bool)
    live[2:5] = True
    masked = replace(adapter.noise_spec, live=live)
    monkeypatch.setattr(adapter, "noise_spec", masked)
    monkeypatch.setattr(artefact, "load_adapter", lambda config: adapter)
    actor = trained(base, MaskedNoiseConfig())
    loaded = load(save(base, tmp_path / "artefact", MaskedNoiseConfig(), actor))
    assert torch.equal(loaded.actor.space.steered, live)
    features, prior = torch.randn(4, FEATURES), torch.randn(4, *masked.shape)
    assert torch.equal(loaded.actor.act(features, prior), actor.act(features, prior))


def test_one_noise_is_a_small_artefact(base, tmp_path):
    ticket = torch.randn(base[1].noise_spec.shape)
    noise = ConstantNoiseConfig(bound=1.05 * float(ticket.abs().max()))
    out = save(base, tmp_path / "ticket", noise, constant_actor(ticket, noise.build(base[1].noise_spec)))
    processors = {PREPROCESSOR, POSTPROCESSOR, *state_files(out)}
    own = [file for file in out.iterdir() if file.name not in processors]
    assert sorted(file.name for file in own) == ["config.json", "model.safetensors"]
    assert sum(file.stat().st_size for file in own) < 5_000
    assert sum(file.stat().st_size for file in out.iterdir()) < 12_000
    prior = torch.randn(3, *ticket.shape)
    made = load(out).actor.act(torch.randn(3, FEATURES), prior, deterministic=True)
    assert torch.allclose(made, ticket.expand_as(made), atol=1e-5)


def test_what_the_critic_looks_at_is_kept_though_the_actor_looks_at_nothing(base, tmp_path, monkeypatch):
    folder, adapter = base
    monkeypatch.setattr(adapter, "observer", build_observer(ObserveConfig(inputs=["state"]), adapter, [""]))
    noise, options = ConstantNoiseConfig(), PolicyConfig(path=str(folder))
    actor = constant_actor(torch.zeros(adapter.noise_spec.shape), noise.build(adapter.noise_spec))
    config = CriticConfig(hidden=8, layers=1)
    critic = CriticEnsemble(2, math.prod(adapter.chunk_shape), config)
    for given, kept in ((None, None), ((critic, config), ["state"])):
        out = save_artefact(tmp_path / str(kept), actor, noise, adapter, options, folder, {}, given)
        found = json.loads((out / "config.json").read_text())["observe"]
        assert (found and found["inputs"]) == kept


def test_an_actor_of_the_papers_settings_deploys_the_noise_of_its_training(base, tmp_path):
    settings = PAPER["dsrl_sac"]
    noise = draccus.decode(NoiseSpaceConfig, settings["noise"])
    space = noise.build(base[1].noise_spec)
    torch.manual_seed(0)
    actor = NoiseActor(FEATURES, space, ActorConfig(**settings["rl"]["actor"])).eval()
    torch.nn.init.normal_(actor.net[-1].weight, std=0.3)
    actor.net[-1].bias.data[space.dim :] = torch.linspace(-30.0, 3.0, space.dim)  # past the ends of log_std
    loaded = load(save(base, tmp_path / "artefact", noise, actor))
    assert loaded.config.noise == noise and loaded.config.actor == actor.config
    features, prior = torch.randn(4, FEATURES), torch.randn(4, *base[1].noise_spec.shape)
    with torch.no_grad():
        drawn = actor.sample(features, prior.flatten(1))  # what the losses see
    for deterministic, action in ((False, drawn.u), (True, torch.tanh(drawn.mean))):
        noise = loaded.actor.act(features, prior, deterministic)
        assert torch.allclose(noise.flatten(1), 1.5 * action, atol=1e-5)
    assert noise.abs().max() > 1.0


def test_an_artefact_of_an_older_format_is_refused_in_one_line(base, tmp_path):
    out = save(base, tmp_path / "artefact", FullNoiseConfig(), trained(base, FullNoiseConfig()))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"format": 1}))
    with pytest.raises(UserError, match=r"--policy.path: .*format 1, this version reads 3: steer the base"):
        load(out)


def test_a_setting_of_a_later_version_is_refused(base, tmp_path):
    out = save(base, tmp_path / "artefact", FullNoiseConfig(), trained(base, FullNoiseConfig()))
    config = json.loads((out / "config.json").read_text())
    config["actor"]["wings"] = 2
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"is not an artefact's config .*wings"):
        load(out)
