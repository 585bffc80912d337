"""Wall-X in float32, to compare exactly; the tokenizer pads on the left or on the right; two cameras."""

import torch
from torch.overrides import TorchFunctionMode

from tests.helpers.adapter_cases import Case, with_injection


class Float32(TorchFunctionMode):
    """Turns back what is cast to bfloat16.

    LeRobot casts the state's embedding so, whatever the model's precision, and fails in any other.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.to and out.dtype == torch.bfloat16:
            return out.float()
        return out


def in_float32(adapter, batch, noise):
    with Float32():
        return with_injection(adapter, batch, noise)


CASES = [
    Case("wall_x", in_float32),
    Case("wall_x", in_float32, {"cameras": 2, "padding_side": "right"}),
]
