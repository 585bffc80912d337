"""The artefact as a LeRobot policy: steers as in training, is the plain base on request, refuses rubbish."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_policy
from safetensors.torch import load_file, save_file

import lerobot_policy_trimtab  # noqa: F401 - what LeRobot's commands import
from tests.conftest import make_diffusion
from tests.helpers.adapter_cases.lingbot_va import frames, history
from tests.helpers.lora_folder import make_lora
from tests.helpers.steered import (
    STEERED,
    artefact_of,
    assert_no_pickle,
    features_of,
    load,
    observations,
    processors,
)
from tests.helpers.tiny import make_tiny
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.policies.actor import constant_actor
from trimtab.policies.artefact import load_artefact, save_artefact
from trimtab.policies.critic import CriticConfig, CriticEnsemble
from trimtab.policies.noise_space import ConstantNoiseConfig, MaskedNoiseConfig


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A diffusion base with a history of two observations, and an artefact beside it."""
    root = tmp_path_factory.mktemp("steered")
    options = PolicyConfig(path=str(make_diffusion(root / "base")), device="cpu")
    adapter, actor = artefact_of(options, root / "artefact")
    return root / "artefact", root / "base", adapter, actor


def test_acts_as_in_training_chunk_for_chunk(pair):
    """Three chunks in three environments, against the path of the collector and of `trimtab eval`."""
    folder, _, adapter, actor = pair
    steps = adapter.chunk_shape[0]
    policy, (before, after) = load(folder), processors(folder)
    policy.reset()
    raw = observations(adapter, 3 * steps)
    actions = torch.stack([after(policy.select_action(before(dict(one)))) for one in raw], 1)
    for chunk in range(3):
        now = chunk * steps
        history = [raw[max(now - 1, 0)], raw[now]]
        observation = {
            k: torch.stack([one[k] for one in history], 1) if torch.is_tensor(v) else v
            for k, v in raw[0].items()
        }
        conditioning = adapter.observe(observation)
        prior = torch.randn(3, *adapter.noise_spec.shape)
        noise = actor.act(adapter.features(conditioning), prior, deterministic=True)
        expected = adapter.postprocess(adapter.denoise(conditioning, noise), conditioning)
        assert (actions[:, now : now + steps] - expected).abs().max() <= 1e-6
    assert (actions[:, :steps] - actions[:, steps : 2 * steps]).abs().max() > 1e-3


@pytest.mark.parametrize("policy_type", ["act", "smolvla", "pi0", "multi_task_dit"])
def test_other_policies_act_as_in_training_and_as_their_base(policy_type, tmp_path):
    options = make_tiny(policy_type, tmp_path / "base")
    adapter, actor = artefact_of(options, tmp_path / "artefact")
    policy, (before, after) = load(tmp_path / "artefact"), processors(tmp_path / "artefact")
    raw = observations(adapter, 1, count=2)[0]
    observation = {
        k: v.unsqueeze(1).repeat_interleave(adapter.n_obs_steps, 1) if torch.is_tensor(v) else v
        for k, v in raw.items()
    }
    conditioning = adapter.observe(observation)
    noise = actor.act(adapter.features(conditioning).float(), torch.zeros(2, *adapter.noise_spec.shape), True)
    expected = adapter.postprocess(adapter.denoise(conditioning, noise), conditioning)
    chunk = after(policy.predict_action_chunk(before(dict(raw))))
    assert (chunk - expected).abs().max() <= 1e-6
    policy.reset()
    assert (after(policy.select_action(before(dict(raw)))) - expected[:, 0]).abs().max() <= 1e-6

    policy.config.use_actor = False
    policy.reset()
    actions = []
    for one in (policy, adapter.policy):
        one.reset()
        torch.manual_seed(4)
        actions.append(one.select_action(before(dict(raw))))
    assert torch.equal(*actions)


