"""The same artefact in other runners: what LeRobot's loops execute is what trimtab's loop executes."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.envs.factory import make_env, make_env_pre_post_processors
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.scripts.lerobot_eval import rollout

import lerobot_policy_trimtab  # noqa: F401 - what LeRobot's commands import
from tests.helpers.lane import LaneConfig, LaneEnv, make_lane_policy
from tests.helpers.steered import artefact_of, features_of
from tests.helpers.tiny import TYPES, make_tiny
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.tiny.parts import camera_features
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.artefact import Steered, load_artefact, read_config, save_artefact
from trimtab.policies.critic import CriticConfig, CriticEnsemble
from trimtab.policies.noise_samplers import steered_noise
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.policies.observe import ObserveConfig, Observer
from trimtab.policies.steered.modeling_trimtab import TrimtabPolicy
from trimtab.recipes.cli import main
from trimtab.recipes.support.export_check import check_runners
from trimtab.rl.envs.chunk import ChunkEnv
from trimtab.rl.runner import PolicyRunner

SEEDS = (3, 4)
STEPS = 11


def lerobot_eval(folder, episodes):
    """Actions (B, steps, 2) of each episode, by the functions that `lerobot-eval` calls, in its order."""
    env_config = LaneConfig(episode_length=STEPS)
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    envs = make_env(env_config, n_envs=len(SEEDS), use_async_envs=False)["test_lane"][0]
    policy = make_policy(config, env_cfg=env_config, rename_map={}).eval()
    pipelines = make_pre_post_processors(
        config,
        pretrained_path=config.pretrained_path,
        preprocessor_overrides={
            "device_processor": {"device": str(policy.config.device)},
            "rename_observations_processor": {"rename_map": {}},
        },
    )
    around = make_env_pre_post_processors(env_cfg=env_config, policy_cfg=config)
    made = []
    with torch.no_grad(), torch.autocast("cpu") if config.use_amp else nullcontext():
        for seeds in episodes:
            made.append(rollout(envs, policy, *around, *pipelines, seeds=list(seeds))["action"].numpy())
    envs.close()
    return made


def trimtab_eval(steered, episodes):
    """The same by trimtab's loop: a runner, and environments that step whole chunks."""
    adapter = steered.adapter
    runner = PolicyRunner(adapter, LaneConfig(episode_length=STEPS))
    source = steered_noise(steered.actor, steered.config.deterministic)
    made = []
    for seeds in episodes:
        envs = [ChunkEnv(LaneEnv(), adapter.n_obs_steps) for _ in seeds]
        seen = [env.reset(seed) for env, seed in zip(envs, seeds)]
        actions, steps = [], 0
        while steps < STEPS:
            conditioning = runner.encode(seen, [""] * len(seeds))
            prior = runner.prior(len(seeds), torch.Generator().manual_seed(0))
            chunk = np.stack(runner.decode(conditioning, source(runner.features(conditioning), prior)))
            results = [env.step_chunk(one) for env, one in zip(envs, chunk)]
            executed = min(result.steps for result in results)
            actions.append(chunk[:, :executed])
            steps += executed
            if any(result.ended for result in results):
                break
            seen = [result.observation for result in results]
        made.append(np.concatenate(actions, 1)[:, :STEPS])
    return made


LANES = {
    "plain": {},
    "history": {"n_obs_steps": 2},
    "beyond the horizon": {"n_obs_steps": 2, "n_action_steps": 8},
    "use_amp": {"use_amp": True},
    "DDPM": {"noise_scheduler_type": "DDPM", "num_inference_steps": None},
}


@pytest.mark.parametrize("case", LANES)
def test_lerobot_eval_executes_what_trimtab_eval_executes(case, tmp_path):
    """Two environments side by side, two episodes of three chunks or so, in a real environment."""
    options = PolicyConfig(path=str(make_lane_policy(tmp_path / "base", **LANES[case])), device="cpu")
    adapter, actor = artefact_of(options, tmp_path / "artefact")
    config = read_config(tmp_path / "artefact")
    steered = Steered(adapter, actor, tmp_path / "base", config, None, options)
    episodes = (SEEDS, (7, 8))
    theirs, ours = lerobot_eval(tmp_path / "artefact", episodes), trimtab_eval(steered, episodes)
    for one, other in zip(theirs, ours):
        steps = min(one.shape[1], other.shape[1])
        assert steps > adapter.chunk_shape[0], "more than a chunk"
        assert np.abs(one[:, :steps] - other[:, :steps]).max() <= 1e-6
    assert np.abs(ours[0][:, :4] - ours[1][:, :4]).max() > 1e-3, "other episodes, other actions"
    assert any("use_amp is on" in note for note in adapter.notes) == (case == "use_amp")


