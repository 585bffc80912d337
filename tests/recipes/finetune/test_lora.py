"""`trimtab lora`: real LeRobot training and PEFT on small policies, real simulators, small budgets."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs.default import DatasetConfig, PeftConfig
from torch import nn

from tests.conftest import make_diffusion
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.checkpoint.folder import is_peft
from trimtab.adapters.checkpoint.identity import file_hash
from trimtab.recipes.cli import main
from trimtab.recipes.cli.lora import LoraConfig
from trimtab.recipes.embedded_base.demonstrations import REPO_ID
from trimtab.recipes.finetune.data import ColumnWindows, Recorder, batches
from trimtab.recipes.finetune.rollouts import RolloutEpisode, Rollouts, as_recorded
from trimtab.recipes.finetune.training import FineTuner, TuningConfig, default_targets, means
from trimtab.recipes.support.options import parse
from trimtab.recipes.support.session import Session
from trimtab.recipes.support.shared_configs import EvalConfig, MachineConfig
from trimtab.rl.data.demonstration_data import failures_note
from trimtab.rl.envs.metaworld import MetaworldStateConfig, MetaworldStateEnv
from trimtab.rl.seeds import training_seed

ENV = ["--env.type=metaworld_state", "--env.task=drawer-close-v3", "--env.episode_length=100"]
MACHINE = ["--policy.device=cpu", "--machine.workers=0", "--machine.threads=1"]
EPISODES = ["--eval.n_episodes=6", "--eval.batch_size=3", "--eval.videos=0"]
ROLLOUTS = ["--from_rollouts=true", "--env_steps=1001", "--rounds=2", "--num_envs=4", "--steps=30"]
WIDTH = {"observation.state": 4, "observation.environment_state": 85}


@pytest.fixture(scope="module")
def base(drawer_base):
    return drawer_base


def contents(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def options(path):
    return PolicyConfig(path=str(path), device="cpu")


def tuner(path, **fields):
    config = TuningConfig(**{"num_workers": 0, **fields})
    return FineTuner(options(path), config)


@pytest.fixture(scope="module", params=["lora", "full"])
def rollouts_run(request, base, tmp_path_factory):
    """Filtered behaviour cloning, as a user would start it."""
    output = tmp_path_factory.mktemp("run") / request.param
    before = contents(base)
    argv = ["lora", f"--policy.path={base}", *ENV, *MACHINE, *EPISODES, *ROLLOUTS]
    assert main([*argv, f"--method={request.param}", f"--output_dir={output}"]) == 0
    assert contents(base) == before
    return request.param, output


def test_a_run_on_rollouts_writes_results_metrics_and_its_successes(rollouts_run, base):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    method, output = rollouts_run
    results = json.loads((output / "results.json").read_text())
    assert results["env_steps"] == 1001 and results["method"] == method
    assert results["base_sha256"] == file_hash(base)
    assert list(results["policies"]) == ["base", "fine_tuned"]
    for entry in results["policies"].values():
        low, high = entry["ci95"]
        assert entry["episodes"] == 6 and 0 <= low <= entry["success_rate"] <= high <= 1
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["env_steps"] for line in lines] == [0, 500, 1001]
    assert lines[0]["eval"] == results["policies"]["base"]
    assert lines[-1]["eval"] == results["policies"]["fine_tuned"]
    for line in lines[1:]:
        assert line["success_rate"] == line["successes"] / line["episodes"]
        assert line.get("skipped") or (len(line["losses"]) == 1 and line["losses"][0] > 0)
    found = sum(line["successes"] for line in lines[1:])
    data = LeRobotDataset("trimtab/own_successes", root=output / "successes")
    assert found == results["dataset"]["episodes"] == data.num_episodes > 0
    rows = data.hf_dataset.with_format("numpy")
    ends = np.asarray(rows["next.done"][:]).reshape(-1)
    assert ends.sum() == found and np.asarray(rows["next.success"][:]).reshape(-1)[ends].all()
    trained = results["trained_parameters"]
    whole = sum(p.numel() for p in load_adapter(options(base)).policy.parameters())
    assert trained == whole if method == "full" else 0 < trained < whole


def test_a_lora_adapter_can_be_steered_exported_and_loaded_by_lerobot(rollouts_run, tmp_path):
    """`trimtab adapt` on the LoRA checkpoint, `trimtab export`, and LeRobot's loading: its layers count."""
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    import lerobot_policy_trimtab  # noqa: F401 - what LeRobot's commands import

    method, output = rollouts_run
    if method != "lora":
        pytest.skip("fine-tuned in full it is a policy like any other")
    argv = ["adapt", f"--policy.path={output / 'policy'}", *ENV[:2], "--env.episode_length=20", *MACHINE]
    argv += ["--train.env_steps=80", "--train.warmup_transitions=4", "--train.first_update=4", "--num_envs=2"]
    argv += [
        "--rl.type=dsrl_sac",
        "--rl.batch_size=4",
        "--eval.n_episodes=2",
        "--eval.batch_size=2",
        "--eval.videos=0",
    ]
    assert main([*argv, "--eval.constant_candidates=0", f"--output_dir={tmp_path / 'run'}"]) == 0
    out = tmp_path / "exported"
    assert main(["export", f"--run={tmp_path / 'run'}", f"--output_dir={out}", "--policy.device=cpu"]) == 0
    assert sum(file.stat().st_size for file in out.iterdir()) < 5e6
    policy = get_policy_class("trimtab").from_pretrained(out)
    before, _ = make_pre_post_processors(policy.config, pretrained_path=str(out))
    adapter = load_adapter(options(output / "policy"))
    raw = adapter.example_observation(2, torch.Generator().manual_seed(0))
    batch = before({k: v[:, -1] if torch.is_tensor(v) else v for k, v in raw.items()})
    timed = {k: v.unsqueeze(1) for k, v in batch.items() if k.startswith("observation")}
    conditioning = adapter.encode(timed)
    prior = torch.zeros(2, *adapter.noise_spec.shape)
    noise = policy.actor.act(adapter.features(conditioning), prior, True)
    assert (policy.predict_action_chunk(batch) - adapter.denoise(conditioning, noise)).abs().max() <= 1e-6


