"""The embedded arm as a URDF, for LeRobot's kinematics."""

from __future__ import annotations

from pathlib import Path

from trimtab.recipes.embedded_arm.arm import HAND, LINK, SHOULDER

# Joint, the height of its axis above the one before, the axis.
CHAIN = [
    ("shoulder_pan", SHOULDER, "0 0 1"),
    ("shoulder_lift", 0.0, "0 1 0"),
    ("elbow_flex", LINK, "0 1 0"),
    ("wrist_flex", LINK, "0 1 0"),
    ("tip", HAND, ""),
]
LINKS = ["base", "turret", "upper", "fore", "hand", "gripper_frame_link"]


def write_urdf(path: Path, prefix: str = "") -> str:
    """Write it, ``prefix`` before the names of its joints; returns the path."""
    mass = '<mass value="0.1"/><inertia ixx="1e-4" ixy="0" ixz="0" iyy="1e-4" iyz="0" izz="1e-4"/>'
    parts = [f'<link name="{name}"><inertial>{mass}</inertial></link>' for name in LINKS]
    for (name, height, axis), parent, child in zip(CHAIN, LINKS[:-1], LINKS[1:], strict=True):
        turns = f'<axis xyz="{axis}"/><limit lower="-3" upper="3" effort="9" velocity="9"/>' if axis else ""
        parts.append(
            f'<joint name="{prefix}{name}" type="{"revolute" if axis else "fixed"}">'
            f'<parent link="{parent}"/><child link="{child}"/><origin xyz="0 0 {height}"/>{turns}</joint>'
        )
    path.write_text(f'<robot name="arm">{"".join(parts)}</robot>', encoding="utf-8")
    return str(path)
