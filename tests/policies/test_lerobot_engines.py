"""What drives a robot in LeRobot drives it by an artefact: `lerobot-rollout` and the policy server."""

import logging
import pickle
import signal
import sys
import time
from concurrent import futures
from pathlib import Path

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

import lerobot_policy_trimtab  # noqa: F401 - what LeRobot's commands import
from tests.helpers.steered import artefact_of
from tests.helpers.tiny import make_tiny
from trimtab.adapters.tiny.parts import camera_features

TASK = "press the button"
PLUGINS = Path(__file__).parents[1] / "helpers" / "plugins"


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    """A SmolVLA that sees a robot's two cameras, steered."""
    root = tmp_path_factory.mktemp("engines")
    options = make_tiny("smolvla", root / "base", **camera_features(2, state_dim=3, action_dim=3))
    adapter, actor = artefact_of(options, root / "artefact")
    return root / "artefact", adapter, actor


@pytest.fixture
def arm(tmp_path, monkeypatch):
    """The robot's module, installed as a plugin as far as LeRobot can see; loggers and signals as before."""
    info = tmp_path / "site" / "lerobot_robot_drawn_arm-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lerobot_robot_drawn_arm\nVersion: 0\n")
    for folder in (tmp_path / "site", PLUGINS):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tmp_path)  # LeRobot's policy server makes a folder for its logs
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    signals = {one: signal.getsignal(one) for one in caught}
    import lerobot_robot_drawn_arm as module

    for noted in (module.DrawnArm.seen, module.DrawnArm.sent):
        noted.clear()
    yield module
    root.handlers[:], root.level = handlers, level
    for one, handler in signals.items():
        signal.signal(one, handler)


def expected_chunk(adapter, actor, seen):
    """The chunk that training's path makes of a robot's observation, in its units: (steps, joints)."""
    state = [value for name, value in seen.items() if name.endswith(".pos")]
    observation = {
        f"observation.images.{name}": torch.from_numpy(value).permute(2, 0, 1)[None, None] / 255
        for name, value in seen.items()
        if name.startswith("camera")
    }
    observation |= {"observation.state": torch.tensor(state)[None, None], "task": [TASK]}
    conditioning = adapter.observe(observation)
    prior = torch.zeros(1, *adapter.noise_spec.shape)
    noise = actor.act(adapter.features(conditioning).float(), prior, True)
    return adapter.postprocess(adapter.denoise(conditioning, noise), conditioning)[0]


def rollout(monkeypatch, folder, *more):
    from lerobot.scripts.lerobot_rollout import main

    argv = [
        "lerobot-rollout", f"--policy.path={folder}", "--robot.type=drawn_arm", f"--task={TASK}",
        "--duration=1.5", "--fps=20", "--return_to_initial_position=false", "--play_sounds=false", *more,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    main()


def sent_by(arm):
    return torch.tensor([list(action.values()) for action in arm.DrawnArm.sent])


def test_lerobot_rollout_sync(steered, arm, monkeypatch):
    """Every chunk that the robot was sent is the one of training for what it saw when the chunk began."""
    folder, adapter, actor = steered
    rollout(monkeypatch, folder, "--inference.type=sync")
    sent, seen = sent_by(arm), arm.DrawnArm.seen[1:]  # the first is taken when it connects
    steps = adapter.chunk_shape[0]
    assert len(sent) >= 2 * steps
    for start in range(0, len(sent), steps):
        chunk = expected_chunk(adapter, actor, seen[start])
        part = sent[start : start + steps]
        assert (part - chunk[: len(part)]).abs().max() <= 1e-5
    assert sent.std(0).min() > 1e-3


def test_lerobot_rollout_rtc(steered, arm, monkeypatch):
    """Each chunk that LeRobot's thread asked for is the base's, guided by what was left, from the noise that
    the actor chose; and the robot was sent rows of them.
    """
    folder, adapter, actor = steered
    asked = []
    real = get_policy_class("trimtab").predict_action_chunk

    def noted(self, batch, noise=None, **kwargs):
        chunk = real(self, dict(batch), noise, **kwargs)
        asked.append((self, batch, kwargs, chunk))
        return chunk

    monkeypatch.setattr(get_policy_class("trimtab"), "predict_action_chunk", noted)
    rollout(monkeypatch, folder, "--inference.type=rtc", "--inference.rtc.execution_horizon=4")
    assert len(asked) >= 2 and asked[0][2]["prev_chunk_left_over"] is None
    assert any(kwargs["prev_chunk_left_over"] is not None for _, _, kwargs, _ in asked)
    for policy, batch, kwargs, chunk in asked:
        conditioning = adapter.encode(batch)
        prior = torch.zeros(1, *adapter.noise_spec.shape)
        noise = actor.act(adapter.features(conditioning).float(), prior, True)
        again = policy.base.predict_action_chunk(dict(batch), noise=noise, **kwargs)
        assert chunk.shape[1] == adapter.config.chunk_size and (chunk - again).abs().max() <= 1e-6
    after = make_pre_post_processors(PreTrainedConfig.from_pretrained(folder), pretrained_path=str(folder))[1]
    rows = torch.cat([after(chunk)[0] for _, _, _, chunk in asked])
    sent = sent_by(arm)
    assert len(sent) > 0 and (sent.unsqueeze(1) - rows).abs().amax(-1).amin(1).max() <= 1e-5


def test_policy_server(steered, arm):
    """LeRobot's server of its asynchronous inference, over gRPC."""
    grpc = pytest.importorskip("grpc", reason="LeRobot's policy server needs lerobot[async]")
    from lerobot.async_inference.configs import PolicyServerConfig
    from lerobot.async_inference.helpers import (
        RemotePolicyConfig,
        TimedObservation,
        map_robot_keys_to_lerobot_features,
    )
    from lerobot.async_inference.policy_server import PolicyServer
    from lerobot.transport import services_pb2, services_pb2_grpc
    from lerobot.transport.utils import send_bytes_in_chunks

    folder, adapter, actor = steered
    robot = arm.DrawnArm(arm.DrawnArmConfig())
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(PolicyServer(PolicyServerConfig()), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        stub = services_pb2_grpc.AsyncInferenceStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
        stub.Ready(services_pb2.Empty())
        features = map_robot_keys_to_lerobot_features(robot)
        wanted = RemotePolicyConfig("trimtab", str(folder), features, actions_per_chunk=3, device="cpu")
        stub.SendPolicyInstructions(services_pb2.PolicySetup(data=pickle.dumps(wanted)))
        for step in (0, 1):
            seen = robot.get_observation()
            observation = TimedObservation(time.time(), step, seen | {"task": TASK}, must_go=True)
            stub.SendObservations(
                send_bytes_in_chunks(pickle.dumps(observation), services_pb2.Observation, silent=True)
            )
            answer = pickle.loads(stub.GetActions(services_pb2.Empty()).data)
            actions = torch.stack([one.get_action() for one in answer])
            assert [one.get_timestep() for one in answer] == [step, step + 1, step + 2]
            assert (actions - expected_chunk(adapter, actor, seen)[:3]).abs().max() <= 1e-5
            robot.send_action(dict(zip(robot.action_features, actions[0].tolist(), strict=True)))
    finally:
        server.stop(0)
