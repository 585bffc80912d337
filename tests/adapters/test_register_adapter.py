"""A user's own policy gets an adapter: the code of adapters/README.md, run as it stands there."""

import re
import sys
from pathlib import Path

import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors

import trimtab.adapters
from tests.helpers.my_flow import MyFlowConfig, MyFlowPolicy, features
from trimtab.adapters import NoiseSpec, UserError, adapter_types, register_adapter
from trimtab.adapters.lerobot.injection import InjectedAdapter, NoiseInjector
from trimtab.adapters.registry import _REGISTRY, adapter_class

SECTION = "## A policy of your own"


def code_blocks():
    """The Python blocks of the README's section, in order: the adapter, and its use."""
    readme = Path(trimtab.adapters.__file__).with_name("README.md").read_text()
    section = readme.split(SECTION)[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def registry():
    before = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)


@pytest.fixture(scope="module")
def trained():
    """Cloned from demonstrations of which half go left and half go right."""
    torch.manual_seed(0)
    policy = MyFlowPolicy(MyFlowConfig(**features(), device="cpu", push_to_hub=False))
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(300):
        side = torch.randint(0, 2, (256, 1, 1)) * 2.0 - 1.0
        action = side + 0.1 * torch.randn(256, policy.config.horizon, 2)
        loss, _ = policy.forward({"observation.state": torch.randn(256, 3), "action": action})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch, registry):
    """A working directory in which the README's path leads to the saved policy."""
    stats = {
        "observation.state": {"mean": torch.full((3,), 0.1), "std": torch.full((3,), 2.0)},
        "action": {"mean": torch.zeros(2), "std": torch.full((2,), 3.0)},
    }
    folder = tmp_path / "outputs" / "my_flow"
    trained.save_pretrained(folder)
    for pipeline in make_pre_post_processors(trained.config, dataset_stats=stats):
        pipeline.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*blocks, **names):
    for block in blocks:
        exec(compile(block, "adapters/README.md", "exec"), names)
    return names


def test_an_adapter_takes_less_than_thirty_lines():
    adapter, use = code_blocks()
    assert len(adapter.splitlines()) < 30
    assert "register_adapter(" in adapter and "load_adapter(" in use


def test_loads_and_computes_what_the_policy_does(workplace, trained):
    observation = {"observation.state": torch.randn(2, 1, 3), "task": ["go", "go"]}
    names = run(*code_blocks(), observation=observation)
    adapter, actions = names["adapter"], names["actions"]
    assert "my_flow" in adapter_types()
    assert type(adapter.policy) is MyFlowPolicy and adapter.policy is not trained
    assert not any(parameter.requires_grad for parameter in adapter.policy.parameters())
    noise = names["noise"]
    batch = adapter.preprocess(observation)
    repeated = {"observation.state": batch["observation.state"].repeat_interleave(16, 0)}
    with NoiseInjector(noise):
        expected = adapter.policy.predict_action_chunk(repeated)[:, : adapter.config.n_action_steps]
    assert actions.shape == (32, 4, 2)
    assert torch.allclose(actions, adapter.postprocessor(expected), atol=1e-5)
    assert adapter.features(names["conditioning"]).shape == (2, 64)


def test_steers(workplace):
    """One noise that went right for one observation goes right for others, where the policy's own do half."""
    observation = {"observation.state": torch.randn(200, 1, 3), "task": ["go"] * 200}
    adapter = run(*code_blocks(), observation=observation)["adapter"]
    conditioning = adapter.observe(observation)
    generator = torch.Generator().manual_seed(1)

    def goes_right(noise):
        chunk = adapter.denoise(conditioning, noise.to(adapter.device))
        return (adapter.postprocess(chunk).mean((1, 2)) > 0).float().mean()

    own = torch.randn((200, *adapter.noise_spec.shape), generator=generator)
    assert 0.3 < goes_right(own) < 0.7
    candidates = torch.randn((16, *adapter.noise_spec.shape), generator=generator).to(adapter.device)
    chunks = adapter.denoise(conditioning[0].repeat_interleave(16), candidates)
    best = candidates[chunks.mean((1, 2)).argmax()]
    assert goes_right(best.expand_as(own)) > 0.95


def test_without_the_adapter_the_error_says_where_to_look(workplace):
    with pytest.raises(UserError, match=r"no adapter for policies of type 'my_flow'.*adapters/README.md"):
        run(code_blocks()[1], observation={})


def test_a_mistake_is_found_at_load(workplace):
    """An adapter that forgets to pass the noise on cannot be loaded."""
    adapter, use = code_blocks()
    broken = adapter.replace('rows("context"), noise)', 'rows("context"), 0 * noise)')
    assert broken != adapter
    with pytest.raises(UserError, match="ignores its noise"):
        run(broken, use, observation={})


class InjectedFlow(InjectedAdapter):
    """The README's way for a policy that cannot be split."""

    policy_type = "my_flow"

    def __init__(self, policy, preprocessor, postprocessor):
        super().__init__(policy, preprocessor, postprocessor)
        self.noise_spec = NoiseSpec((policy.config.horizon, 2))
        self.chunk_shape = (policy.config.n_action_steps, 2)

    def features(self, conditioning):
        return conditioning.rows("observation.state")


def test_injected_adapter_computes_the_same(workplace):
    observation = {"observation.state": torch.randn(2, 1, 3), "task": ["go", "go"]}
    split = run(*code_blocks(), observation=observation)
    register_adapter("my_flow", lambda: InjectedFlow)
    adapter = run(code_blocks()[1], observation=observation)["adapter"]
    assert type(adapter) is InjectedFlow
    noise = split["noise"].to(adapter.device)
    conditioning = adapter.observe(observation).repeat_interleave(16)
    assert torch.allclose(adapter.denoise(conditioning, noise), split["chunk"], atol=1e-5)
    assert adapter.features(conditioning).shape == (32, 3)


def test_commands_find_it_in_a_package(workplace, monkeypatch):
    """`trimtab ... --policy.discover_packages_path=my_package` registers the adapter too."""
    from trimtab.recipes.support.option_dicts import load_plugins

    (workplace / "my_package").mkdir()
    (workplace / "my_package" / "__init__.py").write_text(code_blocks()[0])
    monkeypatch.syspath_prepend(workplace)
    given = {"policy": {"discover_packages_path": "my_package"}, "seed": 1}
    assert load_plugins(given) == [{"policy": {}, "seed": 1}]
    sys.modules.pop("my_package")
    assert adapter_class("my_flow").__name__ == "MyFlowAdapter"