def test_eval_of_the_result_gives_the_figures_of_the_run(rollouts_run, tmp_path, base):
    method, output = rollouts_run
    folder = output / "policy"
    assert is_peft(folder) == (method == "lora")
    argv = ["eval", f"--policy.path={folder}", *ENV, *MACHINE, "--eval.n_episodes=6", "--eval.batch_size=2"]
    argv += ["--eval.videos=0", "--eval.constant_candidates=0", f"--output_dir={tmp_path / 'out'}"]
    assert main(argv) == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())["policies"]["base"]
    assert again == json.loads((output / "results.json").read_text())["policies"]["fine_tuned"]
    adapter, plain = load_adapter(options(folder)), load_adapter(options(base))
    observation = plain.example_observation(2, torch.Generator().manual_seed(0))
    noise = torch.randn(2, *plain.noise_spec.shape, generator=torch.Generator().manual_seed(1))
    chunks = [a.denoise(a.observe(observation), noise) for a in (adapter, plain)]
    assert not torch.allclose(*chunks, atol=1e-4), "training changed nothing"


def test_lerobot_loads_the_result_as_the_same_policy(rollouts_run):
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import make_policy

    _, output = rollouts_run
    folder = output / "policy"
    config = PreTrainedConfig.from_pretrained(str(folder))
    config.pretrained_path, config.device = folder, "cpu"
    theirs = make_policy(config, env_cfg=MetaworldStateConfig(task="drawer-close-v3")).eval()
    ours = load_adapter(options(folder))
    observation = ours.example_observation(2, torch.Generator().manual_seed(0))
    noise = torch.randn(2, *ours.noise_spec.shape, generator=torch.Generator().manual_seed(1))
    batch = ours.preprocess(observation)
    expected = theirs.diffusion.generate_actions(dict(batch), noise=noise)
    assert torch.allclose(ours.denoise(ours.observe(observation), noise), expected, atol=1e-5)


