"""Tiny random instances of the real LeRobot classes, saved with their processors as `lerobot-train` would.

They load on any machine without the Hub, in milliseconds to seconds: for ``--tiny=true``. The tests add those
of the other policy types (``tests/helpers/tiny``).

A builder saves the policy, and what its config names, in ``folder`` and returns the options that load it.
``fields`` are fields of the policy's config that shall differ from those in ``sizes.json``.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trimtab.adapters import PolicyConfig
from trimtab.adapters.tiny.parts import (
    SIZES,
    camera_features,
    make_backbone,
    make_config,
    make_florence,
    save_policy,
)
from trimtab.adapters.tiny.pi0 import pi

Options = dict[str, Any]


def diffusion(folder: Path, **fields: Any) -> Options:
    """State-based; where ``fields`` name a camera, ResNet18 sees for it."""
    features = camera_features(0, state_dim=2, env_dim=16, action_dim=2)
    save_policy(folder, make_config("diffusion", fields, **features))
    return {}


def groot(folder: Path, cameras: int = 1, **fields: Any) -> Options:
    """0.4 M weights: a narrow GR00T N1.7 model in ``folder/gr00t``, its Qwen3-VL beside."""
    from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config
    from lerobot.policies.groot.modeling_groot import GrootPolicy

    qwen, base = folder / "Qwen" / "Qwen3-VL-tiny", folder / "gr00t"
    make_backbone(qwen, SIZES["qwen3"], num_hidden_layers=3)  # the third is dropped, as in the real model
    torch.manual_seed(0)
    # A path with "Qwen/Qwen3-VL" in it.
    model = GR00TN17(GR00TN17Config(model_name=str(qwen), **SIZES["groot"]), load_backbone_weights=False)
    with torch.no_grad():  # drawn with 0.02: at this width the chunk would be the noise itself
        for name, parameter in model.action_head.named_parameters():
            if name.endswith(("W", "attn1.to_v.weight", "attn1.to_out.0.weight")):
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(base)

    def shrink(preprocessor: Any) -> None:
        for step in preprocessor.steps:
            if hasattr(step, "image_target_size"):
                step.image_target_size, step.image_crop_size = [64, 64], [56, 56]  # 256 pixels by default
                step.model_name = str(qwen)  # LeRobot names NVIDIA's Cosmos-Reason2-2B, whatever the model

    config = make_config("groot", fields, **camera_features(cameras), base_model_path=str(base))
    save_policy(folder, config, GrootPolicy, change=shrink)
    return {"backbone": str(base), "tokenizer": str(qwen)}


def multi_task_dit(folder: Path, cameras: int = 1, **fields: Any) -> Options:
    """70,000 weights: the real CLIP classes, and a two-layer transformer."""
    from transformers import CLIPModel

    clip = str(folder / "clip")  # LeRobot insists on "clip" in the path
    clip_config = make_backbone(Path(clip), SIZES["clip"])
    torch.manual_seed(0)
    CLIPModel(clip_config).save_pretrained(clip)
    names = {"vision_encoder_name": clip, "text_encoder_name": clip}
    config = make_config("multi_task_dit", fields, **camera_features(cameras), **names)
    save_policy(folder, config, no_zeros=True)  # adaLN starts at zero: no observation would matter
    return {"backbone": clip}


def smolvla(folder: Path, **fields: Any) -> Options:
    """0.75 M weights: the real SmolVLM classes and processor."""
    make_backbone(folder / "vlm", SIZES["smolvlm"])
    names = {"vlm_model_name": str(folder / "vlm")}
    save_policy(folder, make_config("smolvla", fields, **camera_features(), **names))
    return {"backbone": names["vlm_model_name"]}


def xvla(folder: Path, cameras: int = 2, **fields: Any) -> Options:
    """0.3 M weights: the real Florence-2 classes and soft-prompted transformer."""
    tokenizer = folder / "tokenizer"
    # X-VLA's image steps look for keys below this prefix and leave any other image as it is.
    features = camera_features(cameras, single="observation.images.camera1")
    names = {"tokenizer_name": str(tokenizer), "florence_config": make_florence(tokenizer)}
    save_policy(folder, make_config("xvla", fields, **features, **names))
    return {"tokenizer": str(tokenizer)}


BUILDERS: dict[str, Callable[..., Options]] = {
    **{build.__name__: build for build in (diffusion, groot, multi_task_dit, smolvla, xvla)},
    **{name: partial(pi, name) for name in ("pi0", "pi05")},
}


def make_tiny(policy_type: str, folder: Path, **fields: Any) -> PolicyConfig:
    """Save a tiny random policy of ``policy_type``, a key of ``BUILDERS``, and return how to load it."""
    folder.mkdir(parents=True, exist_ok=True)
    return PolicyConfig(path=str(folder), device="cpu", **BUILDERS[policy_type](folder, **fields))
