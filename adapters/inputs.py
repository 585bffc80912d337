"""A policy's inputs and an environment's observations compared as sets, by LeRobot's rule.

LeRobot (``validate_visual_features_consistency``) lets a policy run where the cameras that it was trained on
all exist, or where all that exist are among those. Which of the latter a policy can do without is its own
affair: some fill what is missing with blank images, others fail. Names count after renaming.
"""

import json
from collections.abc import Collection, Iterator
from difflib import SequenceMatcher
from typing import Any

from lerobot.utils.constants import OBS_IMAGE, OBS_STR
from torch import Tensor

from trimtab.adapters.base import NoiseToChunk, steps_with
from trimtab.adapters.errors import UserError

FILLED = "empty_camera"  # in the name of an input that LeRobot fills itself


def required_inputs(adapter: NoiseToChunk, given: Collection[str]) -> dict[str, Any]:
    """The policy's input features that an observation with the renamed keys ``given`` must hold.

    A policy does without those that a step of its own preprocessor ``makes`` of the others.
    A policy that fills missing cameras does without them where those there are are all its own. Where one has
    another name, a camera that it was trained on would turn blank beside one that it never looks at.
    """
    features = adapter.config.input_features
    known = set(adapter.cameras())
    there = {key for key in given if key in known or key.startswith(OBS_IMAGE)}
    spare = known - there if adapter.fills_missing_cameras and there and there <= known else set()
    spare |= {key for step in steps_with("makes", adapter.preprocessor) for key in step.makes} - set(given)
    return {k: feature for k, feature in features.items() if FILLED not in k and k not in spare}


def check_inputs(adapter: NoiseToChunk, observation: dict[str, Any]) -> None:
    """Refuse a raw observation that is not what the policy was trained on."""
    renames = adapter.renames()
    names = {renames.get(key, key): key for key in observation}
    if len(names) < len(observation):
        twice = sorted({renames[key] for key in observation if renames.get(key) in observation})
        raise UserError(
            "--policy.rename_map",
            f"gives {', '.join(twice) or 'one name'} to two observations; rename each to a name of its own",
        )
    for fault in _faults(adapter, observation, names):
        raise UserError("--env.type", fault)


def _faults(adapter: NoiseToChunk, observation: dict[str, Any], names: dict[str, str]) -> Iterator[str]:
    """What is wrong with an observation whose keys are the values of ``names``, by their renamed ones."""
    required = required_inputs(adapter, names)
    missing = [key for key in required if key not in names]
    if missing:
        yield _lacking(adapter, observation, names, missing)
    used = adapter.cameras_used(names) - set(adapter.cameras())
    if used:
        yield (
            f"this {adapter.policy_type} policy looks at every camera there is, also at "
            f"{', '.join(sorted(used))}, which it was not trained on; choose the environment that it was "
            "trained on"
        )
    for key, feature in required.items():
        yield from _value_faults(adapter, key, tuple(feature.shape), observation[names[key]])
    sizes = {key: observation[names[key]].shape[-2:] for key in adapter.cameras() if key in names}
    if adapter.stacks_cameras and len(set(sizes.values())) > 1:
        given = ", ".join(f"{key} {height} x {width}" for key, (height, width) in sizes.items())
        yield f"this {adapter.policy_type} policy takes cameras of one size, the environment gives {given}"


def _value_faults(adapter: NoiseToChunk, key: str, wanted: tuple[int, ...], value: Tensor) -> Iterator[str]:
    shape = tuple(value.shape[2:])
    image = len(wanted) == 3
    if image and len(shape) == 3 and shape[0] != wanted[0] == shape[2]:
        yield f"gives {key} as (height, width, channels) {shape}; policies take channels first"
    same = shape[0] == wanted[0] if image and len(shape) == 3 and adapter.resizes_images else shape == wanted
    if not same:
        mend = "; choose the environment that it was trained on"
        if image and len(shape) == 3 and shape[0] == wanted[0]:
            mend = " and does not resize its images" + mend
        yield f"the policy needs {key} of shape {wanted}, the environment gives {shape}{mend}"
    if value.is_meta:  # shapes alone, where operations are counted
        return
    if image and (not value.is_floating_point() or value.amax() > adapter.brightest):
        most = value.max().item()
        yield f"gives {key} as {value.dtype} up to {most:g}; policies take images as floats from 0 to 1"


def _lacking(
    adapter: NoiseToChunk, observation: dict[str, Any], names: dict[str, str], missing: list[str]
) -> str:
    """What to say where inputs are missing, with the renaming that may be meant."""
    features = adapter.config.input_features
    spare = [name for name in names if name.startswith(OBS_STR) and name not in features]

    def fits(key: str, name: str) -> bool:  # an image, or of the same shape
        value, wanted = observation[names[name]], tuple(features[key].shape)
        shape = tuple(value.shape[2:]) if isinstance(value, Tensor) else ()
        return bool(shape) and (len(shape) == len(wanted) == 3 or shape == wanted)

    fitting = {key: [name for name in spare if fits(key, name)] for key in missing}
    # Of numbers of one length nobody can tell which is which; cameras go by their names.
    sure = {key for key, found in fitting.items() if len(found) == 1 or len(features[key].shape) == 3}
    likely = [(key, name) for key in sure for name in fitting[key]]
    likely.sort(key=lambda pair: -SequenceMatcher(None, *pair).ratio())  # left to cam_left, before the rest
    pairs: dict[str, str] = {}
    for key, name in likely:
        if names[name] not in pairs and key not in pairs.values():
            pairs[names[name]] = key
    if pairs:  # it takes the place of the checkpoint's own, as in lerobot-eval
        known = {old: new for old, new in adapter.renames().items() if old in observation and new in features}
        pairs = known | pairs
    wanted = ", ".join(key for key in features if FILLED not in key)
    given = ", ".join(sorted(key for key in observation if key.startswith(OBS_STR))) or "none"
    mend = f" --policy.rename_map='{json.dumps(pairs)}'" if pairs else " --policy.rename_map"
    return (
        f"the policy needs {', '.join(missing)}: it was trained on {wanted}, the environment gives {given}; "
        "choose the environment (or its --env.obs_type) that it was trained on, or rename with"
        f"{mend}{' if that is what they are' if pairs else ''}"
    )


def input_notes(adapter: NoiseToChunk, observation: dict[str, Any]) -> list[str]:
    """What the user should know of a raw observation that ``check_inputs`` let pass, a line each."""
    renames, notes = adapter.renames(), []
    names = {renames.get(key, key) for key in observation}
    known = adapter.config.input_features
    blank = [key for key in adapter.cameras() if key not in names]
    unseen = sorted(key for key in names if key.startswith(OBS_STR) and key not in known)
    if blank:
        notes.append(
            f"the policy was trained on {', '.join(adapter.cameras())}; the environment gives no "
            f"{', '.join(blank)}, left blank as LeRobot does (--policy.rename_map gives observations other "
            "names)"
        )
    if unseen:
        notes.append(
            f"the environment also gives {', '.join(unseen)}, which the policy was not trained on and does "
            "not see"
        )
    absent = sorted(key for key in renames if key not in observation)
    if absent:
        notes.append(f"the renaming names {', '.join(absent)}, which the environment does not give")
    if adapter.reads_task and not any(observation.get("task") or ()):
        notes.append(
            f"a {adapter.policy_type} policy reads an instruction, and the environment gives none "
            "(task_description): the policy is told nothing"
        )
    return notes
