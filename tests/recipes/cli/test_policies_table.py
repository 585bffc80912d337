"""The table of policies that `trimtab policies` prints."""

import json

import pytest
import torch
from torch import nn

from trimtab.recipes.cli import main
from trimtab.recipes.cli.policies import MANY, operations
from trimtab.recipes.full_size import FULL_SIZE, RUNNABLE, full_size
from trimtab.recipes.full_size.weightless import Counting, WithoutMemory, to_fake

HEADER = (
    "| policy | noise of one sample | draws | deterministic | prefix share | 16 noises / 1 | counted on |"
)


def rows(text):
    """Cells of a Markdown table without its header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_table_of_tiny_instances(capsys, tmp_path):
    output = tmp_path / "rows.json"
    assert main(["policies", "--types=act,evo1", "--full_size=false", f"--output={output}"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == HEADER and len(text.splitlines()) == 4
    act, evo1 = rows(text)
    assert act[0] == "`act`" and act[2:4] == ["zero", "yes"] and act[-1] == "tiny instance"
    assert evo1[0] == "`evo1`" and evo1[2:4] == ["uniform", "yes"] and "inert" in evo1[1]
    saved = json.loads(output.read_text())
    assert [row["type"] for row in saved] == ["act", "evo1"]
    for row, cells in zip(saved, (act, evo1)):
        assert 0 < row["share"] < 1 and 1 < row["many"] < MANY and row["chunk_flops"] > 0
        assert cells[4] == f"{100 * row['share']:.0f} %" and cells[5] == f"{row['many']:.1f}"
        # One `encode` and 16 `denoise`, which cost in proportion.
        assert row["many"] == pytest.approx(row["share"] + MANY * (1 - row["share"]), rel=0.02)
        assert str(tuple(row["noise"])) in cells[1]


def test_table_at_published_size(capsys):
    assert main(["policies", "--types=act", "--cameras=1"]) == 0
    (cells,) = rows(capsys.readouterr().out)
    assert cells[0] == "`act`" and cells[1] == "(32,)" and cells[-1] == "52 M"


def test_timing_table(capsys, tmp_path):
    output = tmp_path / "timings.json"
    argv = ["policies", "--types=act", "--full_size=false", "--time=2", "--threads=1", f"--output={output}"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "adapter / own" in text.splitlines()[0]
    (cells,) = rows(text)
    (saved,) = json.loads(output.read_text())
    assert cells[:2] == ["`act`", "tiny"] and saved["own"] > 0 and saved["many"] > 0


BAD = {
    "--types=act,sac": "--types: no policy type sac; there are act",
    "--cameras=0": "--cameras: must be at least 1, got 0",
    "--threads=0": "--threads: must be at least 1, got 0",
    "--time=-1": "--time: must be at least 0, got -1",
    "--time=soon": "--time: ",
    "--full_size=perhaps": "--full_size: ",
    "--tipes=act": "--tipes: no such option",
}


@pytest.mark.parametrize("option", BAD)
def test_bad_option(option, capsys):
    assert main(["policies", option]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and BAD[option] in lines[0] and captured.out == ""


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
