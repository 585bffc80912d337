"""An arm without hardware: a MuJoCo arm as a LeRobot `Robot`, and the person beside it as a script.

LeRobot looks for a device's class in the package of its config's module, so both devices are named here.
"""

from trimtab.recipes.embedded_arm.arm import MujocoArm as MujocoArm
from trimtab.recipes.embedded_arm.arm import MujocoArmConfig as MujocoArmConfig
from trimtab.recipes.embedded_arm.person import ScriptedPerson as ScriptedPerson
from trimtab.recipes.embedded_arm.teleop import ScriptedPusher as ScriptedPusher
from trimtab.recipes.embedded_arm.teleop import ScriptedPusherConfig as ScriptedPusherConfig