CASES = {
    "act": [{}, {"n_action_steps": 2}],
    "diffusion": [
        {"n_obs_steps": 3, "n_action_steps": 8},
        {"images": True, "resize_shape": (48, 48), "crop_ratio": 0.8},
        {"use_amp": True, "n_obs_steps": 1},
    ],
    "multi_task_dit": [{"n_action_steps": 8}, {"use_amp": True}],
    "smolvla": [
        {"n_action_steps": 2, "use_amp": True},
        {
            "adapt_to_pi_aloha": True,
            "max_state_dim": 14,
            "max_action_dim": 14,
            **camera_features(1, 64, 14, 14),
        },
    ],
}
ALL = [(kind, fields) for kind in TYPES for fields in CASES.get(kind, [{}])]


def steered_of(options, folder):
    adapter, actor = artefact_of(options, folder)
    return Steered(adapter, actor, Path(options.path), read_config(folder), None, options)


@pytest.mark.parametrize(
    "policy_type, fields", ALL, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_type_acts_alike_in_lerobots_loops(policy_type, fields, tmp_path):
    """Step by step over two chunks and a reset, and chunk by chunk; with the options that change actions."""
    steered = steered_of(make_tiny(policy_type, tmp_path / "base", **fields), tmp_path / "artefact")
    notes = check_runners(tmp_path / "artefact", steered)
    adapter = steered.adapter
    assert not any("other actions" in note or "refuse" in note for note in notes)
    assert any("latest observation alone" in note for note in notes) == (adapter.n_obs_steps > 1)
    assert any("hands over no observation.environment_state" in note for note in notes) == (
        "observation.environment_state" in adapter.config.input_features
    )


@pytest.fixture(scope="module")
def lane(tmp_path_factory):
    root = tmp_path_factory.mktemp("parity")
    options = PolicyConfig(path=str(make_lane_policy(root / "base", n_obs_steps=2)), device="cpu")
    return root, steered_of(options, root / "artefact")


def keeps_observations(self):
    kept = getattr(self, "_observations", None)
    RESET(self)
    self._observations = kept if kept is not None else self._observations


def keeps_actions(self):
    kept = getattr(self, "_actions", None)
    RESET(self)
    self._actions = kept if kept is not None else self._actions


def forgets_the_past(self, seen):
    return HISTORY(self, [seen[-1]] * len(seen))


RESET, HISTORY = TrimtabPolicy.reset, TrimtabPolicy._history
FAULTS = {
    "history of the last episode": ("reset", keeps_observations),
    "actions of the last episode": ("reset", keeps_actions),
    "no history": ("_history", forgets_the_past),
    "autocast": ("_chunk", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_other_actions_are_refused_and_nothing_is_written(fault, lane, tmp_path, monkeypatch, capsys):
    root = lane[0]
    name, method = FAULTS[fault]
    if fault == "autocast":
        chunk = TrimtabPolicy._chunk

        def method(self, batch, noise):
            with torch.autocast("cpu"):
                return chunk(self, batch, noise)

    monkeypatch.setattr(TrimtabPolicy, name, method)
    out = tmp_path / "out"
    assert main(["export", f"--run={root / 'artefact'}", f"--output_dir={out}", "--policy.device=cpu"]) == 2
    assert "lerobot-eval would execute other actions than trimtab eval" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def other_candidates(self, count, draws, noise):
    return torch.cat([torch.randn(count, draws - 1, *noise.shape[2:]), noise[:, -1:]], 1)


def test_the_choice_among_candidates_is_compared_too(lane, tmp_path, monkeypatch):
    root, steered = lane
    adapter = steered.adapter
    torch.manual_seed(5)
    size, steps = CriticConfig(members=2, hidden=16, layers=2), adapter.chunk_shape
    critic = CriticEnsemble(features_of(adapter), steps[0] * steps[1], size).eval()
    out = tmp_path / "artefact"
    artefact_of(
        PolicyConfig(path=str(root / "base"), device="cpu"),
        out,
        critic=(critic, size),
        acting={"num_candidates": 4},
    )
    several = load_artefact(PolicyConfig(path=str(out), device="cpu"))
    assert not any("other actions" in note for note in check_runners(out, several))
    monkeypatch.setattr(TrimtabPolicy, "_prior", other_candidates)
    with pytest.raises(UserError, match="would execute other actions"):
        check_runners(out, several)


def test_other_shapes_and_nan_are_no_rounding():
    from trimtab.recipes.support.export_check import _difference

    zero = torch.zeros(2, 3)
    assert _difference(zero, zero + 9e-7) == 0.0 and _difference(zero, zero + 2e-6) > 0
    assert _difference(zero, zero[:1]) == float("inf")
    assert _difference(zero, zero * float("nan"))


def test_relative_actions_are_refused_step_by_step(tmp_path, capsys):
    """LeRobot adds each action to the state at its own step, where the chunk was made for one state."""
    options = make_tiny(
        "pi0", tmp_path / "base", use_relative_actions=True, action_feature_names=["a", "b", "c"]
    )
    steered = steered_of(options, tmp_path / "artefact")
    assert any("relative actions" in note for note in steered.adapter.notes)
    notes = check_runners(tmp_path / "artefact", steered)
    assert "lerobot-eval and lerobot-rollout (sync) refuse this policy" in notes[0]
    assert not any("would execute other actions" in note for note in notes), "the policy server is right"
    config = PreTrainedConfig.from_pretrained(tmp_path / "artefact")
    policy = TrimtabPolicy(config, steered=steered)
    with pytest.raises(UserError, match="relative to the state that a chunk was made for"):
        policy.select_action({})


@pytest.mark.parametrize("policy_type", ["smolvla", "pi05", "multi_task_dit"])
def test_an_actor_that_looks_at_the_instruction(policy_type, tmp_path):
    """LeRobot makes a prompt of the instruction (a line's end, the state); the actor knows its words."""
    adapter = load_adapter(options := make_tiny(policy_type, tmp_path / "base"))
    looks = ObserveConfig(inputs=["features", "task"]).resolved(adapter, ["push to goal", "press the button"])
    adapter.observer = Observer(looks, adapter)
    example = adapter.example_observation(2, torch.Generator().manual_seed(0))
    example["task"] = ["push to goal", "press the button"]
    width = adapter.seen(adapter.observe(example)).shape[-1]
    torch.manual_seed(0)
    noise = FullNoiseConfig()
    size = ActorConfig(hidden=16, layers=2)
    actor = NoiseActor(width, noise.build(adapter.noise_spec), size, looks)
    for parameter in actor.net[-1].parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    out = tmp_path / "artefact"
    save_artefact(out, actor.eval(), noise, adapter, options, Path(options.path), {})
    steered = load_artefact(PolicyConfig(path=str(out), device="cpu"))
    assert not any("other actions" in note for note in check_runners(out, steered))


OPTIONS = {
    "--use_amp=true": "--policy.use_amp: a steered policy computes in the precision",
    "--n_action_steps=2": "--policy.n_action_steps: the base was loaded with 4, the config says 2",
    "--n_obs_steps=1": "--policy.n_obs_steps: the base was loaded with 2, the config says 1",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_lerobot_would_take_without_effect(option, lane):
    folder = lane[0] / "artefact"
    with pytest.raises(Exception, match=OPTIONS[option]):
        config = PreTrainedConfig.from_pretrained(folder, cli_overrides=[option])
        TrimtabPolicy.from_pretrained(folder, config=config)


def test_export_keeps_how_the_artefact_acts_and_changes_what_is_asked(lane, tmp_path, capsys):
    from dataclasses import replace

    from trimtab.policies.artefact import write_config

    folder, out = lane[0] / "artefact", tmp_path / "out"
    saved = read_config(folder)
    told = {"seed": 1, "success": {"steered": {"successes": 9, "episodes": 9}}}
    changed = replace(saved, use_actor=False, deterministic=False, training=told)
    write_config(changed, folder / "config.json")
    try:
        argv = ["export", f"--run={folder}", f"--output_dir={out}", "--policy.device=cpu"]
        assert main([*argv, "--policy.n_action_steps=3"]) == 0
    finally:
        write_config(saved, folder / "config.json")
    found = read_config(out)
    assert found.training == {"seed": 1, "deterministic": False}
    assert "Not measured." in (out / "README.md").read_text()
    assert (found.use_actor, found.deterministic, found.n_action_steps) == (False, False, 3)
    said = capsys.readouterr().out
    assert "its success is not measured" in said
    assert "policy server shows a policy the latest observation alone" in said
    assert load_artefact(PolicyConfig(path=str(out), device="cpu")).adapter.chunk_shape[0] == 3


def test_a_base_in_libero_that_lerobot_gives_processors_by_its_type(tmp_path):
    """LeRobot gives X-VLA in LIBERO its environment processors, and an artefact of it none."""
    from trimtab.recipes.support.export_check import environment_notes

    options = make_tiny("xvla", tmp_path / "base")
    steered = steered_of(options, tmp_path / "artefact")
    steered.config.training["env"] = {"type": "libero", "task": "libero_10"}
    assert "between libero and the policy lerobot-eval puts" in environment_notes(steered)[0]
    steered.config.training["env"] = {"type": "pusht"}
    assert environment_notes(steered) == []
    assert load_adapter(options).notes == steered.adapter.notes
