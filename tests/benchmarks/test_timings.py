"""Developers' timings: each runs, and its ratios are those of the times it took."""

import json
import os
import time

import pytest
import torch

from tests.benchmarks import overhead, processes, updates
from trimtab.adapters import PolicyConfig, load_adapter
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.artefact import save_artefact
from trimtab.policies.noise_space import FullNoiseConfig


def run_updates(tmp_path, *options):
    output = tmp_path / "updates.json"
    few = ["--widths=16", "--repetitions=2", "--updates=2", f"--output={output}"]
    updates.main([*few, *options])
    return json.loads(output.read_text())["16"]


def test_updates_of_every_learner_beside_stable_baselines3(tmp_path, capsys):
    rows = run_updates(tmp_path, "--precisions=float32,bfloat16")
    assert list(rows) == ["sb3", *(name + end for name in updates.OURS for end in ("", "_bfloat16"))]
    assert rows["sb3"]["ratios"] == [1.0, 1.0]
    for row in rows.values():
        assert row["ms"] > 0 and row["updates_per_second"] == pytest.approx(1e3 / row["ms"], rel=0.01)
        assert len(row["ratios"]) == 2
        assert row["ratio"] == pytest.approx(sum(row["ratios"]) / 2, abs=0.002)  # the median of two
    assert rows["best_of_n"]["ms"] > rows["dsrl_sac"]["ms"]
    assert "| 3x16 | `dsrl_na_bfloat16` |" in capsys.readouterr().out


def test_compiled_beside_eager(tmp_path, monkeypatch, capsys):
    """Real turns of both; the compiler's backend is the one that needs no C++ compiler."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="eager"))
    rows = run_updates(tmp_path, "--learners=dsrl_sac", "--engines=eager,compile")
    assert list(rows) == ["dsrl_sac", "dsrl_sac_compile"] and len(rows["dsrl_sac_compile"]["ratios"]) == 2
    assert "| 3x16 | `dsrl_sac_compile` |" in capsys.readouterr().out


def test_each_learner_is_timed_in_each_precision_and_engine():
    found = updates.variants(["sb3", "default"], ["float32", "bfloat16"], ["eager", "cuda_graph"])
    assert list(found) == [
        *("sb3", "default", "default_cuda_graph"),
        *("default_bfloat16", "default_bfloat16_cuda_graph"),
    ]
    assert found["default_bfloat16_cuda_graph"] == {
        **{"of": "default", "precision": "bfloat16", "engine": "cuda_graph"},
    }


def test_one_process_is_timed_from_its_first_update_on(tiny_base, tmp_path):
    few = ["--num-envs=2", "--env-steps=150", "--updates-per-transition=0.5", "--episode-length=20"]
    worker = ["--task=drawer-close-v3", f"--worker={tmp_path / 'found.json'}"]
    started = time.perf_counter()
    processes.main([f"--base={tiny_base}", *few, *worker])
    elapsed = time.perf_counter() - started
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["env_steps_per_second"] > 20 / elapsed  # of 150 steps, learning begins within the first 130
    # Chunks of at most 8 steps, the last of an episode 4: one transition for each, half an update for that.
    assert 0.5 / 8 <= found["updates_per_env_step"] <= 0.5 / 4
    assert set(found["shares"]) == {f"seconds_share/{n}" for n in ("learner_waits", "envs_wait", "denoise")}


@pytest.mark.skipif(not os.environ.get("TRIMTAB_PROCESSES"), reason="takes minutes; set TRIMTAB_PROCESSES=1")
def test_two_processes_beside_one(tiny_base, tmp_path, capsys):
    output = tmp_path / "processes.json"
    few = ["--env-steps=150", "--repetitions=1", "--num-envs=2", "--updates-per-transition=0.5"]
    few += ["--task=drawer-close-v3", "--episode-length=20", f"--output={output}"]
    processes.main([f"--base={tiny_base}", *few])
    found = json.loads(output.read_text())
    one, two = (found["processes"][count] for count in ("1", "2"))
    (ratio,) = found["ratios"]
    assert ratio == pytest.approx(two["median"] / one["median"], rel=0.02) and ratio > 0.1
    # A process's own batches per environment step of all: half as many, each of two processes' halves.
    assert two["updates_per_env_step"] == pytest.approx(one["updates_per_env_step"] / 2, rel=0.4)
    assert "processes_wait" in "".join(two["shares"]) and "processes_wait" not in "".join(one["shares"])
    assert "| 2 |" in capsys.readouterr().out


def test_overhead_of_a_steered_policy(tiny_base, tmp_path, capsys):
    adapter, noise = load_adapter(PolicyConfig(path=str(tiny_base), device="cpu")), FullNoiseConfig()
    width = adapter.features(adapter.example_conditioning(1, torch.Generator())).shape[-1]
    actor = NoiseActor(width, noise.build(adapter.noise_spec), ActorConfig(hidden=8, layers=1))
    artefact, output = tmp_path / "artefact", tmp_path / "overhead.json"
    save_artefact(artefact, actor, noise, adapter, PolicyConfig(path=str(tiny_base)), tiny_base, {})
    overhead.main([str(artefact), "--chunks=4", f"--output={output}"])
    found = json.loads(output.read_text())
    assert found["setting"]["actions_per_chunk"] == adapter.chunk_shape[0]
    for row in (found, found["policy_alone"]):
        assert row["ratio"] == pytest.approx(row["steered_ms"] / row["base_ms"], abs=2e-2)
        assert 0.2 < row["paired_ratio"] < 5.0
    assert found["policy_alone"]["base_ms"] < found["base_ms"]
    assert "| with processors |" in capsys.readouterr().out


def test_overhead_compares_medians_and_neighbours():
    """By hand: medians 2 and 3; ratios 1, 1.5, 2, 0.5, 3."""
    row = overhead.compare({"base": [1.0, 2.0, 3.0, 2.0, 1.0], "steered": [1.0, 3.0, 6.0, 1.0, 3.0]})
    assert (row["base_ms"], row["steered_ms"], row["ratio"]) == (2000.0, 3000.0, 1.5)
    assert row["paired_ratio"] == 1.5 and row["quartiles"] == [1.0, 2.0]
