"""How each type's tiny instance is built: what its config names lies in ``folder`` too.

A function saves the policy and returns the options with which its folder is loaded. ``fields`` are fields of
the policy's config that shall differ from those in ``sizes.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature

from trimtab.adapters.tiny import backbones
from trimtab.adapters.tiny.groot import groot
from trimtab.adapters.tiny.parts import (
    SIZES,
    camera_features,
    make_config,
    save_policy,
    word_tokenizer,
)
from trimtab.adapters.tiny.pi0 import pi

Options = dict[str, Any]


def _with_environment(features: dict[str, Any], size: int) -> dict[str, Any]:
    if size:
        state = PolicyFeature(FeatureType.ENV, (size,))
        features["input_features"]["observation.environment_state"] = state
    return features


def act(folder: Path, cameras: int = 1, env_dim: int = 0, **fields: Any) -> Options:
    """A narrow transformer; with cameras, ResNet18 (11 M weights) sees for it.

    ``cameras`` may be 0 with an environment state (``env_dim``).
    """
    features = _with_environment(camera_features(cameras), env_dim)
    save_policy(folder, make_config("act", fields, **features))
    return {}


def diffusion(folder: Path, images: bool = False, scheduler: str = "DDIM", **fields: Any) -> Options:
    """State-based, or with one of ``images`` in place of the environment's state; ResNet18 sees for it."""
    features = _with_environment(camera_features(int(images), state_dim=2, action_dim=2), 0 if images else 16)
    steps = None if scheduler == "DDPM" else 4
    sampling = {"noise_scheduler_type": scheduler, "num_inference_steps": steps}
    save_policy(folder, make_config("diffusion", fields, **features, **sampling))
    return {}


def eo1(folder: Path, **fields: Any) -> Options:
    """0.1 M weights: the real Qwen2.5-VL and its whole processor."""
    qwen = str(folder / "qwen")
    config = make_config(
        "eo1",
        fields,
        **camera_features(cameras=2),
        pretrained_path=str(folder),  # else LeRobot fetches the backbone's weights
        vlm_base=qwen,
        vlm_config=backbones.make_qwen2_5(Path(qwen)),
    )
    save_policy(folder, config)
    return {"backbone": qwen}


def evo1(folder: Path, cameras: int = 2, **fields: Any) -> Options:
    """0.2 M weights: the real InternVL classes and action head, with room for three cameras."""
    from transformers import InternVLModel

    torch.manual_seed(0)
    vlm = str(folder / "vlm")
    # LeRobot loads its weights, the adapter does not.
    InternVLModel(backbones.make_internvl(Path(vlm))).save_pretrained(vlm)
    save_policy(folder, make_config("evo1", fields, **camera_features(cameras, size=32), vlm_model_name=vlm))
    return {"backbone": vlm}


def fastwam(folder: Path, **fields: Any) -> Options:
    """Two cameras: the real Wan experts, VAE and text encoder."""
    wan = str(backbones.save_wan(folder / "wan"))
    names = {"text_encoder_model_id": wan, "tokenizer_model_id": f"{wan}/tokenizer"}
    config = make_config("fastwam", fields, **camera_features(cameras=2, size=32), **names)
    save_policy(folder, config, no_zeros=True)
    return {"backbone": wan}


def lingbot_va(folder: Path, **fields: Any) -> Options:
    """Two cameras, or three: the real dual-stream transformer, VAE and text encoder."""
    from lerobot.policies.lingbot_va.modeling_lingbot_va import LingBotVAPolicy

    wan = str(backbones.save_wan(folder / "wan"))
    features = camera_features(3 if fields.get("camera_layout") == "robotwin_tshape" else 2, size=32)
    names = [key for key in features["input_features"] if "images" in key]
    config = make_config("lingbot_va", fields, **features, wan_pretrained_path=wan, obs_cam_keys=names)
    save_policy(folder, config, LingBotVAPolicy, no_zeros=True)
    return {"backbone": wan}


def molmoact2(folder: Path, cameras: int = 1, model: dict[str, Any] | None = None, **fields: Any) -> Options:
    """0.15 M weights: LeRobot's own Molmo, image processor and action expert.

    ``model``: fields of the backbone's own config that shall differ.
    """
    backbone, fast = folder / "backbone", folder / "fast"
    backbones.make_molmo(backbone, **(model or {}))
    word_tokenizer(fast)
    names = {"checkpoint_path": str(backbone), "discrete_action_tokenizer": str(fast)}
    config = make_config("molmoact2", fields, **camera_features(cameras), **names)
    save_policy(folder, config, no_zeros=True)
    return {"backbone": str(backbone)}


