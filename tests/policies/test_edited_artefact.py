"""An artefact that edits its chunks: as trained, put aside to the bit, and older ones as they were."""

import json
from functools import partial

import pytest
import torch

from tests.conftest import make_diffusion
from tests.helpers.steered import artefact_of, features_of, load, observations, processors
from tests.helpers.tiny import make_tiny
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.policies.acting import denoise_several
from trimtab.policies.actor import ActorConfig, NoiseActor
from trimtab.policies.artefact import load_artefact, save_artefact
from trimtab.policies.critic import CriticConfig, CriticEnsemble
from trimtab.policies.noise_space import ConstantNoiseConfig
from trimtab.policies.residual import ResidualActor

SCALE = 0.2
SIZE = CriticConfig(hidden=16, layers=1)


def parts(adapter):
    """An edit actor and a critic that have learnt something."""
    torch.manual_seed(5)
    size = adapter.chunk_shape[0] * adapter.chunk_shape[1]
    edit = ResidualActor(features_of(adapter), size, SCALE, ActorConfig(hidden=16, layers=2)).eval()
    for value in edit.net[-1].parameters():
        torch.nn.init.normal_(value, std=0.5)
    critic = CriticEnsemble(features_of(adapter), size, SIZE).eval().requires_grad_(False)
    return edit.requires_grad_(False), critic


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Two artefacts that differ in edits alone, their base, and its edit actor."""
    root = tmp_path_factory.mktemp("edited")
    options = PolicyConfig(path=str(make_diffusion(root / "base")), device="cpu")
    edit, critic = parts(load_adapter(options))
    adapter, actor = artefact_of(options, root / "plain", critic=(critic, SIZE))
    artefact_of(options, root / "edited", critic=(critic, SIZE), edit=edit)
    return root, adapter, actor, edit, critic


def chunks_of(folder, *changes, seed=6):
    """What LeRobot gets for three observations: the chunk at once, and action by action."""
    policy, (before, _) = load(folder, *changes), processors(folder)
    batch, found = before(observations(policy.adapter, 1)[0]), []
    for _ in range(2):
        torch.manual_seed(seed)
        policy.reset()
        if found:
            steps = range(found[0].shape[1])
            found.append(torch.stack([policy.select_action(dict(batch)) for _ in steps], 1))
        else:
            found.append(policy.predict_action_chunk(dict(batch)))
    assert torch.equal(*found)
    return found[0]


def timed_batch(root, adapter):
    """What ``chunks_of`` shows, with the base's history of two."""
    batch = processors(root / "edited")[0](observations(adapter, 1)[0])
    return {k: torch.stack([v, v], 1) for k, v in batch.items() if k.startswith("observation")}


@pytest.mark.parametrize("name", ["plain", "edited"])
def test_what_judges_or_edits_a_chunk_is_for_its_length_alone(both, name):
    options = PolicyConfig(path=str(both[0] / name), device="cpu", n_action_steps=2)
    with pytest.raises(
        UserError, match=r"--policy.n_action_steps: .*of chunks of 3 actions; for chunks of 2 st"
    ):
        load_artefact(options)


def test_it_executes_the_edited_chunk_as_in_training(both):
    root, adapter, actor, edit, _ = both
    steered = load_artefact(PolicyConfig(path=str(root / "edited"), device="cpu"))
    conditioning = adapter.example_conditioning(4, torch.Generator().manual_seed(0))
    features, prior = adapter.features(conditioning), torch.randn(4, 1, *adapter.noise_spec.shape)
    denoise = partial(denoise_several, adapter, conditioning)
    made = adapter.denoise(conditioning, actor.act(features, prior[:, 0], True))
    change = edit(features, made.flatten(1)).view_as(made)
    assert torch.allclose(steered.policy().act(features, prior, denoise).chunk, made + change, atol=1e-6)
    assert 0.02 < change.abs().max() <= SCALE
    plain, edited = chunks_of(root / "plain"), chunks_of(root / "edited")
    assert 0.02 < (edited - plain).abs().max() <= SCALE + 1e-6


