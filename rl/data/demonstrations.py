"""Demonstrations in the replay: the chunks of a LeRobotDataset as transitions, beside those of the run.

A demonstration tells which chunk was executed, and not which noise would have made the policy execute it. So
they serve algorithms whose critic judges chunks (``best_of_n``, ``dsrl_na``). The actor still learns from
what the policy itself makes of noise: candidates are decoded for every state of the demonstrations too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from lerobot.utils.constants import ACTION
from torch import Tensor

from trimtab.adapters import Conditioning, PolicyAdapter, UserError
from trimtab.rl.algorithms import Algorithm
from trimtab.rl.data.decoder import ConditioningSpec
from trimtab.rl.data.demonstration_data import OPTION, Demonstration, DemonstrationData, DemosConfig
from trimtab.rl.data.replay import Batch, ReplayBuffer
from trimtab.rl.data.returns import NStepAccumulator, Returns, Transition
from trimtab.rl.data.rows import Row, observation_rows
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.progress import Progress


class Demonstrations(ReplayBuffer):
    """Transitions from demonstrations, beside the replay of a run.

    ``u`` of a batch is NaN: nothing may use it, and what did would be seen at once.

    Args:
        config: which dataset, and how much of it.
        transitions: from ``make_transitions``.
        settings: as for ``ReplayBuffer``, without the capacity.
    """

    def __init__(self, config: DemosConfig, transitions: list[Transition], **settings: Any) -> None:
        super().__init__(max(1, len(transitions)), **settings)
        self.config = config
        for transition in transitions:
            self.add(transition)

    def share(self, progress: float) -> float:
        """Their share of a batch at ``progress`` (0 to 1) of the run."""
        falling = self.config.schedule == "linear"
        return self.config.share * (max(0.0, 1.0 - progress) if falling else 1.0)

    def sample(self, batch_size: int) -> Batch:
        batch = super().sample(batch_size)
        batch["u"] = torch.full_like(batch["u"], torch.nan)
        return batch

    def mix(self, replay: ReplayBuffer, batch_size: int, progress: float) -> Batch:
        """A batch of both, in their shares at ``progress``, demonstrations first."""
        count = round(batch_size * self.share(progress))
        if count == 0:
            return replay.sample(batch_size)
        parts = self.sample(count), replay.sample(batch_size - count)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class TransitionMaker:
    """Turns demonstrated episodes into transitions as the collector makes them.

    Args:
        runner: the frozen policy.
        algorithm: proposes candidates; its config says what the replay keeps, the discount and ``n_step``.
        reward: ``sparse`` or ``env`` (see ``returns.Returns``).
        spec: of the conditioning, where that is kept.
        seed: of the candidates' draws.
        batch_size: states that the policy looks at together.
    """

    def __init__(
        self,
        runner: PolicyRunner,
        algorithm: Algorithm,
        reward: str,
        spec: ConditioningSpec | None,
        seed: int,
        batch_size: int = 64,
    ) -> None:
        self.runner, self.algorithm, self.spec = runner, algorithm, spec
        self.rl = rl = algorithm.config
        steps = runner.adapter.chunk_shape[0]
        self.returns = Returns(reward, rl.gamma, rl.discount_per, steps, rl.bootstrap_at_time_limit)
        self.batch_size = min(batch_size, runner.adapter.max_batch or batch_size)
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, data: DemonstrationData, progress: bool = True) -> list[Transition]:
        """All transitions of ``data``, episode by episode, in order."""
        steps = self.runner.adapter.chunk_shape[0]
        rows = [row for episode in data.episodes for row in episode.states(steps)]
        states: dict[int, Row] = {}
        bar = Progress(total=len(rows), desc="demonstrations", unit="state", disable=not progress)
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            states |= zip(some, self._look(data, some), strict=True)
            bar.update(len(some))
        bar.close()
        return [transition for episode in data.episodes for transition in self._episode(episode, states)]

    def _look(self, data: DemonstrationData, rows: list[int]) -> list[Row]:
        """Features of the states ``rows``, and what the replay keeps of each."""
        adapter, history = self.runner.adapter, data.history(rows)
        actions = torch.from_numpy(np.stack([data.actions(row, adapter.chunk_shape[0]) for row in rows]))
        chunks = normalised(adapter, history, actions)
        conditioning = adapter.observe(history)
        check_round_trip(adapter, chunks, conditioning, actions)
        features, candidates = self.runner.features(conditioning), None
        if self.rl.candidates:
            prior = self.runner.prior(len(rows) * self.rl.candidates, self._generator)
            prior = prior.to(adapter.device).unflatten(0, (len(rows), -1))
            denoise = partial(self.runner.denoise, conditioning)
            candidates = self.algorithm.propose(features, prior, denoise, steering=False)
        found = observation_rows(features, candidates, conditioning, self.spec)
        return [
            (seen, kept | {"chunk": chunk}) for (seen, kept), chunk in zip(found, chunks.flatten(1).numpy())
        ]

    def _episode(self, episode: Demonstration, states: dict) -> list[Transition]:
        steps = self.runner.adapter.chunk_shape[0]
        accumulator, done = NStepAccumulator(self.rl.n_step), []
        unknown = np.zeros(self.algorithm.space.dim, dtype=np.float32)
        for row, result, following in episode.chunks(steps):
            reward, discount = self.returns.reward_and_discount(result, episode.succeeded)
            (features, kept), (next_features, next_kept) = states[row], states[following]
            done += accumulator.add(
                features, unknown, reward, discount, next_features, result.ended, kept, next_kept
            )
        return done


def normalised(adapter: PolicyAdapter, history: dict[str, Any], actions: Tensor) -> Tensor:
    """Executed actions (B, steps, action_dim) as the policy would have made them, normalised.

    The policy's own preprocessor does it, which may need the observation (relative actions).

    Args:
        adapter: the policy.
        history: the observations before the chunks, (B, n_obs_steps, ...).
        actions: as recorded.
    """
    last = {key: value[:, -1] if isinstance(value, Tensor) else value for key, value in history.items()}
    batch = adapter.preprocessor({**last, ACTION: actions})
    return batch[ACTION][..., : actions.shape[-1]].float().cpu()


def check_round_trip(
    adapter: PolicyAdapter, chunks: Tensor, conditioning: Conditioning, actions: Tensor
) -> None:
    """Refuse a policy whose postprocessor does not lead back what its preprocessor makes of actions.

    Raises:
        UserError: the critic would be told other chunks than were executed.
    """
    found = torch.as_tensor(adapter.postprocess(chunks.to(adapter.device), conditioning)).float().cpu()
    scale = actions.abs().max().clamp_min(1e-3)
    if found.shape != actions.shape or not (found - actions).abs().max() <= 0.01 * scale:
        raise UserError(
            OPTION,
            f"the processors of this {adapter.policy_type} policy do not turn the dataset's actions into "
            "chunks and back, so the critic cannot be told what was executed",
        )
