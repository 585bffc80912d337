"""The frozen Wan parts (VAE, text encoder) that FastWAM and LingBot-VA keep outside their checkpoints."""

import pytest

from tests.helpers.broken_weights import a_third, poisoned, spoilt
from tests.helpers.tiny import make_tiny
from trimtab.adapters import UserError, load_adapter


@pytest.fixture(scope="module", params=["fastwam", "lingbot_va"])
def options(request, tmp_path_factory):
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param) / "policy")


@pytest.fixture(scope="module")
def adapter(options):
    return load_adapter(options)


@pytest.mark.parametrize("change", [a_third, poisoned])
@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_broken_frozen_parts_are_refused(options, tmp_path, part, change):
    with pytest.raises(UserError, match=r"^--policy.backbone: ") as caught:
        load_adapter(spoilt(options, tmp_path / "wan", part, change))
    text = str(caught.value)
    assert "meta" not in text and "\n" not in text
    assert ("NaN" in text) == (change is poisoned), text
    assert ("missing" in text or "lacks" in text) == (change is a_third), text


def test_other_frozen_parts_are_another_base(options, adapter, tmp_path):
    identity = adapter.identity(options.path)
    assert any(name.startswith("vae/") for name in identity["files"])
    for part in ("vae", "text_encoder"):
        other = load_adapter(
            spoilt(options, tmp_path / part, part, lambda w: {k: v + 0.1 for k, v in w.items()})
        ).identity(options.path)
        odd = [name for name in identity["files"] if identity["files"][name] != other["files"][name]]
        assert len(odd) == 1 and odd[0].startswith(part + "/")
        assert identity["weights_sha256"] != other["weights_sha256"]
