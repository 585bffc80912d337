"""Shared fixtures: small real policies, made once per session."""

from __future__ import annotations

import gc
import os
from functools import cache

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as commands do
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import pytest
from filelock import FileLock


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    """What all tests need, imported once, when the lines that importing covers are counted. xdist's first
    process runs no tests.
    """
    if session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput"):
        return
    from trimtab.recipes.support.console import quiet
    from trimtab.rl.runs.imports import quick_imports

    with quick_imports():
        import torch
        from datasets import Features
        from draccus.wrappers import docstring

        import trimtab.recipes.cli.adapt  # noqa: F401
        from trimtab.recipes.support import shared_configs
    quiet()
    gc.set_threshold(7_000, 10, 10)  # Python's 700 are for processes that hold less
    # draccus reads a field's comment in its source whenever it reads a config: here, thousands of times.
    docstring.get_attribute_docstring = cache(docstring.get_attribute_docstring)
    # datasets looks at all columns again whenever it names one: 170,000 times where LeRobot opens a dataset.
    Features.__setitem__ = set_column
    # The first backward pass starts a thread for each kind of device that is known by then. Fake tensors
    # make a GPU known that is not there, and a process with such threads can't be forked, as the fault
    # campaign is.
    torch.ones(1, requires_grad=True).sum().backward()
    # What commands take where no number is named. Several test processes share the cores, and two threads
    # of one that wait for each other on a busy core cost minutes.
    shared_configs.default_threads = lambda workers: 1


def set_column(features, name, feature):
    """``datasets.Features.__setitem__``."""
    from datasets.features.features import require_decoding

    dict.__setitem__(features, name, feature)
    features._column_requires_decoding[name] = require_decoding(feature)


def pytest_collection_modifyitems(items):
    """One of the longest files would come near the end, when the other test process has nothing to do."""
    items.sort(key=lambda item: item.path.name != "test_pixels.py")


@pytest.fixture(autouse=True)
def one_thread():
    """Commands set torch's threads for their process."""
    import torch

    torch.set_num_threads(1)


def made_once(tmp_path_factory, name, make):
    """The folder that ``make`` writes: one test process makes it for all."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            make(folder)
    return folder


TASKS = "button-press-topdown-v3,drawer-close-v3"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """An embedded base of two tasks, cloned for a few steps: real parts, no skill."""
    from trimtab.recipes.embedded_base.base import BaseConfig, make_base
    from trimtab.recipes.embedded_base.cloning import CloningConfig
    from trimtab.recipes.embedded_base.demonstrations import Operator

    config = BaseConfig(
        tasks=TASKS,
        demonstrators={"button-press-topdown-v3": Operator("blind_spot", 0.5, 0.14)},
        episodes=3,
        episode_length=90,
        cloning=CloningConfig(steps=30, batch_size=16, down_dims=(16,), num_inference_steps=2),
    ).resolved()
    return made_once(tmp_path_factory, "tiny_base", lambda folder: make_base(config, folder))


@pytest.fixture(scope="session")
def drawer_base(tmp_path_factory):
    """A base that closes the drawer at times."""
    from trimtab.recipes.embedded_base.base import BaseConfig, make_base
    from trimtab.recipes.embedded_base.cloning import CloningConfig

    config = BaseConfig(
        tasks="drawer-close-v3",
        demonstrators={},
        episodes=3,
        episode_length=100,
        cloning=CloningConfig(steps=300, batch_size=32, num_inference_steps=2),
    ).resolved()
    return made_once(tmp_path_factory, "drawer_base", lambda folder: make_base(config, folder))


def make_diffusion(folder, images=False, scheduler="DDIM", state_dim=2, env_dim=16, action_dim=2, **fields):
    """Save a random LeRobot DiffusionPolicy; the dimensions can be those of a real environment."""
    from lerobot.configs import FeatureType, PolicyFeature

    from tests.helpers.tiny import make_tiny

    if (state_dim, env_dim, action_dim) != (2, 16, 2):
        fields["input_features"] = {
            "observation.state": PolicyFeature(FeatureType.STATE, (state_dim,)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (env_dim,)),
        }
        fields["output_features"] = {"action": PolicyFeature(FeatureType.ACTION, (action_dim,))}
    make_tiny("diffusion", folder, images=images, scheduler=scheduler, **fields)
    return folder


@pytest.fixture(scope="session")
def served_policy(tmp_path_factory):
    """A random state-based policy for LeRobot's pusht that looks at one observation, as openpi's do."""
    return make_diffusion(tmp_path_factory.mktemp("served"), n_obs_steps=1, n_action_steps=8)


@pytest.fixture(scope="session")
def policy_server(served_policy):
    """Address of a thread that serves ``served_policy`` with openpi's protocol."""
    from tests.helpers.openpi_server import serving

    return serving(served_policy)


@pytest.fixture(scope="session")
def pusht_policy(tmp_path_factory):
    """A random state-based policy for LeRobot's pusht, with a history of two observations."""
    return make_diffusion(tmp_path_factory.mktemp("pusht"))
