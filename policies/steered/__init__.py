"""The steered policy as a LeRobot policy of type ``trimtab``: configuration, modeling and processors.

The modules' names follow LeRobot's plugin convention; ``lerobot_policy_trimtab`` imports them.
"""
