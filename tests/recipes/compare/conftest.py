"""What the tests of comparisons share."""

import pytest


@pytest.fixture(scope="package")
def two_task_base(tmp_path_factory):
    """A base of two tasks, of which one is demonstrated with success."""
    from trimtab.recipes.embedded_base.base import BaseConfig, make_base
    from trimtab.recipes.embedded_base.cloning import CloningConfig

    config = BaseConfig(
        tasks="drawer-close-v3,button-press-topdown-v3",
        demonstrators={},
        episodes=2,
        episode_length=90,
        cloning=CloningConfig(steps=30, batch_size=16),
    ).resolved()
    folder = tmp_path_factory.mktemp("bases") / "two"
    make_base(config, folder)
    return folder