def test_without_the_actor_it_is_lerobots_own_base(pair):
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    folder, base_folder, adapter, _ = pair
    plain, base = load(folder, "--use_actor=false"), DiffusionPolicy.from_pretrained(base_folder)
    steered = load(folder)
    (before, after), theirs = processors(folder), processors(base_folder)
    runs = []
    for policy, (pre, post) in ((plain, (before, after)), (base, theirs), (steered, (before, after))):
        policy.reset()
        torch.manual_seed(7)
        runs.append(
            torch.stack([post(policy.select_action(pre(dict(one)))) for one in observations(adapter, 20)])
        )
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2], atol=1e-3)


def test_loading_draws_what_loading_the_base_draws(pair):
    """So that a seeded `lerobot-eval` of the plain base and of the artefact without its actor agree."""
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    folder, base_folder, _, _ = pair
    draws = []
    for build in (lambda: load(folder), lambda: DiffusionPolicy.from_pretrained(base_folder)):
        torch.manual_seed(0)
        build()
        draws.append(torch.randn(3))
    assert torch.equal(*draws)


def test_a_chunk_is_what_select_action_would_run(pair):
    folder, _, adapter, _ = pair
    policy, (before, _) = load(folder), processors(folder)
    batch = before(observations(adapter, 1)[0])
    policy.reset()
    chunk = policy.predict_action_chunk(dict(batch))
    assert chunk.shape == (3, *adapter.chunk_shape)
    actions = [policy.select_action(dict(batch)) for _ in range(len(chunk[0]))]
    assert torch.equal(torch.stack(actions, 1), chunk)
    timed = {k: torch.stack([v, v], 1) if k.startswith("observation") else v for k, v in batch.items()}
    policy.reset()
    assert torch.equal(policy.predict_action_chunk(timed), chunk)


def test_stochastic_actor_draws_from_torchs_generator(pair):
    folder, _, adapter, actor = pair
    policy, (before, _) = load(folder, "--deterministic=false"), processors(folder)
    batch = before(observations(adapter, 1)[0])
    chunks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        policy.reset()
        chunks.append(policy.predict_action_chunk(dict(batch)))
    assert torch.equal(chunks[0], chunks[1]) and not torch.equal(chunks[0], chunks[2])
    prior = torch.randn(3, *adapter.noise_spec.shape)
    policy.reset()
    batch = {k: torch.stack([v, v], 1) for k, v in batch.items() if k.startswith("observation")}
    conditioning = adapter.encode(batch)
    expected = adapter.denoise(conditioning, actor.act(adapter.features(conditioning), prior))
    assert torch.equal(policy.predict_action_chunk(batch, noise=prior), expected)
    with pytest.raises(ValueError, match="the policy takes"):
        policy.predict_action_chunk(batch, noise=prior[:, :1])


def test_real_time_chunking_is_the_bases_own(tmp_path):
    """The base's chunk, with LeRobot's arguments, from the noise that the actor chose."""
    from lerobot.policies.rtc.configuration_rtc import RTCConfig
    from lerobot.rollout.inference.rtc import supports_rtc_inference

    options = make_tiny("smolvla", tmp_path / "base")
    adapter, actor = artefact_of(options, tmp_path / "artefact")
    policy, (before, _) = load(tmp_path / "artefact"), processors(tmp_path / "artefact")
    assert supports_rtc_inference(policy)
    policy.config.rtc_config = RTCConfig(enabled=True, execution_horizon=4)
    policy.init_rtc_processor()
    batch = before(observations(adapter, 1, count=1)[0])
    first = policy.predict_action_chunk(dict(batch), inference_delay=0, prev_chunk_left_over=None)
    assert first.shape[1] == adapter.config.chunk_size
    left = first[0, 2:]
    second = policy.predict_action_chunk(dict(batch), inference_delay=1, prev_chunk_left_over=left)
    assert not torch.allclose(first, second, atol=1e-4)
    conditioning = adapter.encode(batch)
    noise = actor.act(adapter.features(conditioning).float(), torch.zeros(1, *adapter.noise_spec.shape), True)
    base = policy.base
    expected = base.predict_action_chunk(
        dict(batch), noise=noise, inference_delay=1, prev_chunk_left_over=left
    )
    assert torch.allclose(second, expected, atol=1e-6)