def test_the_saved_config_decodes_to_the_same_run(rollouts_run):
    _, output = rollouts_run
    again = parse(LoraConfig, "lora", [f"--config_path={output / 'config.json'}"])
    assert again.from_rollouts and again.env_steps == 1001 and again.env.task == "drawer-close-v3"
    assert again.method == rollouts_run[0] and again.steps == 30 and again.dataset is None


def test_lora_on_a_dataset_trains_an_adapter_that_adapt_steers(base, tmp_path, capsys):
    output = tmp_path / "out"
    argv = ["lora", f"--policy.path={base}", *MACHINE, "--steps=120", "--batch_size=16"]
    argv += [f"--dataset.repo_id={REPO_ID}", f"--dataset.root={base / 'demonstrations'}"]
    assert main([*argv, "--peft.r=4", f"--output_dir={output}"]) == 0
    assert "LoRA adapter in" in capsys.readouterr().out
    saved = json.loads((output / "policy" / "adapter_config.json").read_text())
    assert saved["r"] == saved["lora_alpha"] == 4
    assert saved["base_model_name_or_path"] == str(base.resolve())
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [100, 120]
    results = json.loads((output / "results.json").read_text())
    assert results["policies"] == {} and results["updates"] == 120
    steer = ["adapt", f"--policy.path={output / 'policy'}", *ENV[:2], "--env.episode_length=20", *MACHINE]
    steer += [
        "--eval.videos=0",
        "--num_envs=2",
        "--train.env_steps=160",
        "--train.first_update=8",
        "--train.warmup_transitions=8",
    ]
    steer += [
        "--eval.n_episodes=2",
        "--rl.type=dsrl_sac",
        "--rl.batch_size=8",
        "--eval.constant_candidates=0",
    ]
    assert main([*steer, f"--output_dir={tmp_path / 'steered'}"]) == 0
    assert (tmp_path / "steered" / "artefact" / "config.json").is_file()


def test_rollouts_spend_the_exact_budget_and_record_what_the_environment_replays(base, monkeypatch):
    """Every step is counted, and the recorded actions lead through the recorded observations."""
    taken = 0
    step = MetaworldStateEnv.step

    def counted(self, action):
        nonlocal taken
        taken += 1
        return step(self, action)

    env = MetaworldStateConfig(task="drawer-close-v3", episode_length=30)
    adapter = load_adapter(options(base))
    session = Session(adapter, env, EvalConfig(), MachineConfig(workers=0))
    with session.environments(3, keep_seen=True) as vec:
        monkeypatch.setattr(MetaworldStateEnv, "step", counted)
        rollouts = Rollouts(session.runner, vec, session.own_noise, training_seed(0))
        episodes = []
        for steps in (1, 37, 102, 3):
            before = taken
            episodes += rollouts.collect(steps, progress=False)
            assert taken - before == steps
        assert rollouts.env_steps == taken == 143
    assert [e.seed for e in episodes[:3]] == [training_seed(0) + i for i in range(3)]
    assert len(episodes) == 3 and all(len(e.frames) == 30 for e in episodes)
    single = MetaworldStateEnv("drawer-close-v3", episode_length=30)
    episode = episodes[1]
    observation, _ = single.reset(seed=episode.seed)
    for frame in episode.frames:
        for key, name in (("state", "agent_pos"), ("environment_state", "environment_state")):
            recorded = frame[f"observation.{key}"]
            assert np.array_equal(recorded, observation[name].astype(np.float32))
        observation, _, _, _, info = single.step(frame["action"])
        assert info["is_success"] == frame["next.success"].item()
    single.close()


