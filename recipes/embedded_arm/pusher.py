"""A controller that pushes the cube: who demonstrates, and who takes over."""

import numpy as np

from trimtab.recipes.embedded_arm.arm import HAND, LINK, PARKED, SHOULDER

# Metres, of the fingertips: where they turn, from how high, down to where; how high they push, how far.
BACK, HIGH, HOVER, LOW, OUT = 0.10, 0.09, 0.05, 0.02, 0.255
BEHIND = 0.05  # metres from the cube's middle to fingertips that cannot touch it
TURN = 8  # steps that it takes to turn to the cube, wherever that is
MOVED = np.array([20.0, 0.06, 0.06])  # degrees, metres: someone else has moved the arm


def joints_at(bearing: float, radius: float, height: float) -> dict[str, float]:
    """The joints in degrees that bring the fingertips there, the hand pointing down and the gripper closed.

    ``bearing`` is in degrees, to the left of straight ahead; ``radius`` and ``height`` are in metres, from
    the base's axis and from the table.
    """
    down = height + HAND - SHOULDER  # the wrist, seen from the shoulder
    lean, fold = np.arctan2(radius, down), np.arccos(min(np.hypot(radius, down) / (2 * LINK), 1.0))
    lift, elbow, wrist = np.rad2deg([lean - fold, 2 * fold, np.pi - lean - fold]).tolist()
    return dict(zip(PARKED, (float(bearing), lift, elbow, wrist, 0.0)))


def polar(place: np.ndarray) -> np.ndarray:
    """(bearing in degrees, radius, height) of a place (3,) in metres."""
    return np.array([np.rad2deg(np.arctan2(place[1], place[0])), np.hypot(*place[:2]), place[2]])


class Pusher:
    """Turns the gripper to the cube, comes down behind it and pushes it away.

    Args:
        sight: degrees by which it sees the cube too far to the left.
        recovers: goes back behind the cube where it has missed it.
    """

    def __init__(self, sight: float = 0.0, recovers: bool = True) -> None:
        self.sight, self.recovers = sight, recovers
        self._at: np.ndarray | None = None  # where it wants the fingertips
        self._turn = 0.0  # degrees per step

    def act(self, tip: np.ndarray, cube: np.ndarray) -> dict[str, float]:
        """The next action, with the fingertips and the cube's middle at (3,) in metres."""
        here, thing = polar(tip), polar(cube)
        bearing = thing[0] + self.sight
        if self._at is None or (np.abs(self._at - here) > MOVED).any():
            self._at, self._turn = here, abs(bearing - here[0]) / TURN
        at = self._at
        pushes = at[2] < HOVER - 0.001
        steps = np.array([max(self._turn, 1.0 if pushes else 0.1), 0.006, 0.010])
        aligned = abs(bearing - at[0]) < (3.0 if pushes else 1.01 * steps[0])
        beyond = here[1] > thing[1] - (0.0 if aligned else BEHIND)
        if beyond and self.recovers and at[2] < HIGH - 0.01:
            goal = np.array([at[0], at[1], HIGH])
        elif beyond and self.recovers:
            goal = np.array([at[0], BACK, HIGH])
        elif not aligned:
            goal = np.array([bearing, BACK, max(at[2] - 0.005, HOVER)])
        else:
            goal = np.array([bearing, OUT if at[2] < 0.03 else at[1], LOW])
        self._at = at + np.clip(goal - at, -steps, steps)
        return joints_at(*self._at)
