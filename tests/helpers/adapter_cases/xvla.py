"""X-VLA: a padded action space whose entries are all live, one with inert grippers, and an empty camera."""

from tests.helpers.adapter_cases import Case

CASES = [
    Case("xvla"),
    Case("xvla", fields={"action_mode": "ee6d"}, inert=8 * 2),  # two grippers at each of 8 steps
    Case("xvla", fields={"cameras": 1, "empty_cameras": 1, "resize_imgs_with_padding": (64, 64)}),
]
