"""What LeRobot's runners execute of an artefact, compared with what trimtab executes of it."""

import itertools
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import draccus
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.envs.configs import EnvConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.constants import OBS_ENV_STATE
from torch import Tensor

from trimtab.adapters import UserError
from trimtab.adapters.errors import reason
from trimtab.policies.acting import denoise_several
from trimtab.policies.artefact import Steered
from trimtab.policies.steered.modeling_trimtab import TrimtabPolicy
from trimtab.rl.envs.hooks import env_processors

CLOSE = 1e-6  # difference of two actions, relative to the largest where that is above 1
OBSERVATIONS = 4  # examples that take turns
SERVER = "LeRobot's asynchronous policy server"


def check_runners(folder: Path, steered: Steered) -> list[str]:
    """Run an artefact as trimtab does and as LeRobot's commands do, on the same observations and draws.

    Two environments side by side, two whole chunks and the beginning of a third, then another episode. The
    observations are examples within the policy's own statistics. The base is not loaded anew.

    Args:
        folder: the artefact, whole.
        steered: the same, loaded.

    Returns:
        where LeRobot's runners act otherwise or refuse, a line each.

    Raises:
        UserError: `lerobot-eval` and `lerobot-rollout` would execute other actions, or none.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            runners, notes = _Runners(folder, steered), []
            if runners.policy.steps_apart:
                runners.compare_steps()
            else:
                notes.append(
                    f"lerobot-eval and lerobot-rollout (sync) refuse this policy: {TrimtabPolicy.STEPS}"
                )
            return [*notes, *runners.server_notes(), *environment_notes(steered)]
    except UserError:
        raise
    except Exception as error:  # whatever LeRobot and a policy's processors raise
        raise UserError("--run", f"LeRobot does not run this artefact: {reason(error)}") from error


class _Runners:
    """trimtab's loop on an artefact beside LeRobot's: ``policy`` with its processors around it."""

    def __init__(self, folder: Path, steered: Steered) -> None:
        self.steered, self.adapter = steered, steered.adapter
        config = PreTrainedConfig.from_pretrained(str(folder))
        config.pretrained_path, config.device = folder, self.adapter.device.type
        config.use_actor, config.compile_model = True, False
        self.policy = TrimtabPolicy(config, steered=steered).eval()
        self.ours = steered.policy(config.deterministic, config.num_candidates, config.use_edit)
        overrides = {
            "device_processor": {"device": config.device},
            "rename_observations_processor": {"rename_map": {}},
        }
        self.before, self.after = make_pre_post_processors(
            config, pretrained_path=str(folder), preprocessor_overrides=overrides
        )
        self.generator = torch.Generator().manual_seed(1)
        # Observations of environments side by side, as LeRobot's commands hand them to a preprocessor.
        examples, self.count = torch.Generator().manual_seed(0), min(2, self.adapter.max_batch or 2)
        made = [self.adapter.example_observation(self.count, examples) for _ in range(OBSERVATIONS)]
        observe = steered.config.observe
        for one in made if observe is not None and observe.tasks else ():  # the actor knows no others
            one["task"] = [observe.tasks[row % len(observe.tasks)] for row in range(self.count)]
        self.examples = [
            {k: v[:, -1] if isinstance(v, Tensor) else v for k, v in one.items()} for one in made
        ]

    def prior(self) -> Tensor:
        shape = (self.count, self.ours.draws, *self.adapter.noise_spec.shape)
        return torch.randn(shape, generator=self.generator).to(self.steered.actor.normalizer.mean.device)

    def compare_steps(self) -> None:
        """`lerobot-eval` and `lerobot-rollout`: an action at a time.

        Raises:
            UserError: an action differs.
        """
        observations, history = itertools.cycle(self.examples), self.adapter.n_obs_steps
        steps = self.adapter.chunk_shape[0]
        for length in (2 * steps + 1, steps):
            self.policy.reset()
            seen: deque[dict[str, Any]] = deque(maxlen=history)
            chunk: list[Tensor] = []
            last = None
            for step in range(1, length + 1):
                now = next(observations)
                seen.extend([now] * (1 if seen else history))
                prior = None if chunk else self.prior()
                theirs = self.after(self.policy.select_action(self.before(dict(now)), prior))
                if prior is not None:
                    actions, last = self.act(list(seen), prior, last)
                    chunk = list(actions.unbind(1))
                if difference := _difference(chunk.pop(0), torch.from_numpy(theirs.to("cpu").numpy())):
                    raise UserError(
                        "--run",
                        "lerobot-eval would execute other actions than trimtab eval: by up to "
                        f"{difference:.2g} at step {step} of an episode; nothing was exported",
                    )

    def act(self, seen: list[dict[str, Any]], prior: Tensor, last: Any) -> tuple[Tensor, Any]:
        """Actions (B, steps, action_dim) of trimtab's loop, and what a policy that remembers goes on from."""
        adapter, steered = self.adapter, self.steered
        history = {
            key: torch.stack([one[key] for one in seen], 1) if isinstance(value, Tensor) else value
            for key, value in seen[-1].items()
        }
        conditioning = adapter.observe(history, last)
        looks = steered.actor.space.uses_features or steered.edit is not None or self.ours.draws > 1
        features = adapter.seen(conditioning) if looks else torch.zeros(len(prior), 0)
        denoise = partial(denoise_several, adapter, conditioning)
        chunk = self.ours.act(features.float(), prior, denoise).chunk
        last = (conditioning, chunk) if adapter.remembers else None
        return adapter.postprocess(chunk, conditioning).float().cpu(), last

    def server_notes(self) -> list[str]:
        """The policy server: a chunk from one observation, unnormalised an action at a time."""
        now, prior, history, notes = self.examples[0], self.prior(), self.adapter.n_obs_steps, []
        self.policy.reset()
        chunk = self.policy.predict_action_chunk(self.before(dict(now)), prior)
        self.policy.reset()
        theirs = torch.stack([self.after(action) for action in chunk.unbind(1)], 1).float().cpu()
        ours, _ = self.act([now] * history, prior, None)
        if difference := _difference(ours, theirs):
            notes.append(f"{SERVER} would execute other actions than trimtab eval, by up to {difference:.2g}")
        if history > 1:
            notes.append(
                f"{SERVER} shows a policy the latest observation alone; this base looks at the last "
                f"{history}, and there gets it {history} times"
            )
        if self.adapter.remembers:
            notes.append(f"{SERVER} may leave out the end of a chunk, which this base remembers as executed")
        if OBS_ENV_STATE in self.adapter.config.input_features:
            notes.append(f"{SERVER} hands over no {OBS_ENV_STATE}, which this base needs")
        return notes


def environment_notes(steered: Steered) -> list[str]:
    """Where LeRobot puts other processors between environment and artefact than the base was steered with."""
    env = steered.config.training.get("env") or {}
    try:
        config = draccus.decode(EnvConfig, env)
        pairs = [env_processors(config, one) for one in (steered.adapter.config, steered.config)]
    except Exception:  # an environment that is not installed here, or of which the run kept no more
        return []
    base, artefact = ([type(step).__name__ for pipeline in pair for step in pipeline.steps] for pair in pairs)
    if base == artefact:
        return []
    steered_with, theirs = (", ".join(steps) or "nothing" for steps in (base, artefact))
    return [
        f"between {config.type} and the policy lerobot-eval puts {theirs}, the base was steered with "
        f"{steered_with}: use trimtab eval there"
    ]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two arrays of actions, 0.0 where it is rounding; ``inf``: other shapes."""
    if ours.shape != theirs.shape:
        return float("inf")
    difference = float((ours - theirs).abs().max())
    return 0.0 if difference <= CLOSE * max(1.0, float(ours.abs().max())) else difference