def test_batches_from_memory_equal_those_of_lerobots_loader(base):
    """All keys of LeRobot's own data loader, bit for bit, also of chosen episodes and longer histories."""
    from lerobot.datasets import EpisodeAwareSampler
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    adapter = load_adapter(options(base))
    deltas = {"action": [i / 80 for i in range(-1, 7)], "observation.state": [-1 / 80, 0.0]}
    for chosen in (None, [1, 2]):
        data = LeRobotDataset(
            REPO_ID, root=base / "demonstrations", delta_timestamps=deltas, episodes=chosen, return_uint8=True
        )
        meta = data.meta.episodes
        sampler = EpisodeAwareSampler(
            meta["dataset_from_index"],
            meta["dataset_to_index"],
            episode_indices_to_use=chosen,
            drop_n_last_frames=adapter.config.drop_n_last_frames,
            shuffle=True,
            seed=3,
            absolute_to_relative_idx=data.absolute_to_relative_idx,
        )
        theirs = iter(torch.utils.data.DataLoader(data, sampler=sampler, batch_size=16))
        ours = batches(data, adapter.config, 16, 3, 0, None)
        for _ in range(3):
            expected, got = next(theirs), next(ours)
            assert set(got) == set(expected)
            for key, value in expected.items():
                if isinstance(value, torch.Tensor):
                    assert value.dtype == got[key].dtype and torch.equal(value, got[key]), key
                else:
                    assert list(value) == list(got[key])
        ends = [len(data) - 1, 0]
        items, batch = [data[i] for i in ends], ColumnWindows(data)[ends]
        for key in ("action", "action_is_pad", "observation.state", "observation.state_is_pad"):
            assert torch.equal(batch[key], torch.stack([item[key] for item in items]))


