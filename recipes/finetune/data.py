"""What fine-tuning reads: LeRobotDatasets, and a recording of episodes as one."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from lerobot.configs import FeatureType, PreTrainedConfig

from trimtab.adapters import PolicyAdapter, UserError
from trimtab.adapters.inputs import required_inputs

REPO_ID = "trimtab/own_successes"
NUMERIC = ("float", "int", "uint", "bool")


def check_features(dataset: Any, adapter: PolicyAdapter, rename_map: dict[str, str]) -> None:
    """Refuse a dataset that lacks what the policy takes or makes.

    Raises:
        UserError: a feature is missing or of another shape.
    """
    from lerobot.utils.feature_utils import dataset_to_policy_features

    config, where = adapter.config, f"the dataset {dataset.repo_id}"
    given = {rename_map.get(k, k): f for k, f in dataset_to_policy_features(dataset.meta.features).items()}
    required = {**required_inputs(adapter, given), **config.output_features}
    if missing := [key for key in required if key not in given]:
        raise UserError(
            "--dataset.repo_id",
            f"{where} has no {', '.join(missing)}, which the policy needs; it has {', '.join(sorted(given))} "
            "(--policy.rename_map gives observations other names)",
        )
    if hasattr(config, "max_action_dim"):  # pads states and actions of any size
        return
    for key, feature in {**config.input_features, **config.output_features}.items():
        shape, expected = tuple(given[key].shape) if key in given else (), tuple(feature.shape)
        if shape not in ((), expected) and feature.type is not FeatureType.VISUAL:
            raise UserError(
                "--dataset.repo_id", f"'{key}' has shape {shape} in {where}, the policy takes {expected}"
            )


class ColumnWindows(torch.utils.data.Dataset):
    """The items of a LeRobotDataset without cameras, read from memory, a batch at a time.

    LeRobot reads one frame after another from disk (milliseconds each), which would cost a small policy many
    times its gradient steps. A window past either end of an episode repeats its last or first frame and is
    marked in ``<key>_is_pad``, as LeRobot does.

    Args:
        dataset: a LeRobotDataset with delta timestamps, whose features all are numbers.

    Attributes:
        columns: (frames, ...) by feature; what is put in their place is served.
    """

    def __init__(self, dataset: Any) -> None:
        from lerobot.datasets.feature_utils import get_delta_indices

        rows = dataset.hf_dataset.with_format("numpy")
        self.columns = {
            key: torch.from_numpy(np.array(rows[key][:]))
            for key in rows.column_names
            if key in dataset.features
        }
        deltas = get_delta_indices(dataset.delta_timestamps or {}, dataset.fps)
        self._deltas = {key: torch.tensor(steps) for key, steps in deltas.items()}
        _, episode, lengths = torch.unique_consecutive(
            self.columns["episode_index"], return_inverse=True, return_counts=True
        )
        self._last = (lengths.cumsum(0) - 1)[episode]
        self._first = self._last - lengths[episode] + 1
        self._tasks = [str(name) for name in dataset.meta.tasks.index]

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """The collated batch of the frames ``index`` (B,)."""
        rows = torch.as_tensor(index)
        first, last = self._first[rows][:, None], self._last[rows][:, None]
        batch: dict[str, Any] = {}
        for key, column in self.columns.items():
            window = rows[:, None] + self._deltas[key] if key in self._deltas else None
            batch[key] = column[rows if window is None else window.clamp(first, last)]
            if window is not None:
                batch[f"{key}_is_pad"] = (window < first) | (window > last)
        batch["task"] = [self._tasks[number] for number in batch["task_index"].tolist()]
        return batch


def batches(
    dataset: Any, config: PreTrainedConfig, batch_size: int, seed: int, workers: int, drop_last: int | None
) -> Iterator[dict[str, Any]]:
    """Training batches without end, sampled as ``lerobot-train`` does.

    ``workers`` processes read cameras. No window starts in the ``drop_last`` frames at an episode's end
    (default: the policy's own).

    Raises:
        UserError: no episode is long enough.
    """
    from lerobot.datasets import EpisodeAwareSampler
    from lerobot.utils.utils import cycle
    from torch.utils.data import BatchSampler, DataLoader

    drop = getattr(config, "drop_n_last_frames", 0) if drop_last is None else drop_last
    try:
        sampler = EpisodeAwareSampler(
            dataset.meta.episodes["dataset_from_index"],
            dataset.meta.episodes["dataset_to_index"],
            episode_indices_to_use=dataset.episodes,
            drop_n_last_frames=drop,
            shuffle=True,
            seed=seed,
            absolute_to_relative_idx=dataset.absolute_to_relative_idx,
        )
    except ValueError:
        raise UserError("--drop_last_frames", f"no episode has more than {drop} frames; lower it") from None
    if all(str(feature["dtype"]).startswith(NUMERIC) for feature in dataset.features.values()):
        chunks = BatchSampler(sampler, batch_size, drop_last=False)
        return cycle(DataLoader(ColumnWindows(dataset), sampler=chunks, batch_size=None))
    processes: dict[str, Any] = (
        {"multiprocessing_context": "spawn", "persistent_workers": True} if workers else {}
    )
    return cycle(DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers, **processes))


class Recorder:
    """Appends episodes to a LeRobotDataset under ``root``, which has so many; the first one makes it.

    ``names``: by feature, what its numbers are called.

    Attributes:
        episodes: that it has.
        frames: recorded here.
    """

    def __init__(
        self,
        root: Path,
        fps: int,
        repo_id: str = REPO_ID,
        names: dict[str, list[str]] | None = None,
        episodes: int = 0,
    ) -> None:
        self.root, self.fps, self.repo_id, self._names = root, fps, repo_id, names or {}
        self.episodes, self.frames = episodes, 0

    def add(self, episodes: Iterable[Iterable[dict[str, Any]]]) -> None:
        """Record the frames of ``episodes``, at least one, each as ``LeRobotDataset.add_frame`` takes it."""
        from lerobot.datasets import dataset_writer
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        dataset: Any = LeRobotDataset.resume(self.repo_id, root=self.root) if self.episodes else None
        try:
            for episode in episodes:
                for frame in episode:
                    if dataset is None:
                        features = {key: _feature(value) for key, value in frame.items() if key != "task"}
                        for key, names in self._names.items():
                            features[key]["names"] = names
                        dataset = LeRobotDataset.create(
                            self.repo_id, self.fps, features, root=self.root, use_videos=False
                        )
                    dataset.add_frame(frame)
                    self.frames += 1
                # LeRobot maps it over every frame, images or not: three quarters of the recording time.
                unmapped = mock.patch.object(dataset_writer, "embed_images", lambda frames: frames)
                with nullcontext() if dataset.meta.camera_keys else unmapped:
                    dataset.save_episode()
                self.episodes += 1
        finally:
            if dataset is not None:  # else it writes what it has once it is forgotten
                dataset.finalize()


def _feature(value: np.ndarray) -> dict[str, Any]:
    camera = value.dtype == np.uint8
    return {
        "dtype": "image" if camera else str(value.dtype),
        "shape": value.shape,
        "names": ["height", "width", "channels"] if camera else None,
    }
