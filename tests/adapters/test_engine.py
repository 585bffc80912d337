"""``--policy.engine``: what is compiled or recorded is what the adapter does; else, a line says so."""

import os
from dataclasses import replace

import pytest
import torch

from tests.helpers.adapter_cases import noise_like
from tests.helpers.as_if_cuda import AsIfCuda
from tests.helpers.cpu_graph import CpuGraph, graphs_on_the_cpu
from tests.helpers.tiny import make_tiny
from trimtab.adapters import Conditioning, PolicyConfig, UserError, load_adapter
from trimtab.adapters import engine as engines
from trimtab.adapters.cuda_graphs import Constants, Recorder
from trimtab.adapters.engine import Engine, attach
from trimtab.adapters.steerability import measure

SIX = ("pi0", "pi05", "smolvla", "groot", "diffusion", "multi_task_dit")
WAITS_FOR = {("groot", "encode"): "groot.py"}
# (observations, noises of each): fixed at the second call, compared in the next two; fewer are padded.
CALLS = [*[(3, 2)] * 4, (2, 2), (1, 2), (2, 2), (3, 2), *[(1, 1)] * 4, (3, 2)]


def act_in_turn(plain, ours, calls, tolerance):
    """Both adapters at the same observations and noises; earlier results must outlive later calls."""
    results = []
    for seed, (rows, k) in enumerate(calls):
        observation = plain.example_observation(rows, torch.Generator().manual_seed(seed))
        noise = noise_like(plain, rows * k, seed).to(plain.device)
        pair = []
        for adapter in (plain, ours):
            conditioning = adapter.observe(observation)
            chunk = adapter.denoise(conditioning.repeat_interleave(k), noise)
            pair.append({**conditioning.tensors, "chunk": chunk})
        results.append((*pair, {name: value.clone() for name, value in pair[1].items()}))
    for expected, found, then in results:
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], then[name]), f"a later call changed {name}"
            assert found[name].dtype == value.dtype
            farthest = (found[name].double() - value.double()).abs().max()
            assert farthest <= tolerance * max(1.0, float(value.double().abs().max())), name