def synthetic(length=24, episodes=2, seed=0, action=(0.5, -0.5, 0.25, -0.25), width=WIDTH, camera=None):
    """Episodes that do the same action everywhere."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(episodes):
        columns = {k: rng.normal(0, 0.1, (length, n)).astype(np.float32) for k, n in width.items()}
        if camera:
            columns[camera[0]] = rng.integers(0, 255, (length, *camera[1]), dtype=np.uint8)
        success = (np.arange(length) == length - 1)[:, None]
        columns |= {"next.reward": success.astype(np.float32), "next.success": success, "next.done": success}
        columns["action"] = np.tile(np.asarray(action, np.float32), (length, 1))
        rows = zip(*columns.values(), strict=True)
        made.append(RolloutEpisode(number, [dict(zip(columns, row)) | {"task": "push"} for row in rows]))
    return made


def record(folder, episodes, fps):
    Recorder(folder, fps).add(episode.frames for episode in episodes)


def test_failures_in_a_dataset_are_named(tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    record(tmp_path / "won", synthetic(length=4, episodes=3), 10)
    assert failures_note(LeRobotDataset("a/b", root=tmp_path / "won")) == []
    episodes = synthetic(length=4, episodes=3)
    episodes[1].frames[-1]["next.success"] = np.array([False])
    record(tmp_path / "mixed", episodes, 10)
    said = failures_note(LeRobotDataset("a/b", root=tmp_path / "mixed"))
    assert len(said) == 1 and "1 of 3 episodes" in said[0] and "--dataset.episodes=[0,2] takes" in said[0]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_moves_the_policy_to_the_data(base, tmp_path, method):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    recorder = Recorder(tmp_path / "data", 80)
    demonstrations = LeRobotDataset(REPO_ID, root=base / "demonstrations")
    rows, stats = demonstrations.hf_dataset.with_format("numpy"), demonstrations.meta.stats["action"]
    episodes = synthetic(action=0.25 * stats["min"] + 0.75 * stats["max"])  # within what the policy can do
    for start, episode in zip((0, 24), episodes, strict=True):
        for step, frame in enumerate(episode.frames):
            frame |= {key: np.asarray(rows[key][start + step], np.float32) for key in WIDTH}
    recorder.add([episodes[0].frames])
    recorder.add([episodes[1].frames])  # a second round
    assert (recorder.episodes, recorder.frames) == (2, 48)
    trained = tuner(base, method=method, learning_rate=3e-3, batch_size=32)
    target = torch.tensor(episodes[0].frames[0]["action"])

    def distance():
        observation = {
            key: torch.from_numpy(np.stack([frame[key] for frame in episodes[0].frames[:8]])[:, None])
            for key in WIDTH
        }
        adapter = trained.adapter
        noise = torch.randn(8, *adapter.noise_spec.shape, generator=torch.Generator().manual_seed(0))
        with_task = {**observation, "task": ["push"] * 8}
        actions = adapter.postprocess(adapter.denoise(adapter.observe(with_task), noise))
        return float((actions - target).abs().mean())

    before = distance()
    frozen = {n: p.clone() for n, p in trained.model.named_parameters() if not p.requires_grad}
    assert bool(frozen) == (method == "lora")
    losses = trained.fit(DatasetConfig("a/b", root=str(tmp_path / "data")), 0, steps=110)
    assert len(losses) == 110 == trained.updates
    assert np.mean(losses[-20:]) < 0.2 * np.mean(losses[:5])
    assert distance() < 0.3 * before
    now = dict(trained.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


def test_the_same_seed_gives_the_same_losses(base, tmp_path):
    record(tmp_path / "data", synthetic(), 80)
    data = DatasetConfig("a/b", root=str(tmp_path / "data"))
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)  # LoRA's own start
        runs.append(tuner(base, batch_size=8).fit(data, seed, steps=5))
    assert runs[0] == runs[1] != runs[2]


def test_a_camera_dataset_trains_the_unet_alone(tmp_path):
    """A camera dataset goes through LeRobot's data loader; LoRA adapts the U-Net alone."""
    folder = make_diffusion(tmp_path / "policy", images=True, down_dims=(16, 32))
    adapter = load_adapter(options(folder))
    key, feature = next(iter(adapter.config.image_features.items()))
    height, width = feature.shape[1:]
    state = {k: f.shape[0] for k, f in adapter.config.input_features.items() if len(f.shape) == 1}
    episodes = synthetic(20, 1, action=(0.1, 0.2), width=state, camera=(key, (height, width, 3)))
    record(tmp_path / "data", episodes, 10)
    trained = tuner(folder, batch_size=2, drop_last_frames=0)
    names = {name for name, p in trained.policy.named_parameters() if p.requires_grad}
    assert names and all(name.startswith("diffusion.unet.") for name in names)
    assert len(trained.fit(DatasetConfig("a/b", root=str(tmp_path / "data")), 0, steps=2)) == 2
    trained.save(tmp_path / "out")


def test_a_vision_language_policy_trains_with_lerobots_own_targets(tmp_path):
    from tests.helpers.tiny import make_tiny

    chosen = make_tiny("smolvla", tmp_path / "policy")
    adapter = load_adapter(chosen)
    key, feature = next(iter(adapter.config.image_features.items()))
    shape = (*feature.shape[1:], 3)
    width = {"observation.state": adapter.config.input_features["observation.state"].shape[0]}
    action = [0.1] * adapter.config.output_features["action"].shape[0]
    record(tmp_path / "data", synthetic(6, 1, action=action, width=width, camera=(key, shape)), 10)
    config = TuningConfig(batch_size=2, num_workers=0)
    trained = FineTuner(chosen, config)
    trained.fit(DatasetConfig("a/b", root=str(tmp_path / "data")), 0, steps=2)
    trained.save(tmp_path / "out")
    assert is_peft(tmp_path / "out")


