"""Demonstrations in the replay: the chunks of a LeRobotDataset as transitions, beside those of the run.

A demonstration tells which chunk was executed, and not which noise would have made the policy execute it. So
they serve algorithms whose critic judges chunks (``best_of_n``, ``dsrl_na``). The actor still learns from
what the policy itself makes of noise: candidates are decoded for every state of the demonstrations too.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.adapters import UserError
from trimtab.rl.algorithms import Algorithm
from trimtab.rl.data.decoder import ConditioningSpec
from trimtab.rl.data.demonstration_data import OPTION, DemonstrationData, DemosConfig
from trimtab.rl.data.memory import Row, observation_rows
from trimtab.rl.data.replay import Batch, Layout, ReplayBuffer
from trimtab.rl.data.returns import NStepAccumulator, Returns, Transition
from trimtab.rl.envs.chunk import ChunkResult
from trimtab.rl.runner import PolicyRunner
from trimtab.rl.runs.progress import Progress


class Demonstrations(ReplayBuffer):
    """Transitions from demonstrations, beside the replay of a run.

    ``u`` of a batch is NaN: nothing may use it, and what did would be seen at once.
    """

    def __init__(
        self,
        config: DemosConfig,
        transitions: list[Transition],
        layout: Layout,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(max(1, len(transitions)), layout, seed, device)
        self.config = config
        for transition in transitions:
            try:
                self.add(transition)
            except ValueError as error:
                raise UserError(OPTION, f"{error}; leave out its episode by --demos.episodes") from None

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


def make_transitions(
    data: DemonstrationData,
    runner: PolicyRunner,
    algorithm: Algorithm,
    returns: Returns,
    spec: ConditioningSpec | None,
    seed: int,
    progress: bool = True,
) -> list[Transition]:
    """The transitions of demonstrated episodes, in order, as the collector makes those of a run.

    The ``algorithm`` proposes candidates, from draws of ``seed``; a ``spec`` says how conditioning is kept.
    """
    steps = runner.adapter.chunk_shape[0]
    seen = [(one, r) for one in data.episodes for r in dict.fromkeys([*one.starts(steps), one.final])]
    generator = torch.Generator().manual_seed(seed)
    states: dict[int, Row] = {}
    size = min(data.config.batch_size, runner.adapter.max_batch or data.config.batch_size)
    bar = Progress(total=len(seen), desc="demonstrations", unit="state", disable=not progress)
    for start in range(0, len(seen), size):
        rows = [row for _, row in seen[start : start + size]]
        actions = np.stack([one.chunk(row, steps) for one, row in seen[start : start + size]])
        found = _look(data.history(rows), torch.from_numpy(actions), runner, algorithm, spec, generator)
        states |= zip(rows, found, strict=True)
        bar.update(len(rows))
    bar.close()
    unknown, done = np.zeros(algorithm.space.dim, dtype=np.float32), []
    for episode in data.episodes:
        accumulator, starts = NStepAccumulator(algorithm.config.n_step), episode.starts(steps)
        for row, following in zip(starts, [*starts[1:], episode.final], strict=True):
            part = slice(row - episode.first, row - episode.first + steps)
            last = row == starts[-1]
            rewards, successes = episode.rewards[part], episode.successes[part]
            ends = last and not episode.succeeded
            result = ChunkResult(None, None, rewards, successes, terminated=last, truncated=ends)
            reward, discount = returns.reward_and_discount(result, episode.succeeded)
            (features, kept), (next_features, next_kept) = states[row], states[following]
            chunk = Transition(features, unknown, reward, discount, next_features, kept)
            done += accumulator.add(chunk, last, next_kept)
    return done


def _look(
    history: dict[str, Any],
    actions: Tensor,
    runner: PolicyRunner,
    algorithm: Algorithm,
    spec: ConditioningSpec | None,
    generator: torch.Generator,
) -> list[Row]:
    """What the replay keeps of B states, and of the ``actions`` (B, steps, action_dim) executed there.

    Raises:
        UserError: the policy's processors do not turn actions into chunks and back.
    """
    adapter = runner.adapter
    chunks = runner.normalised(history, actions)
    conditioning = adapter.observe(history)
    back = torch.as_tensor(adapter.postprocess(chunks.to(adapter.device), conditioning)).float().cpu()
    scale = actions.abs().max().clamp_min(1e-3)
    if back.shape != actions.shape or not (back - actions).abs().max() <= 0.01 * scale:
        raise UserError(
            OPTION,
            f"the processors of this {adapter.policy_type} policy do not turn the dataset's actions into "
            "chunks and back, so the critic cannot be told what was executed",
        )
    features, candidates = runner.features(conditioning), None
    if count := algorithm.config.candidates:
        prior = runner.prior(len(actions) * count, generator).to(adapter.device).unflatten(0, (-1, count))
        denoise = partial(runner.denoise, conditioning)
        candidates = algorithm.propose(features, prior, denoise, steering=False)
    found = observation_rows(features, candidates, conditioning, spec)
    rows = zip(found, chunks.flatten(1).numpy())
    return [(seen, kept | {"chunk": one, "imitated": np.zeros(1)}) for (seen, kept), one in rows]