@pytest.mark.parametrize("kind", SIX)
def test_what_a_graph_can_hold(kind, tmp_path):
    """On fake CUDA tensors nothing waits for the device, or just what the README names."""
    adapter = load_adapter(make_tiny(kind, tmp_path / kind))
    batch = adapter.preprocess(adapter.example_observation(2, torch.Generator().manual_seed(0)))
    tensors, cuda = adapter.encode(batch).tensors, AsIfCuda()
    noise = cuda.tensor(noise_like(adapter, 6))
    batch = {name: cuda.tensor(value) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    conditioning = Conditioning({name: cuda.tensor(value) for name, value in tensors.items()}, repeats=3)
    cuda.move(adapter)
    calls = {"encode": lambda: adapter.encode(batch), "denoise": lambda: adapter.denoise(conditioning, noise)}
    for name, call in calls.items():
        constants, wanted = Constants(), WAITS_FOR.get((kind, name))
        for _ in range(2):
            cuda.waits.clear()
            with constants, cuda:
                if wanted is None:
                    call()
                else:
                    with pytest.raises(Exception, match="aten"):
                        call()
        assert bool(cuda.waits) == bool(wanted) and all(wanted in line for line in cuda.waits), cuda.waits


@pytest.mark.parametrize("kind", ["diffusion", "pi0"])
def test_recorded_is_the_adapter_itself(kind, tmp_path, monkeypatch, capsys):
    """The operations are replayed on the CPU, and their Python is not run."""
    graphs_on_the_cpu(monkeypatch)
    options = make_tiny(kind, tmp_path / kind)
    plain, ours = load_adapter(options), load_adapter(options)
    attach(ours, "--policy.engine=cuda_graph", Recorder(ours.device))
    act_in_turn(plain, ours, CALLS, 1e-6)
    assert capsys.readouterr().err == ""
    assert CpuGraph.recorded == 3  # encoded three, denoised three with two noises and one with one


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_is_the_adapter_itself(backend, tmp_path, monkeypatch, capsys):
    """With the default backend too, on request: its C++ compiler works for minutes."""
    if backend == "inductor" and not os.environ.get("TRIMTAB_INDUCTOR"):
        pytest.skip("needs a C++ compiler and minutes of it; set TRIMTAB_INDUCTOR=1 to run it")
    compile_, compiled = torch.compile, []

    def noted(function, dynamic):
        compiled.append(function.__self__)
        return compile_(function, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(torch, "compile", noted)
    options = make_tiny("diffusion", tmp_path / "diffusion")
    plain, ours = load_adapter(options), load_adapter(replace(options, engine="compile"))
    act_in_turn(plain, ours, CALLS[:8], 1e-5)
    diffusion = ours.policy.diffusion
    assert compiled == [diffusion.unet] and capsys.readouterr().err == ""
    assert "forward" not in vars(diffusion.unet)  # who trains or hashes it meets the policy itself


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", SIX)
def test_recorded_on_a_gpu_is_the_adapter_itself(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # rounds otherwise for another batch
    options = replace(make_tiny(kind, tmp_path / kind), device="cuda")
    plain, ours = load_adapter(options), load_adapter(replace(options, engine="cuda_graph"))
    act_in_turn(plain, ours, CALLS, 1e-4)
    lines = capsys.readouterr().err.splitlines()
    stopped = [name for name in ours.recorded if any(f"cuda_graph: {name}:" in line for line in lines)]
    assert stopped == [name for of, name in WAITS_FOR if of == kind], lines
    torch.randn(1, device="cuda")  # the generator has been left as it was


def engine(function, fix=lambda run: run):
    return Engine("--policy.engine=x: f", torch.device("cpu"), fix, function, dict, dict)


def test_a_kind_is_its_names_shapes_precisions_and_noises(capsys):
    ours, fixed = engine(lambda given, repeats: {"y": given["x"] * repeats}), []
    ours._fix = lambda run: fixed.append(1) or run
    tensors = [torch.ones(2, 3), torch.ones(2, 3).double(), torch.ones(2, 4)]
    for _ in range(2):
        for x in tensors:
            for repeats in (1, 2):
                assert torch.equal(
                    ours(lambda x=x, r=repeats: {"y": x * r}, {"x": x}, repeats)["y"], x * repeats
                )
    assert len(fixed) == 6
    for _ in range(2):
        ours(lambda: {"y": torch.ones(2, 3)}, {"x": torch.ones(2, 3), "z": torch.ones(2)}, 1)
    assert len(fixed) == 7 and ours.works and capsys.readouterr().err == ""


def test_what_is_no_tensor_is_not_left_out(tmp_path, monkeypatch):
    """vla_jepa would encode LeRobot's own instruction; a list in a conditioning would be lost."""
    adapter = load_adapter(make_tiny("vla_jepa", tmp_path))
    plain, asked = adapter.denoise, []
    monkeypatch.setattr(adapter, "denoise", lambda *given: asked.append(1) or plain(*given))
    attach(adapter, "test", lambda run: run)
    assert "encode" not in vars(adapter) and "denoise" in vars(adapter)
    seen = adapter.observe(adapter.example_observation(1, torch.Generator().manual_seed(0)))
    seen = Conditioning(seen.tensors, {"task": ["push"]})
    noise = noise_like(adapter, 1)
    for _ in range(8):
        adapter.denoise(seen, noise)
    assert len(asked) == 8


def test_what_cannot_be_padded_is_a_kind_of_its_own():
    ours, shapes = engine(lambda given, _: {"y": given["x"].sum(0)}), []
    ours._fix = lambda run: shapes.append(1) or run
    for rows in (4, 2, 4, 2, 4, 2):  # images of all observations in one row, beside the observations
        given = {"x": torch.ones(rows, 3), "images": torch.ones(2 * rows, 3)}
        found = ours(lambda rows=rows: {"y": torch.full((3,), float(rows))}, given)
        assert torch.equal(found["y"], torch.full((3,), float(rows)))
    assert len(shapes) == 2 and ours.works


def test_only_so_many_kinds_are_kept(monkeypatch, capsys):
    monkeypatch.setattr(engines, "MOST", 2)
    ours, fixed = engine(lambda given, _: {"y": given["x"] + 1}), []
    ours._fix = lambda run: fixed.append(1) or run
    for width in (1, 1, 2, 2, 3, 3, 4, 4, 3, 1):
        x = torch.ones(2, width)
        assert torch.equal(ours(lambda x=x: {"y": x + 1}, {"x": x})["y"], x + 1)
    assert len(fixed) == 2 and ours.works
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "--policy.engine=x: f: 2 shapes of batches so far; further ones run as they are"


DIFFER = "its results differ from the function's own"


def test_larger_batches_take_the_place_of_smaller_ones(monkeypatch, capsys):
    monkeypatch.setattr(engines, "MOST", 2)
    ours = engine(lambda given, _: {"y": given["x"] + 1})
    for rows in (1, 1, 2, 2, 3, 3, 4, 4, 1, 2, 3, 4):
        x = torch.arange(float(rows)).unsqueeze(1)
        assert torch.equal(ours(lambda x=x: {"y": x + 1}, {"x": x})["y"], x + 1)
    assert [list(sizes) for sizes in ours._fixed.values()] == [[3, 4]]
    assert ours.works and capsys.readouterr().err == ""


def failing(run):
    raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


@pytest.mark.parametrize(
    ("function", "fix", "why"),
    [
        (lambda given, _: {"y": given["x"]}, failing, "operation not permitted when stream is capturing"),
        (lambda given, _: {"y": given["task"]}, lambda run: run, "KeyError: 'task'"),
        (
            lambda given, _: {"y": given["x"] * 1.2},
            lambda run: run,
            DIFFER,
        ),
        (
            lambda given, _: {"y": given["x"][:1]},
            lambda run: run,
            DIFFER,
        ),
    ],
)
def test_where_it_cannot_be_a_line_says_so_and_it_runs_as_it_is(function, fix, why, capsys):
    ours = engine(function, fix)
    for value in range(4):
        x = torch.full((2, 2), float(value + 1))
        assert torch.equal(ours(lambda x=x: {"y": x}, {"x": x, "task": ["push"] * 2})["y"], x)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--policy.engine=x: f: {why}") and line.endswith("; it runs as it is")


def test_state_behind_the_tensors_is_noticed(capsys):
    """What Python reads elsewhere, a recording would repeat for ever."""
    state, replayed = [1.0], []

    def fix(run):
        replayed.append(run())
        return lambda: replayed[0]

    ours = engine(lambda given, _: {"y": given["x"] * state[0]}, fix)
    for value in (1.0, 1.0, 1.0, 5.0):
        state[0] = value
        assert float(ours(lambda: {"y": torch.ones(1) * state[0]}, {"x": torch.ones(1)})["y"]) == value
    assert not ours.works and "differ" in capsys.readouterr().err


def test_copies_that_differ_from_call_to_call_are_noticed():
    cuda, constants, calls = AsIfCuda(), Constants(), []

    def copies():
        if not calls:  # as a module that makes a table at its first call
            torch.ones(2).to("cuda:0")
        calls.append(torch.tensor([1.0], device="cuda:0"))

    with constants, cuda:
        copies()
    with constants, cuda, pytest.raises(RuntimeError, match="differs from call to call"):
        copies()


def test_rounding_is_no_randomness(tmp_path):
    """The first results are the function's own, the next ones not to the bit: that is no random sampling."""
    adapter = load_adapter(make_tiny("diffusion", tmp_path / "base"))

    def rounded(run):
        return lambda: {name: value * (1 + 1e-6) for name, value in run().items()}

    attach(adapter, "--policy.engine=x", rounded)
    generator = torch.Generator().manual_seed(0)
    observations = [adapter.example_conditioning(1, generator) for _ in range(3)]
    measured = measure(adapter, observations, noises=2, repeats=0)
    assert measured.repeat_difference > 0 and measured.deterministic
    for _ in range(3):
        adapter.verify()


def test_without_cuda_a_line_says_so(tmp_path, capsys):
    ours = load_adapter(replace(make_tiny("diffusion", tmp_path / "base"), engine="cuda_graph"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "--policy.engine=cuda_graph: the policy runs on cpu, not on CUDA; it runs as it is"
    assert "denoise" not in vars(ours)


def test_another_engine_is_refused():
    with pytest.raises(UserError, match=r"--policy.engine: must be one of eager, .*got fast"):
        load_adapter(PolicyConfig(path="nowhere", engine="fast"))
