"""`trimtab export`: a steering run as a LeRobot policy for anyone: processors, model card, Hub."""

import json
import shlex
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import draccus
from lerobot.envs.configs import EnvConfig

from trimtab.adapters import PolicyConfig, UserError
from trimtab.adapters.checkpoint.files import CONFIG
from trimtab.adapters.checkpoint.folder import is_server
from trimtab.adapters.config import RemoteConfig
from trimtab.adapters.errors import reason
from trimtab.policies.artefact import (
    CRITIC,
    EDIT,
    WEIGHTS,
    Steered,
    is_artefact,
    load_artefact,
    read_config,
    save_artefact,
)
from trimtab.policies.residual import WEIGHTS as RESIDUAL_WEIGHTS
from trimtab.policies.steered.configuration_trimtab import TrimtabConfig
from trimtab.recipes.support.export_check import check_runners
from trimtab.recipes.support.reporting import read_json, table

CARD, CARD_TEXT = "README.md", Path(__file__).with_name("card.md")
ACTING = ("num_candidates", "use_actor", "use_edit")  # how the artefact acts, beside `deterministic`
ACTIONS = ("n_action_steps", "num_inference_steps", "dtype")  # what changes them, of the base's loading
RUN_CONFIG = "adapt.json"  # the run's own config, to run it again
# Of an environment's config: what follows from the rest, and what concerns the machine.
UNTOLD = ("task", "wanted", "features", "features_map", "max_parallel_tasks", "disable_env_checker")


@dataclass
class ExportConfig:
    """``trimtab export``."""

    # Folder that `trimtab adapt` wrote, or the artefact in it.
    run: Path | None = None
    # Where to write the policy; default: `export` in the run's folder.
    output_dir: Path | None = None
    # How to load the base, where that differs from the run: --policy.path= names another place of the same
    # base, for example a Hub repository.
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    # Hub repository to upload to (user/name).
    push_to_hub: str | None = None
    # Make that repository private.
    private: bool = False


def main(config: ExportConfig) -> None:
    artefact = find_artefact(config.run)
    output = config.output_dir or artefact.parent / "export"
    if output.exists() and not is_artefact(str(output)) and (output.is_file() or any(output.iterdir())):
        raise UserError("--output_dir", f"{output} exists and is no artefact; name another")
    foreign = [file.name for file in output.iterdir() if not written(file.name)] if output.is_dir() else []
    if foreign:
        held = ", ".join(sorted(foreign)[:5])
        raise UserError("--output_dir", f"{output} also holds {held}, which would be lost; name another")
    if output.resolve() == artefact.resolve():
        raise UserError("--output_dir", f"{output} is the artefact itself; name another")
    folder = export(artefact, output, config.policy, config.push_to_hub)
    print(f"exported to {folder}; try: lerobot-eval --policy.path={folder} --env.type=...")
    if config.push_to_hub:
        print(f"pushed to {push(folder, config.push_to_hub, config.private)}")


def written(name: str) -> bool:
    """Whether a file of this name is an export's."""
    return name in (WEIGHTS, CRITIC, EDIT, CONFIG, CARD, RUN_CONFIG) or name.startswith("policy_p")


def find_artefact(run: Path | None) -> Path:
    """The artefact of a run's folder; a ``UserError`` where there is none."""
    if run is None:
        raise UserError("--run", "name the folder that `trimtab adapt` wrote")
    run = run.expanduser()
    if any((folder / RESIDUAL_WEIGHTS).is_file() for folder in (run, run / "residual")):
        raise UserError(
            "--run", f"{run} is a residual policy, which corrects chunks and is no noise actor: no export"
        )
    for folder in (run / "artefact", run):
        if is_artefact(str(folder)):
            return folder
    raise UserError("--run", f"{run} holds no artefact; name a folder that `trimtab adapt` wrote")


def export(artefact: Path, output: Path, policy: PolicyConfig, repo: str | None = None) -> Path:
    """Write the artefact anew, checked against its base, with a model card.

    Args:
        artefact: folder of the artefact.
        output: where; an artefact there is replaced.
        policy: what of the base's loading differs from the run.
        repo: the Hub repository that it is going to, for the card.

    Raises:
        UserError: the artefact or its base is broken, or the base is out of reach for the Hub's users; or
            LeRobot would execute other actions than trimtab.
    """
    config = read_config(artefact)
    if policy.path:
        local = Path(policy.path).expanduser()
        config.base.path = str(local.resolve()) if local.exists() else policy.path
        config.base.revision = policy.revision
    base = config.base.path or ""
    if repo and not is_server(base) and (artefact / Path(base).expanduser()).exists():
        raise UserError(
            "--push_to_hub",
            f"the base {base} is a local folder, which nobody else has; push it too and name it with "
            "--policy.path=user/name",
        )
    steered = load_artefact(replace(policy, path=str(artefact)), config)
    anew = [name for name in ACTIONS if getattr(policy, name) not in (None, *_said(config, name))]
    known = vars(RemoteConfig()), vars(config.base.remote)
    for name, value in vars(policy.remote).items():
        if name != "timeout" and value not in [one[name] for one in known]:
            anew.append(f"remote.{name}")
    if anew:
        print(f"note: with another --policy.{anew[0]} it is another policy: its success is not measured")
        config.training = {n: value for n, value in config.training.items() if n != "success"}
    beside = {}
    runs = [artefact / RUN_CONFIG, *([artefact.parent / CONFIG] if artefact.name == "artefact" else ())]
    if run := next((path for path in reversed(runs) if path.is_file()), None):
        again = read_json(run)
        if policy.path:
            again["policy"] = {**again.get("policy", {}), "path": policy.path, "revision": policy.revision}
        beside[RUN_CONFIG] = json.dumps(again, indent=2) + "\n"
    beside[CARD] = card(steered, repo or str(output), bool(beside))

    def check(folder: Path) -> None:
        for note in check_runners(folder, steered):
            print(f"note: {note}")

    return save_artefact(
        output,
        steered.actor,
        config.noise,
        steered.adapter,
        steered.base,
        steered.base_folder,
        {**config.training, "deterministic": config.deterministic},
        (steered.critic, config.critic) if steered.critic is not None else None,
        beside,
        {name: getattr(config, name) for name in ACTING},
        check,
        steered.edit,
    )