def test_real_time_chunking_says_that_it_chooses_among_no_candidates(tmp_path, caplog):
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    options = make_tiny("smolvla", tmp_path / "base")
    adapter = load_adapter(options)
    width = adapter.chunk_shape[0] * adapter.chunk_shape[1]
    critic = CriticEnsemble(features_of(adapter), width, size := CriticConfig(members=2, hidden=16, layers=2))
    artefact_of(options, tmp_path / "artefact", critic=(critic.eval(), size), acting={"num_candidates": 4})
    for changes, said in (((), 1), (("--num_candidates=1",), 0), (("--use_actor=false",), 0)):
        policy = load(tmp_path / "artefact", *changes)
        policy.config.rtc_config = RTCConfig(enabled=True)
        caplog.clear()
        with caplog.at_level("WARNING"):
            policy.init_rtc_processor()
        assert caplog.text.count("--policy.num_candidates=4 has no effect") == said


def test_real_time_chunking_needs_a_base_that_does_it(pair):
    folder, _, adapter, _ = pair
    policy = load(folder)
    assert not policy.supports_rtc()
    with pytest.raises(UserError, match="does no real-time chunking"):
        policy.predict_action_chunk(processors(folder)[0](observations(adapter, 1)[0]), inference_delay=1)


def test_holds_the_actor_alone(pair, tmp_path):
    folder, _, _, actor = pair
    policy = load(folder)
    assert {name.split(".")[0] for name in policy.state_dict()} == {"actor"}
    assert not any(parameter.requires_grad for parameter in policy.parameters())
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6
    assert_no_pickle(folder)
    policy.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in actor.state_dict().items())


def test_loading_imports_what_lerobot_has_and_us(pair):
    """Beyond what LeRobot itself imports to load the base, ours alone; and none of our commands."""
    import subprocess
    import sys

    code = f"""
import gc, sys
gc.disable()  # quicker so
from lerobot.utils.import_utils import register_third_party_plugins
from lerobot.configs import PreTrainedConfig
from lerobot.envs.factory import make_env_config
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

def load(policy_type, folder):
    policy = get_policy_class(policy_type).from_pretrained(folder)
    make_pre_post_processors(policy.config, pretrained_path=folder)

load("diffusion", {str(pair[1])!r})
before = set(sys.modules)
register_third_party_plugins()
load("trimtab", {str(pair[0])!r})
new = set(sys.modules) - before
tops = {{name.split(".")[0] for name in new}} - set(sys.stdlib_module_names)
print(sorted(tops - {{name.split(".")[0] for name in before}}))
recipes = [name for name in new if name.startswith("trimtab.recipes.")]
assert all(name.startswith("trimtab.recipes.embedded_arm") for name in recipes), recipes
gc.freeze()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.strip().splitlines()[-1] == "['lerobot_policy_trimtab', 'trimtab']"


def test_make_policy_and_mismatched_environment(pair):
    from lerobot.envs.configs import PushtEnv

    import trimtab.rl.envs.metaworld as metaworld

    folder, _, _, _ = pair
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    env = PushtEnv(obs_type="environment_state_agent_pos")
    assert isinstance(make_policy(config, env_cfg=env), STEERED)
    other = metaworld.MetaworldStateConfig(task="drawer-close-v3")
    with pytest.raises(UserError, match=r"--env.type: the base policy makes .* the environment takes"):
        make_policy(config, env_cfg=other)
    with pytest.raises(UserError, match="is made by `trimtab adapt`"):
        STEERED(PreTrainedConfig.from_pretrained(folder))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_actor_acts_alike(pair, monkeypatch, backend):
    """With the default backend too, on request: its C++ compiler works for half a minute."""
    if backend == "inductor" and not os.environ.get("TRIMTAB_INDUCTOR"):
        pytest.skip("needs a C++ compiler and 40 s of it; set TRIMTAB_INDUCTOR=1 to run it")
    folder, _, adapter, _ = pair
    compiled = torch.nn.Module.compile
    calls = []

    def noted(self, *args, **kwargs):
        calls.append(self)
        return compiled(self, *args, **kwargs, **({} if backend == "inductor" else {"backend": backend}))

    monkeypatch.setattr(torch.nn.Module, "compile", noted)
    batch = processors(folder)[0](observations(adapter, 1)[0])
    chunks = []
    for change in ("--compile_model=false", "--compile_model=true"):
        chunks.append(load(folder, change).predict_action_chunk(dict(batch)))
    assert len(calls) == 1 and torch.allclose(*chunks, atol=1e-5)


def test_golden_ticket(pair, tmp_path):
    _, base, adapter, _ = pair
    ticket = torch.randn(adapter.noise_spec.shape, generator=torch.Generator().manual_seed(1))
    noise = ConstantNoiseConfig(bound=1.05 * float(ticket.abs().max()))
    actor = constant_actor(ticket, noise.build(adapter.noise_spec))
    options = PolicyConfig(path=str(base), device="cpu")
    out = save_artefact(tmp_path / "ticket", actor, noise, adapter, options, base, {})
    batch = processors(out)[0](observations(adapter, 1)[0])
    timed = {k: torch.stack([v, v], 1) for k, v in batch.items() if k.startswith("observation")}
    expected = adapter.denoise(adapter.encode(timed), ticket.expand(3, -1, -1).contiguous())
    assert torch.allclose(load(out).predict_action_chunk(batch), expected, atol=1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny SmolVLA and a LoRA of it."""
    return make_lora(tmp_path_factory.mktemp("peft"))