def test_the_best_of_candidates_and_their_edits(both):
    root, adapter, actor, edit, critic = both
    chunk = chunks_of(root / "edited", "--num_candidates=3")
    conditioning = adapter.encode(timed_batch(root, adapter))
    features, space, kinds = adapter.features(conditioning), actor.space, set()
    torch.manual_seed(6)
    drawn = torch.randn(3, 3, *adapter.noise_spec.shape)
    own = actor.act(features, drawn[:, -1], True)
    for row in range(3):
        others = [space.expand(space.squash(space.draw(d[None])), d[None])[0] for d in drawn[row, :2]]
        made = torch.cat([adapter.denoise(conditioning[row], n[None]) for n in [*others, own[row]]]).flatten(
            1
        )
        seen = features[row].expand(3, -1)
        offered = torch.cat([made, made + edit(seen, made)])
        best = int(critic(features[row].expand(6, -1), offered).mean(0).argmax())
        kinds.add(best > 2)
        assert torch.allclose(chunk[row].flatten(), offered[best], atol=1e-5)
    assert True in kinds, "an edited one won somewhere"


@pytest.mark.parametrize("count", [1, 3])
def test_edits_put_aside_are_no_edits_to_the_bit(both, count):
    root, candidates = both[0], f"--num_candidates={count}"
    plain = chunks_of(root / "plain", candidates)
    assert torch.equal(chunks_of(root / "edited", candidates, "--use_edit=false"), plain)
    assert not torch.equal(chunks_of(root / "edited", candidates), plain)


def test_an_artefact_of_before_acts_as_before(both):
    root = both[0]
    assert not (root / "plain" / "edit.safetensors").exists()
    expected = chunks_of(root / "plain")
    config = json.loads((root / "plain" / "config.json").read_text())
    assert config.pop("edit_scale") == 0.0 and config.pop("use_edit")
    (root / "plain" / "config.json").write_text(json.dumps(config))
    assert torch.equal(chunks_of(root / "plain"), expected)


def test_saved_again_it_is_whole(both, tmp_path):
    root = both[0]
    load(root / "edited", "--use_edit=false").save_pretrained(tmp_path / "base_beside" / "again")
    kept = (tmp_path / "base_beside" / "again" / "edit.safetensors").read_bytes()
    assert kept == (root / "edited" / "edit.safetensors").read_bytes()
    (root / "edited" / "edit.safetensors").rename(tmp_path / "aside")
    with pytest.raises(UserError, match=r"is not a whole artefact, it lacks edit\.safetensors"):
        load(root / "edited")
    (tmp_path / "aside").rename(root / "edited" / "edit.safetensors")


def test_edits_see_what_an_actor_of_one_noise_does_not(both, tmp_path):
    root, adapter, _, edit, _ = both
    noise, options = ConstantNoiseConfig(), PolicyConfig(path=str(root / "base"), device="cpu")
    actor = NoiseActor(
        features_of(adapter), noise.build(adapter.noise_spec), ActorConfig(hidden=16, layers=2)
    )
    save_artefact(tmp_path / "one", actor, noise, adapter, options, root / "base", {}, edit=edit)
    plain, edited = (chunks_of(tmp_path / "one", f"--use_edit={use}") for use in ("false", "true"))
    conditioning = adapter.encode(timed_batch(root, adapter))
    change = edit(adapter.features(conditioning), plain.flatten(1)).view_as(plain)
    assert torch.allclose(edited, plain + change, atol=1e-6)


def test_real_time_chunking_is_refused_with_edits_alone(tmp_path):
    options = make_tiny("smolvla", tmp_path / "base")
    edit, _ = parts(load_adapter(options))
    adapter, _ = artefact_of(options, tmp_path / "artefact", edit=edit)
    policy, (before, _) = load(tmp_path / "artefact"), processors(tmp_path / "artefact")
    batch = before(observations(adapter, 1, count=1)[0])
    assert not policy.supports_rtc()
    with pytest.raises(UserError, match=r"edits its chunks does no real-time .*, or --policy.use_edit=false"):
        policy.predict_action_chunk(dict(batch), inference_delay=0, prev_chunk_left_over=None)
    policy.config.use_edit = False
    assert policy.supports_rtc()
    assert policy.predict_action_chunk(dict(batch), inference_delay=0).shape[1] == adapter.config.chunk_size
