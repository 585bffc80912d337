"""Tiny random instances of every policy type: those of ``--tiny`` (``adapters/tiny``), and the others.

A builder's own arguments make the variants that the tests need.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.helpers.tiny import backbones
from tests.helpers.tiny.backbones import SIZES
from tests.helpers.tiny.sidecars import TAG, write_sidecars
from trimtab.adapters.tiny import BUILDERS
from trimtab.adapters.tiny.parts import SIZES as SHIPPED
from trimtab.adapters.tiny.parts import (
    camera_features,
    make_backbone,
    make_config,
    save_policy,
    word_tokenizer,
)

Options = dict[str, Any]
WITHOUT_VARIANTS = dict(BUILDERS)


def narrow(policy_type: str, fields: dict[str, Any], **defaults: Any) -> Any:
    """LeRobot's config of a policy type: its narrow sizes and ``defaults``, but for ``fields``."""
    return make_config(policy_type, fields, **{**SIZES["policies"][policy_type], **defaults})


def act(folder: Path, cameras: int = 1, env_dim: int = 0, **fields: Any) -> Options:
    """A narrow transformer; with cameras, ResNet18 (11 M weights) sees for it.

    ``cameras`` may be 0 with an environment state (``env_dim``).
    """
    features = camera_features(cameras, env_dim=env_dim)
    save_policy(folder, narrow("act", fields, **features))
    return {}


def eo1(folder: Path, **fields: Any) -> Options:
    """0.1 M weights: the real Qwen2.5-VL and its whole processor."""
    qwen = str(folder / "qwen")
    config = narrow(
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
    save_policy(folder, narrow("evo1", fields, **camera_features(cameras, size=32), vlm_model_name=vlm))
    return {"backbone": vlm}


def fastwam(folder: Path, **fields: Any) -> Options:
    """Two cameras: the real Wan experts, VAE and text encoder."""
    wan = str(backbones.save_wan(folder / "wan"))
    names = {"text_encoder_model_id": wan, "tokenizer_model_id": f"{wan}/tokenizer"}
    config = narrow("fastwam", fields, **camera_features(cameras=2, size=32), **names)
    save_policy(folder, config, no_zeros=True)
    return {"backbone": wan}


def lingbot_va(folder: Path, **fields: Any) -> Options:
    """Two cameras, or three: the real dual-stream transformer, VAE and text encoder."""
    from lerobot.policies.lingbot_va.modeling_lingbot_va import LingBotVAPolicy

    wan = str(backbones.save_wan(folder / "wan"))
    features = camera_features(3 if fields.get("camera_layout") == "robotwin_tshape" else 2, size=32)
    names = [key for key in features["input_features"] if "images" in key]
    config = narrow("lingbot_va", fields, **features, wan_pretrained_path=wan, obs_cam_keys=names)
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
    config = narrow("molmoact2", fields, **camera_features(cameras), **names)
    save_policy(folder, config, no_zeros=True)
    return {"backbone": str(backbone)}


def vla_jepa(folder: Path, cameras: int = 1, **fields: Any) -> Options:
    """0.1 M weights: the real Qwen3-VL, V-JEPA 2 and LeRobot's ``DiT-test`` preset."""
    from transformers import Qwen3VLForConditionalGeneration, VJEPA2Config, VJEPA2Model, VJEPA2VideoProcessor

    torch.manual_seed(0)
    qwen, vjepa = str(folder / "qwen"), str(folder / "vjepa")
    Qwen3VLForConditionalGeneration(make_backbone(Path(qwen), SHIPPED["qwen3"])).save_pretrained(qwen)
    names = {"qwen_model_name": qwen, "jepa_encoder_name": vjepa}
    config = narrow("vla_jepa", fields, **camera_features(cameras), **names)
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
    config = narrow("wall_x", fields, **camera_features(cameras), pretrained_name_or_path=backbone)
    backbones.make_wall_x(Path(backbone), padding_side, config.max_action_dim, config.max_state_dim)
    save_policy(folder, config, no_zeros=True)
    return {"backbone": backbone, "dtype": dtype}


def groot(
    folder: Path, sidecars: bool = False, relative: bool = False, cameras: int = 1, **fields: Any
) -> Options:
    """With ``sidecars``, statistics and horizons of the GR00T model's own, as NVIDIA's checkpoints have.

    ``relative``: with sidecars, actions relative to the state, for all but the last dimension.
    """
    if sidecars:
        write_sidecars(folder / "gr00t", relative)
        fields = {"embodiment_tag": TAG, **fields}
    return WITHOUT_VARIANTS["groot"](folder, cameras=cameras, **fields)


def diffusion(folder: Path, images: bool = False, scheduler: str = "DDIM", **fields: Any) -> Options:
    """With one of ``images`` in place of the environment's state; with DDPM in place of DDIM."""
    if images:
        fields = {**camera_features(1, state_dim=2, action_dim=2), **fields}
    if scheduler == "DDPM":
        fields = {"noise_scheduler_type": "DDPM", "num_inference_steps": None, **fields}
    return WITHOUT_VARIANTS["diffusion"](folder, **fields)


def smolvla(folder: Path, **fields: Any) -> Options:
    """With ``load_vlm_weights``, random ones of its SmolVLM for LeRobot to load."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    options = WITHOUT_VARIANTS["smolvla"](folder, **fields)
    if fields.get("load_vlm_weights"):
        torch.manual_seed(0)
        vlm = SmolVLMForConditionalGeneration(SmolVLMConfig.from_pretrained(options["backbone"]))
        vlm.save_pretrained(options["backbone"])
    return options


def xvla(folder: Path, cameras: int = 2, **fields: Any) -> Options:
    """With ``action_mode="ee6d"``, states and actions of 20 entries."""
    if fields.get("action_mode") == "ee6d":
        features = camera_features(cameras, single="observation.images.camera1", state_dim=20, action_dim=20)
        fields = {"max_state_dim": 20, **features, **fields}
    return WITHOUT_VARIANTS["xvla"](folder, cameras=cameras, **fields)


OTHERS: tuple[Callable[..., Options], ...] = (
    *(act, eo1, evo1, fastwam, lingbot_va, molmoact2, vla_jepa, wall_x),
    *(diffusion, groot, smolvla, xvla),
)
BUILDERS |= {build.__name__: build for build in OTHERS}