def test_lora_base(folders, tmp_path):
    """A LoRA checkpoint is steered with its layers, and its base is looked up where it was."""
    plain, lora = folders
    adapter, actor = artefact_of(PolicyConfig(path=str(lora), device="cpu"), tmp_path / "artefact")
    policy = load(tmp_path / "artefact")
    batch = processors(tmp_path / "artefact")[0](observations(adapter, 1, count=1)[0])
    chunk = policy.predict_action_chunk(dict(batch))
    chunks = []
    for one in (adapter, load_adapter(plain)):
        conditioning = one.encode(batch)
        noise = actor.act(one.features(conditioning).float(), torch.zeros(1, *one.noise_spec.shape), True)
        chunks.append(one.denoise(conditioning, noise))
    assert (chunk - chunks[0]).abs().max() <= 1e-6
    assert (chunk - chunks[1]).abs().max() > 1e-3


def test_renamed_observations_need_no_flag(tmp_path):
    options = PolicyConfig(
        path=str(make_diffusion(tmp_path / "base")),
        device="cpu",
        rename_map={"observation.eef": "observation.state"},
    )
    adapter, actor = artefact_of(options, tmp_path / "artefact")
    policy, (before, _) = load(tmp_path / "artefact"), processors(tmp_path / "artefact")
    raw = observations(adapter, 1)[0]
    assert "observation.eef" in raw and "observation.eef" in policy.config.input_features
    batch = before(raw)
    timed = {k: torch.stack([v, v], 1) for k, v in batch.items() if k.startswith("observation")}
    conditioning = adapter.encode(timed)
    noise = actor.act(adapter.features(conditioning), torch.zeros(3, *adapter.noise_spec.shape), True)
    assert torch.equal(policy.predict_action_chunk(batch), adapter.denoise(conditioning, noise))


