"""VLA-JEPA: bare; with its world model, two cameras that the policy resizes, and Qwen3-VL in bfloat16."""

from tests.helpers.adapter_cases import Case

CASES = [
    Case("vla_jepa"),
    Case(
        "vla_jepa",
        fields={
            "enable_world_model": True,
            "cameras": 2,
            "resize_images_to": (32, 64),
            "torch_dtype": "bfloat16",
        },
    ),
]
