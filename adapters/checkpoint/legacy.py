"""Checkpoints of LeRobot before 0.4, which hold the statistics among the weights and no processors.

Their policies normalised in buffers of their own (``normalize_inputs.buffer_observation_state.mean``). From
those LeRobot's own factory makes the processors that it would save today. Nothing is written into the folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from trimtab.adapters.checkpoint.files import (
    OLD_STATISTICS,
    POSTPROCESSOR,
    PREPROCESSOR,
    read_weights,
    whole_weights,
)
from trimtab.adapters.errors import policy_error

# SmolVLA's had one set for each dataset that it was trained on (`normalize_inputs.so100-red_buffer_...`).
BUFFER = re.compile(r"\w+\.(?:so\d+(?:-\w+?)?[_.])?buffer_(?P<feature>.+)\.(?P<statistic>mean|std|min|max)")
TOKENIZER_STEP = "tokenizer_processor"
EXECUTED = (
    "unnormalize_outputs"  # made the actions, and so counts where `normalize_targets`, of the loss, differs
)


def is_legacy(folder: Path) -> bool:
    """Whether a policy's folder (that ``resolve_folder`` let pass) has no processors of its own."""
    return not (folder / PREPROCESSOR).is_file() and not (folder / POSTPROCESSOR).is_file()


def take_statistics(saved: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take what is no tensor of the model but a statistic out of ``saved``, and return it."""
    names = [name for name in saved if name.startswith(OLD_STATISTICS) and name not in state]
    return {name: saved.pop(name) for name in names}


def statistics(old: dict[str, Tensor], config: Any, path: Path) -> dict[str, dict[str, Tensor]]:
    """Statistics by feature, as LeRobot's datasets have them, from what ``take_statistics`` returned.

    The buffers' names have underscores where the features have dots.
    """
    features = [*config.input_features, *config.output_features]
    stats: dict[str, dict[str, Tensor]] = {}
    for name, value in old.items():
        if "_targets." in name and EXECUTED + name[name.index(".") :] in old:
            continue
        match = BUFFER.fullmatch(name)
        whose = [key for key in features if match and key.replace(".", "_") == match["feature"]]
        if match is None or len(whose) != 1:
            raise policy_error(
                f"the statistic '{name}' in {path} belongs to {' and '.join(whose) or 'none'} of the "
                f"features in config.json ({', '.join(features)}); correct their names"
            )
        known = stats.setdefault(whose[0], {})
        if not torch.equal(known.setdefault(match["statistic"], value), value):
            raise policy_error(
                f"{path} holds several statistics of '{whose[0]}' that differ (one is '{name}'): the policy "
                "was trained on several datasets; fine-tune it on one"
            )
    return stats


def make_processors(
    config: Any, stats: dict[str, dict[str, Tensor]], overrides: dict[str, dict[str, Any]]
) -> tuple[Any, Any]:
    """The (pre-, post-) processor that LeRobot makes of these statistics, in memory."""
    pre, post = _factory(config, overrides.get(TOKENIZER_STEP))(config, dataset_stats=stats)
    for index, step in enumerate(pre.steps):
        changes = overrides.get(getattr(type(step), "_registry_name", ""))
        if changes:
            pre.steps[index] = type(step)(**{**step.get_config(), **changes})
    return pre, post


def _factory(config: Any, tokenizer: dict[str, Any] | None) -> Callable[..., tuple[Any, Any]]:
    """LeRobot's factory; with another tokenizer, its code with that bound anew, for it knows no option."""
    from lerobot.policies.factory import make_pre_post_processors

    if not tokenizer:
        return make_pre_post_processors
    module = import_module(type(config).__module__.replace("configuration_", "processor_"))
    plain, step = getattr(module, f"make_{config.type}_pre_post_processors"), module.TokenizerProcessorStep

    def local(**arguments: Any) -> Any:
        return step(**{**arguments, **tokenizer})

    names = vars(module) | {"TokenizerProcessorStep": local}
    return FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__)


def read_statistics(config: Any, folder: Path) -> dict[str, dict[str, Tensor]]:
    """``statistics`` from a folder whose policy is not loaded here."""
    paths = whole_weights(folder)
    saved = read_weights(paths, unchecked=OLD_STATISTICS)
    return statistics(take_statistics(saved, {}), config, paths[0])


@contextmanager
def processor_files(adapter: Any, folder: Path) -> Iterator[Path]:
    """A folder with the processors' files of a base: its own, or a temporary one with what was made."""
    if not is_legacy(folder):
        yield folder
        return
    with TemporaryDirectory() as made:
        for pipeline in (adapter.preprocessor, adapter.postprocessor):
            pipeline.save_pretrained(made)
        yield Path(made)
