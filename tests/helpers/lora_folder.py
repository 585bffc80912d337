"""A LoRA checkpoint, saved as ``lerobot-train --peft.method_type=LORA`` does."""

import torch

from tests.helpers.tiny import make_tiny


def make_lora(root):
    """A tiny SmolVLA, and a LoRA checkpoint of it with weights that matter."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    options = make_tiny("smolvla", root / "base")
    policy = SmolVLAPolicy.from_pretrained(options.path)
    policy.config.pretrained_path = options.path
    wrapped = policy.wrap_with_peft(peft_cli_overrides={"method_type": "LORA", "r": 4})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:  # zero at first: the adapter would change nothing
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    lora = root / "lora"
    wrapped.save_pretrained(lora)
    policy.config.save_pretrained(lora)
    for saved in make_pre_post_processors(policy.config, pretrained_path=options.path):
        saved.save_pretrained(lora)
    assert not (lora / "model.safetensors").exists()
    return options, lora
