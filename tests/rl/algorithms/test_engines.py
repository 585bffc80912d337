"""Updates compiled, recorded as CUDA graphs or in bfloat16 are the plain ones; else, a line says so."""

import os

import pytest
import torch
from accelerate import Accelerator

from trimtab.adapters import NoiseSpec, UserError
from trimtab.policies.actor import ActorConfig
from trimtab.policies.critic import CriticConfig
from trimtab.policies.noise_space import FullNoiseConfig
from trimtab.policies.residual import EditConfig
from trimtab.rl.algorithms import BestOfNConfig, DSRLNAConfig, DSRLSACConfig, Problem, engines
from trimtab.rl.runs.processes import ProcessGroup, StepGuard, optimizers

FEATURES, DIM, CHUNK, B, K = 5, 4, 6, 32, 8
CONFIGS = {
    "dsrl_sac": (DSRLSACConfig, {}),
    "dsrl_na": (DSRLNAConfig, {"num_candidates": K, "distillation_steps": 0.5}),
    "importance": (DSRLNAConfig, {"num_candidates": K, "bootstrap": "importance"}),
    "best_of_n": (BestOfNConfig, {"num_candidates": K, "target_candidates": 4, "actor_every": 3}),
    "dropout": (BestOfNConfig, {"num_candidates": K}),
    "edits": (BestOfNConfig, {"num_candidates": K, "edit": EditConfig(scale=0.3)}),
}


def make(name, engine="eager", cpu=True, **more):
    torch.manual_seed(0)
    make_config, settings = CONFIGS[name]
    critic = CriticConfig(hidden=16, layers=2, dropout=0.1 if name == "dropout" else 0.0)
    size = {"actor": ActorConfig(hidden=16, layers=2), "critic": critic}
    config = make_config(engine=engine, **size, **settings, **more)
    space = FullNoiseConfig().build(NoiseSpec((2, 2)))
    accelerator = Accelerator(cpu=cpu)
    algorithm = config.build(Problem(FEATURES, space, accelerator, (-20.0, 0.0), CHUNK))
    algorithm.fit_normalizer(torch.randn(100, FEATURES))
    StepGuard(ProcessGroup(accelerator), 10.0).attach(algorithm)
    return algorithm


def batches(count, device="cpu"):
    torch.manual_seed(1)
    for _ in range(count):
        batch = {"reward": -torch.rand(B), "discount": torch.rand(B), "u": torch.rand(B, DIM) - 0.5}
        for before in ("", "next_"):
            batch[f"{before}features"] = torch.randn(B, FEATURES)
            batch[f"{before}candidates"] = torch.randn(B, K, CHUNK)
            batch[f"{before}candidates_u"] = torch.rand(B, K, DIM) - 0.5
        batch["chunk"] = batch["candidates"][:, 0].clone()
        yield {key: value.to(device) for key, value in batch.items()}


def learn(algorithm, updates, device="cpu"):
    """Metrics of so many updates."""
    found = []
    for number, batch in enumerate(batches(updates, device)):
        torch.manual_seed(number)
        found.append({name: float(value) for name, value in algorithm.update(batch).items()})
    return found


def check_alike(first, second, metrics, atol):
    for one, other in zip(*metrics, strict=True):
        assert one.keys() == other.keys()
        assert [*other.values()] == pytest.approx([*one.values()], rel=1e-3, abs=1e-3)
    for name, value in first.state_dict().items():
        assert torch.allclose(value, second.state_dict()[name], atol=atol), name


@pytest.mark.parametrize("name", CONFIGS)
def test_updates_of_equal_phases_do_the_same(name):
    """What they report tells what they did; and a phase is told from the number of the update alone."""
    algorithm, reports = make(name), {}
    for batch in batches(61):
        phase = algorithm.phase()
        reports.setdefault(phase, set()).add(tuple(algorithm.update(batch)))
    assert all(len(found) == 1 for found in reports.values())
    assert 3 <= len(reports) <= 16


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["dsrl_sac", "best_of_n"])
def test_compiled_updates_are_the_eager_ones(name, backend, monkeypatch, capsys):
    """With the default backend too, on request: its C++ compiler works for a minute."""
    if backend == "inductor" and not os.environ.get("TRIMTAB_INDUCTOR"):
        pytest.skip("needs a C++ compiler and a minute of it; set TRIMTAB_INDUCTOR=1 to run it")
    compile_, compiled = torch.compile, []

    def noted(function, dynamic):
        compiled.append(function)
        return compile_(function, dynamic=dynamic, backend=backend, fullgraph=True)

    monkeypatch.setattr(torch, "compile", noted)
    plain, ours = make(name), make(name, "compile")
    metrics = learn(plain, 12), learn(ours, 12)
    networks = {"dsrl_sac": 3, "best_of_n": 4}[name]  # actor, critics and their targets
    assert len(compiled) == networks and ours._engine.works and capsys.readouterr().err == ""
    assert "forward" not in vars(ours.actor.net)  # who acts does so eagerly
    check_alike(plain, ours, metrics, atol=2e-5)


