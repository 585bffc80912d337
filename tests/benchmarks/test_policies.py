"""What counting and timing the policy types gives; the rows that `trimtab policies` prints are these."""

import json

import pytest
import torch
from torch import nn

from tests.benchmarks.full_size import FULL_SIZE, RUNNABLE, full_size
from tests.benchmarks.policies import main, operations
from tests.benchmarks.weightless import Counting, WithoutMemory, to_fake
from tests.helpers.tiny import TYPES
from trimtab.recipes.cli.policies import MANY, ROWS


def test_counts_of_tiny_instances(capsys, tmp_path):
    output = tmp_path / "rows.json"
    main(["--types=act,evo1", "--tiny", f"--output={output}"])
    assert len(capsys.readouterr().out.splitlines()) == 4
    saved = json.loads(output.read_text())
    assert [row["type"] for row in saved] == ["act", "evo1"]
    assert saved[0]["draws"] == "zero" and saved[0]["counted_on"] == "tiny instance"
    assert saved[1]["draws"] == "uniform" and saved[1]["inert"] > 0
    for row in saved:
        assert row["deterministic"] and 0 < row["share"] < 1 and 1 < row["many"] < MANY
        assert row["chunk_flops"] > 0
        # One `encode` and 16 `denoise`, which cost in proportion.
        assert row["many"] == pytest.approx(row["share"] + MANY * (1 - row["share"]), rel=0.02)


def test_the_stored_rows_are_what_is_counted(tmp_path, capsys):
    stored = {row["type"]: row for row in json.loads(ROWS.read_text())}
    assert list(stored) == list(TYPES)
    main(["--types=act", f"--output={tmp_path / 'rows.json'}"])
    assert json.loads((tmp_path / "rows.json").read_text()) == [stored["act"]]
    main(["--types=act", "--cameras=1"])
    assert "| (32,) |" in capsys.readouterr().out


def test_an_engine_is_timed_beside(capsys, tmp_path, monkeypatch):
    compile_ = torch.compile  # without a C++ compiler
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compile_(f, dynamic=dynamic, backend="eager"))
    output = tmp_path / "timings.json"
    main(["--types=act", "--tiny", "--time=2", "--threads=1", "--engine=compile", f"--output={output}"])
    text, error = capsys.readouterr()
    assert "own / engine" in text.splitlines()[0] and not error
    (saved,) = json.loads(output.read_text())
    assert saved["faster"] == pytest.approx(saved["own"] / saved["engine"], rel=0.5)


def test_timing_table(capsys, tmp_path):
    output = tmp_path / "timings.json"
    main(["--types=act", "--tiny", "--time=2", "--threads=1", f"--output={output}"])
    text = capsys.readouterr().out
    assert "adapter / own" in text.splitlines()[0] and "| `act` | tiny |" in text
    (saved,) = json.loads(output.read_text())
    assert saved["own"] > 0 and saved["many"] > 0


def test_operations_without_weights_are_those_with_them():
    """A Transformer that picks out tokens by a mask, counted with weights and without."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(512, 256)
            self.layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True)

        def forward(self, ids):
            hidden = self.layer(self.embedding(ids))
            return hidden[ids > 2] @ hidden.new_ones(256, 3)

    def count(model):
        with torch.no_grad(), Counting(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            shape = model.train()(torch.arange(6).repeat(2, 1)).shape
        return shape, counter.get_total_flops()

    weighty = Model()
    with WithoutMemory():
        weightless = Model()
    to_fake(weightless)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert count(weightless) == count(weighty)
    assert count(weighty)[0] == (6, 3)


def test_attention_on_the_cpu_is_counted():
    """PyTorch's counter passes over the CPU's fused attention."""

    class Adapter:
        max_batch = None

        def encode(self, batch):
            import trimtab.adapters as adapters

            torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 8, 4)] * 3)
            return adapters.Conditioning({"x": torch.ones(1)})

        def denoise(self, conditioning, noise):
            pass

        noise_spec = type("Spec", (), {"shape": (1,), "dtype": torch.float32})

    assert operations(Adapter(), {})[0] == 2 * (2 * 8 * 8 * 4)


@pytest.mark.parametrize("policy_type, billions", {"xvla": 0.88, "groot": 3.14}.items())
def test_published_sizes(policy_type, billions):
    adapter, batch = full_size(policy_type)
    count = sum(parameter.numel() for parameter in adapter.policy.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.01)
    with Counting():
        conditioning = adapter.encode(batch)
    assert conditioning.batch_size == 1


def test_published_sizes_that_are_only_counted():
    assert set(RUNNABLE) < set(FULL_SIZE)
    with pytest.raises(ValueError, match="xvla at published size can be counted, not run"):
        full_size("xvla", "cpu")