@pytest.mark.parametrize("bounds", [None, (-100.0, 0.0)])
def test_best_of_candidates_is_the_critics_choice(pair, tmp_path, bounds):
    _, base, adapter, _ = pair
    torch.manual_seed(5)
    size = CriticConfig(members=2, hidden=16, layers=2)
    critic = CriticEnsemble(
        features_of(adapter), adapter.chunk_shape[0] * adapter.chunk_shape[1], size, bounds
    ).eval()
    critic.net.weights[-1].data.mul_(30.0)  # far from where the logit and the value rank alike
    options = PolicyConfig(path=str(base), device="cpu")
    _, actor = artefact_of(options, tmp_path / "artefact", critic=(critic, size))
    policy = load(tmp_path / "artefact", "--num_candidates=5")
    assert policy.steered.critic.bounds == bounds
    batch = processors(tmp_path / "artefact")[0](observations(adapter, 1)[0])
    torch.manual_seed(6)
    chunk = policy.predict_action_chunk(dict(batch))

    timed = {k: torch.stack([v, v], 1) for k, v in batch.items() if k.startswith("observation")}
    conditioning = adapter.encode(timed)
    features, space = adapter.features(conditioning), actor.space
    torch.manual_seed(6)
    drawn = torch.randn(3, 5, *adapter.noise_spec.shape)
    own = actor.act(features, drawn[:, -1], True)
    best = []
    for row in range(3):
        noises = [
            own[row],
            *(space.expand(space.squash(space.draw(d[None])), d[None])[0] for d in drawn[row, :4]),
        ]
        chunks = [adapter.denoise(conditioning[row], noise[None])[0] for noise in noises]
        values = [
            float(critic.requires_grad_(False)(features[row][None], c.flatten()[None]).mean()) for c in chunks
        ]
        best.append(max(range(5), key=values.__getitem__))
        assert torch.allclose(chunk[row], chunks[best[-1]], atol=1e-5)
    assert any(best), "another candidate than the actor's won somewhere"
    torch.manual_seed(7)
    assert torch.equal(policy.predict_action_chunk(dict(batch), noise=drawn), chunk), "draws that are named"
    with pytest.raises(Exception, match="needs the critic of a best_of_n run"):
        load(pair[0], "--num_candidates=5")


def truncate(file):
    file.write_bytes(file.read_bytes()[:200])


def change_config(**changes):
    def damage(folder, base):
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            config[key] = {**(config[key] or {}), **value} if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def change_base(folder, base):
    tensors = load_file(base / "model.safetensors")
    save_file({name: value + 0.5 for name, value in tensors.items()}, base / "model.safetensors")


def change_inputs(folder, base):
    config = json.loads((folder / "config.json").read_text())
    config["input_features"]["observation.state"]["shape"] = [9]
    (folder / "config.json").write_text(json.dumps(config))


def change_outputs(folder, base):
    config = json.loads((folder / "config.json").read_text())
    config["output_features"]["action"]["shape"] = [7]
    (folder / "config.json").write_text(json.dumps(config))


def change_settings(folder, base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"n_action_steps": 2}))