def test_default_targets_are_the_open_layers_outside_attention():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3))
    model.head = nn.Sequential(nn.Conv1d(8, 8, 3), nn.GroupNorm(2, 8), nn.Linear(8, 2))
    model.frozen = nn.Linear(2, 2)
    trainable = {name for name, _ in model.named_parameters() if not name.startswith("frozen")}
    targets = default_targets(model, "other", trainable)
    expected = [f"layers.{i}.linear{j}" for i in range(3) for j in (1, 2)] + ["head.0", "head.2"]
    assert sorted(targets) == sorted(expected), "not inside PyTorch's attention, not what is frozen"


def refused(argv, capsys):
    assert main(["lora", *argv]) == 2
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0], output.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--dataset.repo_id: name a LeRobotDataset"),
        (["--from_rollouts=true"], "--env.type: --from_rollouts needs"),
        (["--dataset.repo_id=a/b", "--from_rollouts=true", *ENV], "--dataset.repo_id: drop it"),
        (["--method=half", "--dataset.repo_id=a/b"], "--method: must be lora or full"),
        (["--from_rollouts=true", "--robot.type=mujoco_arm"], "--robot.type: people start its episodes"),
        (["--rounds=0", "--from_rollouts=true", *ENV], "--rounds: must be at least 1"),
        (["--env_steps=3", "--from_rollouts=true", *ENV], "--env_steps: must be at least one for each"),
        (["--peft.r=0", "--dataset.repo_id=a/b"], "--peft.r: must be at least 1"),
        (["--peft.method_type=MISS", "--dataset.repo_id=a/b"], "--peft.method_type: only LORA"),
        (["--learning_rate=-1", "--dataset.repo_id=a/b"], "--learning_rate: must be between"),
        (["--eval.constant_candidates=2", "--dataset.repo_id=a/b"], "--eval.constant_candidates: no"),
        (["--dataset.repo_id=a/b", "--dataset.streaming=true"], "--dataset.streaming: not supported"),
        (["--dataset.repo_id=a/b", "--policy.path=ws://x:1"], "is a policy server"),
        (["--dataset.repo_id=a/b"], "--policy.path: name the folder"),
        (["--dataset.repo_id=a/b", "--policy.engine=compile"], "--policy.engine: a policy that is trained"),
    ],
)
def test_a_bad_option_is_refused_in_one_line_and_nothing_is_written(argv, message, capsys, tmp_path):
    line, _ = refused([*argv, f"--output_dir={tmp_path / 'out'}"], capsys)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_targets_and_datasets_that_do_not_fit_the_policy_are_refused_in_one_line(base, tmp_path, capsys):
    data = [f"--dataset.repo_id={REPO_ID}", f"--dataset.root={base / 'demonstrations'}"]
    argv = [f"--policy.path={base}", *MACHINE, "--steps=1", f"--output_dir={tmp_path / 'out'}"]
    line, _ = refused([*argv, *data, "--peft.target_modules=nonsense"], capsys)
    assert "--peft.target_modules: nonsense matches no layer" in line and "diffusion.unet." in line
    line, _ = refused(
        [*argv, *data, "--peft.target_modules=['diffusion.unet.down_modules.0.0.conv1']"], capsys
    )
    assert "--peft.target_modules: " in line and "does not fit" in line
    line, _ = refused([*argv, "--dataset.repo_id=a/b", "--dataset.root=/nowhere"], capsys)
    assert "--dataset.root: there is no folder /nowhere" in line
    (tmp_path / "empty").mkdir()
    line, _ = refused([*argv, "--dataset.repo_id=a/b", f"--dataset.root={tmp_path / 'empty'}"], capsys)
    assert "--dataset.root: cannot read" in line
    record(tmp_path / "lacks", synthetic(width={"observation.state": 4}), 80)
    line, _ = refused([*argv, "--dataset.repo_id=a/b", f"--dataset.root={tmp_path / 'lacks'}"], capsys)
    assert "has no observation.environment_state, which the policy needs; it has action, obs" in line
    record(tmp_path / "other", synthetic(width={**WIDTH, "observation.state": 5}), 80)
    line, _ = refused([*argv, "--dataset.repo_id=a/b", f"--dataset.root={tmp_path / 'other'}"], capsys)
    assert "'observation.state' has shape (5,)" in line and "takes (4,)" in line
    record(tmp_path / "short", synthetic(length=4), 80)
    line, _ = refused([*argv, "--dataset.repo_id=a/b", f"--dataset.root={tmp_path / 'short'}"], capsys)
    assert "--drop_last_frames: no episode has more than 7 frames" in line
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_success_skips_every_round_and_ends_in_one_line(base, tmp_path, capsys):
    env = [*ENV[:2], "--env.episode_length=10"]
    argv = [f"--policy.path={base}", *env, *MACHINE, "--eval.n_episodes=1", "--from_rollouts=true"]
    argv += ["--env_steps=60", "--rounds=2", "--num_envs=2", f"--output_dir={tmp_path / 'out'}"]
    line, out = refused(argv, capsys)
    assert "--env_steps: none of 5 episodes in 60 steps succeeded" in line
    assert out.count("skipped, for there is nothing new to learn from") == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [entry.get("skipped") for entry in lines] == [None, True, True]
    assert not (tmp_path / "out" / "policy").exists()


