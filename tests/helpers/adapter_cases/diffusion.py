"""LeRobot's diffusion policy, with states and with a camera."""

from tests.helpers.adapter_cases import Case, with_argument

CASES = [Case("diffusion", with_argument), Case("diffusion", with_argument, {"images": True})]