def multi_task_dit(folder: Path, cameras: int = 1, **fields: Any) -> Options:
    """70,000 weights: the real CLIP classes, and a two-layer transformer."""
    from transformers import CLIPModel

    clip = str(folder / "clip")  # LeRobot insists on "clip" in the path
    clip_config = backbones.make_clip(Path(clip))
    torch.manual_seed(0)
    CLIPModel(clip_config).save_pretrained(clip)
    names = {"vision_encoder_name": clip, "text_encoder_name": clip}
    config = make_config("multi_task_dit", fields, **camera_features(cameras), **names)
    save_policy(folder, config, no_zeros=True)  # adaLN starts at zero: no observation would matter
    return {"backbone": clip}


def smolvla(folder: Path, **fields: Any) -> Options:
    """0.75 M weights: the real SmolVLM classes and processor."""
    vlm = str(folder / "vlm")
    backbones.make_smolvlm(Path(vlm), weights=fields.get("load_vlm_weights", False))
    save_policy(folder, make_config("smolvla", fields, **camera_features(), vlm_model_name=vlm))
    return {"backbone": vlm}


def vla_jepa(folder: Path, cameras: int = 1, **fields: Any) -> Options:
    """0.1 M weights: the real Qwen3-VL, V-JEPA 2 and LeRobot's ``DiT-test`` preset."""
    from transformers import Qwen3VLForConditionalGeneration, VJEPA2Config, VJEPA2Model, VJEPA2VideoProcessor

    torch.manual_seed(0)
    qwen, vjepa = str(folder / "qwen"), str(folder / "vjepa")
    Qwen3VLForConditionalGeneration(backbones.make_qwen3(Path(qwen))).save_pretrained(qwen)
    names = {"qwen_model_name": qwen, "jepa_encoder_name": vjepa}
    config = make_config("vla_jepa", fields, **camera_features(cameras), **names)
    if config.enable_world_model:
        VJEPA2Model(VJEPA2Config(**SIZES["vjepa"])).save_pretrained(vjepa)
        VJEPA2VideoProcessor().save_pretrained(vjepa)
    save_policy(folder, config)
    return {"backbone": qwen}


def wall_x(
    folder: Path,
    cameras: int = 1,
    padding_side: str = "left",
    dtype: str | None = "float32",
    **fields: Any,
) -> Options:
    """0.1 M weights: the real Qwen2.5-VL with experts, its processor and action head.

    ``dtype`` is the precision to load it with; ``None`` for LeRobot's own mix of bfloat16 and float32.
    """
    backbone = str(folder / "backbone")
    config = make_config("wall_x", fields, **camera_features(cameras), pretrained_name_or_path=backbone)
    backbones.make_wall_x(Path(backbone), padding_side, config.max_action_dim, config.max_state_dim)
    save_policy(folder, config, no_zeros=True)
    return {"backbone": backbone, "dtype": dtype}


def xvla(folder: Path, cameras: int = 2, **fields: Any) -> Options:
    """0.3 M weights: the real Florence-2 classes and soft-prompted transformer.

    ``action_mode="ee6d"`` has states and actions of 20 entries.
    """
    tokenizer = folder / "tokenizer"
    ee6d = fields.get("action_mode") == "ee6d"
    widths = {"state_dim": 20, "action_dim": 20} if ee6d else {}
    # X-VLA's image steps look for keys below this prefix and leave any other image as it is.
    features = camera_features(cameras, single="observation.images.camera1", **widths)
    names = {"tokenizer_name": str(tokenizer), "florence_config": backbones.make_florence(tokenizer)}
    config = make_config("xvla", fields, **features, **names, max_state_dim=20 if ee6d else 8)
    save_policy(folder, config)
    return {"tokenizer": str(tokenizer)}


BUILDERS: dict[str, Callable[..., Options]] = {
    build.__name__: build
    for build in (act, diffusion, eo1, evo1, fastwam, groot, lingbot_va, molmoact2, multi_task_dit)
}
BUILDERS |= {name: partial(pi, name) for name in ("pi0", "pi05")}
BUILDERS |= {build.__name__: build for build in (smolvla, vla_jepa, wall_x, xvla)}