def test_lora_of_a_lora_is_refused(base, tmp_path):
    trained = tuner(base, peft=PeftConfig(r=2))
    trained.save(tmp_path / "lora")
    with pytest.raises(UserError, match="is itself a LoRA adapter"):
        tuner(tmp_path / "lora")


@pytest.mark.parametrize(("method", "times"), [("lora", 10.0), ("full", 1.0)])
def test_the_default_learning_rate_is_lerobots_and_ten_times_that_for_lora(base, method, times):
    """LeRobot's own for the policy, which LoRA takes ten times."""
    data = DatasetConfig("a/b")
    trained = tuner(base, method=method)
    own = trained.policy.config.get_optimizer_preset().lr
    assert trained.pipeline(data, 10, 0).optimizer.lr == pytest.approx(times * own)
    assert trained.pipeline(data, 100, 0).scheduler.num_warmup_steps == 5
    trained.config.learning_rate = 0.02
    assert trained.pipeline(data, 10, 0).optimizer.lr == 0.02


def test_cameras_are_recorded_as_they_were_seen():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    recorded = as_recorded(pixels.float() / 255)  # as LeRobot hands them on
    assert recorded.dtype == np.uint8 and np.array_equal(recorded, pixels.permute(0, 2, 3, 1).numpy())
    assert (as_recorded(torch.full((1, 3, 2, 2), 0.999)) == 255).all()  # to the nearest


def test_the_loss_curve_holds_the_mean_of_every_hundred_steps():
    assert means([1.0, 3.0] * 50 + [5.0] * 20) == [2.0, 5.0]


def test_the_noise_of_an_episode_depends_on_its_seed_alone(base):
    """The second episode of an environment is the first of another that begins with its seed."""
    env = MetaworldStateConfig(task="drawer-close-v3", episode_length=10)
    session = Session(load_adapter(options(base)), env, EvalConfig(), MachineConfig(workers=0))
    found = []
    for seed, steps in ((7, 20), (8, 10)):
        with session.environments(1, keep_seen=True) as vec:
            found += Rollouts(session.runner, vec, session.own_noise, seed).collect(steps, progress=False)
    assert [episode.seed for episode in found] == [7, 8, 8]
    actions = [[frame["action"].tolist() for frame in episode.frames] for episode in found]
    assert actions[1] == actions[2] != actions[0]


def test_drop_last_frames_of_zero_keeps_episodes_that_the_policys_own_would_drop(base, tmp_path):
    record(tmp_path / "short", synthetic(length=4), 80)  # the policy drops the last 7 unless told
    data = DatasetConfig("a/b", root=str(tmp_path / "short"))
    assert len(tuner(base, batch_size=4, drop_last_frames=0).fit(data, 0, steps=2)) == 2