BAD = {
    "truncated": (lambda f, b: truncate(f / "model.safetensors"), "truncated or no safetensors file"),
    "no weights": (lambda f, b: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "truncated to nothing": (lambda f, b: (f / "model.safetensors").write_bytes(b""), "truncated or no saf"),
    "no json": (lambda f, b: truncate(f / "config.json"), "config.json is not JSON"),
    "truncated base": (lambda f, b: truncate(b / "model.safetensors"), "its weights have another hash"),
    "other settings": (change_settings, "steers: config.json changed"),
    "base without a name": (change_config(base={"path": None}), "is not an artefact's config"),
    "actions": (change_outputs, r"the base policy makes \{'action': \(2,\)\}, the environment takes"),
    "critic gone": (change_config(critic={"members": 2}), "lacks critic.safetensors"),
    "no processor": (
        lambda f, b: (f / "policy_preprocessor.json").unlink(),
        "lacks policy_preprocessor.json",
    ),
    "wrong type": (lambda f, b: shutil.copy(b / "config.json", f), "is not a policy of type trimtab"),
    "later format": (change_config(format=9), "format 9, this version reads"),
    "no number": (change_config(feature_dim="many"), "is not an artefact's config"),
    "unknown setting": (change_config(actor={"wings": 2}), "wings"),
    "missing base": (
        lambda f, b: shutil.rmtree(b),
        r"is not where it was: there is no folder /.*trimtab export --run=.* --policy.path=FOLDER",
    ),
    "changed base": (change_base, "its weights have another hash"),
    "noise shape": (
        change_config(noise_shape=[3, 2]),
        r"the base takes noise of shape \(.*\), the actor makes",
    ),
    "feature length": (change_config(feature_dim=5), "does not fit the policy that its config describes"),
    "inputs": (change_inputs, r"the config says other inputs than its base takes: observation.state"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(pair, tmp_path, case):
    damage, message = BAD[case]
    folder = shutil.copytree(pair[0], tmp_path / "all" / "artefact")
    base = shutil.copytree(pair[1], tmp_path / "all" / "base")
    damage(folder, base)
    with pytest.raises(UserError, match=message) as caught:
        STEERED.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_artefact_and_base_move_together_or_are_named(pair, tmp_path):
    folder = shutil.copytree(pair[0], tmp_path / "all" / "artefact")
    base = shutil.copytree(pair[1], tmp_path / "all" / "base")
    assert Path(load(folder).steered.base_folder) == base
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not where it was"):
        load(folder)
    assert load(folder, f"--base.path={tmp_path / 'elsewhere'}").steered.base_folder == tmp_path / "elsewhere"


def test_a_folder_without_its_processors_is_refused(pair, tmp_path):
    """LeRobot's commands need them; `trimtab eval` does not, and still reads the folder."""
    folder = shutil.copytree(pair[0], tmp_path / "all" / "artefact")
    shutil.copytree(pair[1], tmp_path / "all" / "base")
    for file in folder.glob("policy_*"):
        file.unlink()
    loaded = load_artefact(PolicyConfig(path=str(folder), device="cpu"))
    features, prior = (
        torch.randn(2, pair[3].normalizer.mean.numel()),
        torch.zeros(2, *pair[2].noise_spec.shape),
    )
    assert torch.equal(loaded.actor.act(features, prior, True), pair[3].act(features, prior, True))
    with pytest.raises(UserError, match=r"lacks policy_preprocessor\.json"):
        STEERED.from_pretrained(folder)


def test_masked_noise_draws_the_rest_fresh(pair, tmp_path):
    _, base, adapter, _ = pair
    options = PolicyConfig(path=str(base), device="cpu")
    artefact_of(options, tmp_path / "artefact", MaskedNoiseConfig(rows="0:4"))
    policy = load(tmp_path / "artefact")
    batch = processors(tmp_path / "artefact")[0](observations(adapter, 1)[0])
    torch.manual_seed(0)
    chunks = [policy.predict_action_chunk(dict(batch)) for _ in range(2)]
    assert not torch.equal(*chunks), "what the actor leaves alone is the base's own draw"


def test_a_base_that_remembers_its_episode_forgets_it_at_a_reset(tmp_path):
    """Each episode, left within its third chunk, goes as in training; and so it does without the actor."""
    options = make_tiny("lingbot_va", tmp_path / "base")
    adapter, actor = artefact_of(options, tmp_path / "artefact")
    policy, (before, after) = load(tmp_path / "artefact"), processors(tmp_path / "artefact")
    lengths, zero = (8, 12, 2), torch.zeros(1, *adapter.noise_spec.shape)

    def act(episode):
        policy.reset()
        torch.manual_seed(0)
        return torch.cat([after(policy.select_action(before(dict(frame)))) for frame in episode])

    for seed in (0, 1):
        episode, expected, at = frames(adapter, sum(lengths), seed), [], 0
        conditioning = adapter.encode(history(adapter, episode, 0))
        for length in lengths:
            noise = actor.act(adapter.features(conditioning).float(), zero, True)
            chunk = adapter.denoise(conditioning, noise)
            expected.append(adapter.postprocess(chunk, conditioning)[0, :length])
            at += length
            if at < len(episode):
                conditioning = adapter.follow(conditioning, chunk, history(adapter, episode, at))
        assert (act(episode) - torch.cat(expected)).abs().max() <= 1e-5
    policy.config.use_actor = False
    first, second = act(episode), act(episode)
    assert torch.equal(first, second) and not torch.allclose(first, torch.cat(expected), atol=1e-3)