def test_without_a_compiler_a_line_says_so_and_updates_go_on(monkeypatch, capsys, tmp_path):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        plain, ours = make("dsrl_sac"), make("dsrl_sac", "compile")
        metrics = learn(plain, 3), learn(ours, 3)
    check_alike(plain, ours, metrics, atol=0.0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--rl.engine=compile: cannot compile here (") and "no-such-compiler" in line


def test_without_cuda_a_line_says_so_and_updates_go_on(capsys):
    plain, ours = make("dsrl_sac"), make("dsrl_sac", "cuda_graph")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "--rl.engine=cuda_graph: the learner runs on cpu, not on CUDA; updates run as they are"
    check_alike(plain, ours, (learn(plain, 3), learn(ours, 3)), atol=0.0)
    assert make("dsrl_na", mode="exact").obstacle and not make("dsrl_na").obstacle


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_updates_are_the_eager_ones(name, precision, capsys):
    plain, ours = (make(name, engine, cpu=False, precision=precision) for engine in ("eager", "cuda_graph"))
    metrics = learn(plain, 260, "cuda"), learn(ours, 260, "cuda")
    assert ours._engine.works and len(ours._engine._recorded) >= 3, capsys.readouterr().err
    assert ours.updates == plain.updates == 260
    check_alike(plain, ours, metrics, atol=1e-3)


def test_an_unknown_engine_is_refused():
    with pytest.raises(UserError, match=r"--rl\.engine: 'fast' is none of eager, compile, cuda_graph"):
        DSRLSACConfig(engine="fast")


def test_rates_fall_to_the_share_that_is_asked():
    for end in (0.2, 1.0):
        algorithm = make("dsrl_sac", learning_rate_end=end, learning_rate=1e-3)
        assert len(optimizers(algorithm)) == 3
        for share in (0.0, 0.25, 1.0, 1.5, 0.5):
            algorithm.progress(share)
            rates = [group["lr"] for o in optimizers(algorithm).values() for group in o.param_groups]
            assert rates == pytest.approx([(1.0 - min(share, 1.0) * (1.0 - end)) * 1e-3] * 3)


def test_bfloat16_update_is_near_the_exact_one(monkeypatch):
    monkeypatch.setattr(engines, "has_bfloat16", lambda device: True)
    exact, rough = (make("dsrl_sac", actor_every=1, precision=p) for p in ("float32", "bfloat16"))
    (before, *_), (after, *_) = learn(exact, 1), learn(rough, 1)
    assert before["critic_loss"] != after["critic_loss"]
    for name in ("critic_loss", "q_mean", "actor_loss", "entropy"):
        assert after[name] == pytest.approx(before[name], rel=0.05, abs=0.05)
    assert all(p.dtype == torch.float32 for p in rough.parameters())
    rough.actor.load_state_dict(exact.actor.state_dict())  # who acts does so in float32
    features = torch.randn(9, FEATURES)
    assert torch.equal(exact.actor(features)[0], rough.actor(features)[0])


def test_bfloat16_learns_as_float32_does(monkeypatch):
    """Over many updates: weights from before an optimiser's step would hold the loss up."""
    monkeypatch.setattr(engines, "has_bfloat16", lambda device: True)
    ends = []
    for precision in ("float32", "bfloat16"):
        # Squared errors can get to 0, cross-entropy cannot.
        algorithm = make("best_of_n", precision=precision, critic_loss="squared", learning_rate_end=1.0)
        (batch,) = batches(1)
        batch["discount"].zero_()
        losses = [float(algorithm.update(batch)["critic_loss"]) for _ in range(200)]
        ends.append(sum(losses[-20:]) / 20)
        assert ends[-1] < 0.05 * losses[0]
    assert 0.5 < ends[1] / ends[0] < 2.0


def test_where_there_is_no_bfloat16_a_line_says_so(monkeypatch, capsys):
    cpu = torch.device("cpu")
    assert not engines.use_bfloat16("float32", cpu)
    monkeypatch.setattr(engines, "has_bfloat16", lambda device: True)
    assert engines.use_bfloat16("bfloat16", cpu) and capsys.readouterr().err == ""
    monkeypatch.setattr(engines, "has_bfloat16", lambda device: False)
    assert not engines.use_bfloat16("bfloat16", cpu)
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match=r"--rl\.precision"):
        DSRLSACConfig(precision="float16")