def _said(config: TrimtabConfig, name: str) -> tuple[Any, Any]:
    """An option of the base's loading, as it was said for the artefact and as the artefact has it."""
    return getattr(config.base, name), getattr(config, name, None)


def card(steered: Steered, name: str, can_repeat: bool) -> str:
    """The model card: what the policy ``name`` steers, on which task, with which budget, and its success.

    ``can_repeat`` says whether the run's config lies beside.
    """
    config, training, base = steered.config, steered.config.training, steered.config.base
    env, path = training.get("env") or {}, base.path or ""
    task = env.get("task") or env.get("type") or "unknown"
    local = path.startswith((".", "/", "~"))
    # A folder goes by its name alone, without those of the machine that it was steered on.
    shown = steered.base_folder.name if local and isinstance(steered.base_folder, Path) else base.path
    revision = f", revision `{base.revision}`" if base.revision else ""
    weights = f", SHA-256 of its weights `{base.sha256}`" if base.sha256 else ""
    facts = [
        f"- base: `{shown}`{revision} (type `{base.policy_type}`{weights})",
        f"- task: `{task}` in the environment `{env.get('type', 'unknown')}`",
        f"- noise space: `{config.noise.type}`, noise of shape {tuple(config.noise_shape)}",
    ]
    if "env_steps" in training:
        algorithm = f", {training['algorithm']}" if "algorithm" in training else ""
        facts.append(
            f"- budget: {training['env_steps']:,} environment steps in {training['episodes']:,} episodes"
            f" (seed {training.get('seed')}{algorithm})"
        )
    if config.num_candidates > 1:
        facts.append(
            f"- acts: by the best of {config.num_candidates} chunks, the actor's and the base's own, by a "
            "critic; `--policy.num_candidates=1` takes the actor's"
        )
    if steered.edit is not None:
        facts.append(
            f"- edits: its chunks are changed by up to {config.edit_scale:g} in normalised actions; "
            "`--policy.use_edit=false` leaves them as the base makes them"
        )
    measured = "Not measured."
    if training.get("success"):
        episodes = training.get("measured_on") or "All policies met the same episode seeds."
        measured = f"```\n{table(training['success'])}\n```\n{episodes}"
    robot, path_option = training.get("attended"), Path(name).name if Path(name).is_absolute() else name
    options = {"policy.path": path_option, **(training.get("plugins") or {})}
    if robot:
        options |= {"robot.type": "...", "fps": env.get("fps"), "task": env.get("task")}
    else:
        options |= environment_options(env)
    given = [f"--{option}={shlex.quote(str(value))}" for option, value in options.items() if value]
    again = f"\n## Reproduce\n\n```\ntrimtab adapt --config_path={RUN_CONFIG}\n```\n"
    return CARD_TEXT.read_text(encoding="utf-8").format(
        base_model=f"base_model: {path}\n" if path.count("/") == 1 and not local else "",
        type=base.policy_type,
        task=task,
        weights=sum(p.numel() for part in (steered.actor, steered.edit) if part for p in part.parameters()),
        facts="\n".join(facts),
        measured=measured,
        command=" ".join(["lerobot-rollout" if robot else "lerobot-eval", *given]),
        reproduce=again if can_repeat else "",
    )


def environment_options(env: dict[str, Any]) -> dict[str, str]:
    """What LeRobot's commands are told of an environment: its task, and all that is not its type's default.

    ``env`` is its config as a run has saved it.
    """
    options = {"env.type": env.get("type", "..."), "env.task": env.get("task")}
    kind = EnvConfig.get_known_choices().get(env.get("type", ""))
    for one in fields(kind) if kind else ():
        usual = one.default_factory() if one.default_factory is not MISSING else one.default
        value = env.get(one.name)
        if one.name in UNTOLD or value is None or (usual is not MISSING and draccus.encode(usual) == value):
            continue
        options[f"env.{one.name}"] = value if isinstance(value, str) else json.dumps(value)
    if options["env.task"] in (env.get("id"), env.get("factory")):  # its name by default
        del options["env.task"]
    return options


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload an exported policy; returns its address, or raises a ``UserError`` where the Hub refuses."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        done = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Upload a steered policy",
            allow_patterns=["*.safetensors", "*.json", "*.md"],
        )
    except Exception as error:  # the Hub client has a dozen exceptions
        raise UserError("--push_to_hub", f"{repo} cannot be written ({reason(error)})") from None
    return str(done.repo_url)
