"""Which layers LoRA adapts, and putting it into a policy through LeRobot and PEFT."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from lerobot.configs.default import PeftConfig
from torch import nn

from trimtab.adapters import UserError
from trimtab.adapters.errors import reason

# Where the default targets lie, for policies of which not every part should adapt.
TRUNKS = {"diffusion": "diffusion.unet."}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
EXAMPLES = 4  # module names in a message


def default_targets(policy: nn.Module, policy_type: str, trainable: set[str]) -> list[str]:
    """The layers that LoRA adapts where LeRobot names none: linear and convolution layers.

    Only those whose weights the policy leaves open to training, in the part that ``TRUNKS`` names. Layers
    inside PyTorch's own attention are left out, for it reads their weights and never runs them.
    """
    modules = dict(policy.named_modules())
    attention = tuple(f"{name}." for name, m in modules.items() if isinstance(m, nn.MultiheadAttention))
    return [
        name
        for name, module in modules.items()
        if isinstance(module, LAYERS) and f"{name}.weight" in trainable
        if name.startswith(TRUNKS.get(policy_type, "")) and not name.startswith(attention)
    ]


def put_lora(policy: Any, policy_type: str, trainable: set[str], chosen: PeftConfig) -> Any:
    """Freeze ``policy`` and put LoRA layers into it, in place, with LeRobot's own ``wrap_with_peft``.

    Args:
        policy: a LeRobot policy whose config names its pretrained path.
        policy_type: LeRobot's name of its type.
        trainable: names of the parameters that the policy leaves open to training.
        chosen: the user's options; without targets, LeRobot's for the policy, or ``default_targets``. Without
            an alpha, it is the rank (a scaling of 1).

    Returns:
        The ``peft.PeftModel`` around the policy.

    Raises:
        UserError: no layer matches, or one that LoRA cannot adapt.
    """
    overrides = {**asdict(chosen), "lora_alpha": chosen.lora_alpha or chosen.r}
    if not chosen.target_modules and not (policy._get_default_peft_targets() or {}).get("target_modules"):
        overrides["target_modules"] = default_targets(policy, policy_type, trainable)
    layers = [name for name, module in policy.named_modules() if isinstance(module, LAYERS)]
    try:
        return policy.wrap_with_peft(peft_cli_overrides=overrides)
    except (ValueError, TypeError, re.error) as error:
        asked = chosen.target_modules or "the default"
        step = max(1, len(layers) // EXAMPLES)
        what = "matches no layer" if "not found" in str(error) else f"does not fit ({reason(error)})"
        raise UserError(
            "--peft.target_modules",
            f"{asked} {what} of this {policy_type} policy; its layers are for instance "
            f"{', '.join(layers[::step][:EXAMPLES])}",
        ) from error
