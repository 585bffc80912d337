"""A policy on a policy server: openpi's protocol, byte for byte, against a server of its own."""

import socket
import sys
import threading

import numpy as np
import pytest
import torch
from openpi_client import image_tools, msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from tests.helpers.adapter_cases import noise_like
from tests.helpers.openpi_server import API_KEY
from trimtab.adapters import PolicyConfig, UserError, load_adapter
from trimtab.adapters.config import RemoteConfig
from trimtab.adapters.remote.openpi_client import PolicyServer, pack, resize_with_pad, sent_images, unpack
from trimtab.policies.observe import ObserveConfig, build_observer

KEYS = {
    "observation.state": "observation/state",
    "observation.environment_state": "observation/environment_state",
}
DIMS = {"observation.state": 2, "observation.environment_state": 16}


def connect(address, mode="", **fields):
    remote = RemoteConfig(**{"keys": KEYS, "dims": DIMS, "timeout": 60.0, **fields})
    return load_adapter(PolicyConfig(path=f"{address}/{mode}", device="cpu", remote=remote))


@pytest.fixture(scope="module")
def remote(policy_server):
    adapter = connect(policy_server)
    yield adapter
    adapter.close()


@pytest.fixture(scope="module")
def local(served_policy):
    return load_adapter(PolicyConfig(path=str(served_policy), device="cpu"))


@pytest.fixture(scope="module")
def observation(local):
    return local.example_observation(2, torch.Generator().manual_seed(3))


# The message format.

MESSAGES = {
    "an observation": {
        "observation/image": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
        "observation/state": np.linspace(-1, 1, 8),
        "prompt": "pick up the red cube",
        "noise": np.ones((1, 10, 32), np.float32),
    },
    "numbers": {"a": np.float32(0.5), "b": np.int64(-3), "c": 1.5, "d": True, "e": None, "f": np.bool_(True)},
    "nested": {"images": {"cam_high": np.zeros((3, 2, 2), np.uint8)}, "list": [1, [2.0, "three"]]},
    "odd arrays": {
        "empty": np.zeros((0, 7), np.float32),
        "scalar": np.array(3.0),
        "strided": np.arange(12).reshape(3, 4)[:, ::2],
        "half": np.ones(3, np.float16),
        "big endian": np.arange(3, dtype=">f4"),
        "text": np.array(["a", "bc"]),
    },
}


def same(first, second):
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, np.ndarray | np.generic):
        return first.dtype == second.dtype and first.shape == second.shape and (first == second).all()
    return first == second


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_openpis_in_both_directions(name):
    message = MESSAGES[name]
    assert pack(message) == msgpack_numpy.packb(message)
    assert same(message, msgpack_numpy.unpackb(pack(message)))
    assert same(message, unpack(msgpack_numpy.packb(message)))


@pytest.mark.parametrize(
    "value", [np.array([object()]), np.array([1j]), np.zeros(2, [("a", "f4")]), np.complex64(1)]
)
def test_what_does_not_travel(value):
    with pytest.raises(ValueError, match="are not sent"):
        pack({"value": value})


@pytest.mark.parametrize("dtype", ["|O", "O", "V8", "f4,f4", "(2,)f4", 7, b"f4", None])
def test_dtypes_that_are_refused(dtype):
    array = {b"__ndarray__": True, b"dtype": dtype, b"shape": [1], b"data": b"\0" * 8}
    with pytest.raises(ValueError, match="are not accepted"):
        unpack(msgpack_numpy.packb({"value": array}))


@pytest.mark.parametrize(
    "shape, data", [([3], b"\0" * 8), ([-1], b"\0" * 8), ([2], b""), ([1 << 60], b"\0" * 8)]
)
def test_arrays_that_are_not_what_they_say(shape, data):
    array = {b"__ndarray__": True, b"dtype": "<f4", b"shape": shape, b"data": data}
    with pytest.raises((ValueError, TypeError)):
        unpack(msgpack_numpy.packb({"value": array}))


def test_openpis_own_client_talks_to_the_test_server(policy_server, local, observation):
    """So that the server is a fair stand-in: it serves openpi's client as it serves ours."""
    client = WebsocketClientPolicy(policy_server)
    assert client.get_server_metadata() == {"noise_shape": [8, 2]}
    noise = noise_like(local, 2)
    message = {name: observation[key][0, 0].numpy() for key, name in KEYS.items()}
    answer = client.infer({**message, "noise": noise[:1].numpy()})
    expected = local.postprocess(local.denoise(local.observe(observation), noise))[0]
    assert np.abs(answer["actions"] - expected.numpy()).max() < 1e-5
    assert answer["server_timing"]["infer_ms"] > 0


# The adapter's function.


def test_equals_the_policy_behind_the_server(remote, local, observation):
    assert remote.noise_spec.shape == local.noise_spec.shape == (8, 2)
    assert remote.chunk_shape == local.chunk_shape == (8, 2)
    noise = noise_like(local, 2)
    conditioning = remote.observe(observation)
    chunk = remote.denoise(conditioning, noise)
    expected = local.postprocess(local.denoise(local.observe(observation), noise))
    assert (chunk - expected).abs().max() < 1e-5
    assert torch.equal(remote.postprocess(chunk, conditioning), chunk)  # the server has un-normalised it
    assert torch.equal(chunk, remote.denoise(conditioning, noise))
    assert remote.config.output_features["action"].shape == (2,)
    assert remote.parameter_count is None


def test_many_noises_for_each_observation(remote, observation):
    conditioning, k = remote.observe(observation), 3
    noises = noise_like(remote, 2 * k)
    repeated = conditioning.repeat_interleave(k)
    together = remote.denoise(repeated, noises)
    for row in range(2 * k):
        alone = remote.denoise(conditioning[row // k], noises[row : row + 1])
        assert (together[row] - alone[0]).abs().max() < 1e-5
    assert (remote.denoise(repeated[[1, 4]], noises[[1, 4]]) - together[[1, 4]]).abs().max() < 1e-5


def test_wrong_noise_is_a_clear_error(remote, observation):
    conditioning = remote.observe(observation)
    with pytest.raises(ValueError, match=r"noise has shape .* takes"):
        remote.denoise(conditioning, noise_like(remote, 3))
    with pytest.raises(ValueError, match=r"noise is torch.float64"):
        remote.denoise(conditioning, noise_like(remote, 2).double())


def test_encode_does_not_change_the_batch(remote, observation):
    batch = remote.preprocess(observation)
    before = {key: value.clone() for key, value in batch.items() if isinstance(value, torch.Tensor)}
    remote.encode(batch)
    assert all(torch.equal(batch[key], value) for key, value in before.items())


def test_features_are_the_state(remote, observation):
    features = remote.features(remote.observe(observation).repeat_interleave(2))
    states = [observation[key][:, 0] for key in KEYS]
    assert torch.equal(features, torch.cat(states, -1).repeat_interleave(2, 0))


def test_features_from_the_servers_prefix(policy_server, observation):
    adapter = connect(policy_server, prefix_features=True)
    features = adapter.features(adapter.observe(observation))
    assert features.shape == (2, 18 + 4)
    total = observation["observation.state"][:, 0].sum(-1, keepdim=True)
    assert torch.allclose(features[:, -4:], total.expand(2, 4))
    adapter.close()
    with pytest.raises(
        UserError, match=r"--policy.remote.prefix_features: .* failed: KeyError: .* has no get_p"
    ):
        connect(policy_server, "ignores", prefix_features=True)  # an ordinary server, as openpi's own


def test_executes_as_many_steps_as_asked(policy_server):
    adapter = connect(policy_server, n_action_steps=3)
    assert adapter.chunk_shape == (3, 2)
    conditioning = adapter.example_conditioning(1, torch.Generator())
    assert adapter.denoise(conditioning, noise_like(adapter, 1)).shape == (1, 3, 2)
    adapter.close()


def test_a_server_need_not_repeat_itself_to_the_bit(policy_server):
    adapter = connect(policy_server, "rounds")
    adapter.check_identity(adapter.identity(policy_server), policy_server)
    adapter.close()


def test_identity_tells_policies_apart(remote, policy_server):
    identity = remote.identity(policy_server)
    remote.check_identity(identity, policy_server)
    example = remote.example_conditioning(1, torch.Generator().manual_seed(0)).repeat_interleave(2)
    one, other = remote.denoise(example, noise_like(remote, 2))
    assert 0 < identity["tolerance"] < 0.3 * (one - other).abs().max()  # less than what noise changes
    identity["answer"][0] += 2 * identity["tolerance"]
    with pytest.raises(UserError, match="another policy is served there"):
        remote.check_identity(identity, policy_server)


def test_a_dropped_connection_is_opened_again(policy_server, remote, observation):
    adapter = connect(policy_server, "drops")  # closes after every answer
    noise = noise_like(adapter, 2)
    once = adapter.denoise(adapter.observe(observation), noise)
    assert (once - remote.denoise(remote.observe(observation), noise)).abs().max() < 1e-5
    adapter.close()


def test_the_key_is_sent_as_openpis_client_sends_it(policy_server, monkeypatch):
    with pytest.raises(
        UserError, match=r"refused access \(HTTP 401\); put the server's key into OPENPI_API_KEY"
    ):
        connect(policy_server, "key")
    WebsocketClientPolicy(f"{policy_server}/key", api_key=API_KEY)
    monkeypatch.setenv("OPENPI_API_KEY", API_KEY)
    connect(policy_server, "key").close()


# What openpi's servers expect by default.


def test_libero_by_default(policy_server):
    """openpi's names, shapes and types; the noise's shape from the length of the server's chunks."""
    adapter = load_adapter(PolicyConfig(path=f"{policy_server}/libero", device="cpu"))
    assert adapter.noise_spec.shape == (10, 32) and adapter.chunk_shape == (10, 7)
    assert "sees observation.state but no image" in adapter.notes[0]
    observation = {
        "observation.images.image": torch.rand(1, 1, 3, 256, 256),
        "observation.images.image2": torch.rand(1, 1, 3, 180, 320),
        "observation.state": torch.rand(1, 1, 8),
        "task": ["open the drawer"],
    }
    conditioning, noise = adapter.observe(observation), noise_like(adapter, 1)
    means = [conditioning.tensors[key].float().mean() / 255 for key in list(observation)[:2]]
    seen = sum(means) + observation["observation.state"].mean() + len("open the drawer")
    assert (adapter.denoise(conditioning, noise) - noise[:, :, :7] - seen).abs().max() < 1e-3
    # Each row has its own instruction.
    two = {key: value.repeat_interleave(2, 0) for key, value in observation.items() if key != "task"}
    rows = adapter.denoise(adapter.observe({**two, "task": ["open", "open it"]}), noise.expand(2, -1, -1))
    assert torch.allclose(rows[1] - rows[0], torch.full((10, 7), 3.0), atol=1e-4)
    # An actor sees the state, unless it is told to look at the cameras that are sent, too.
    assert ObserveConfig().resolved(adapter, []).inputs == ["features"]
    adapter.observer = build_observer(ObserveConfig(inputs=["features", "images"]), adapter, [])
    packed = adapter.seen(adapter.observe(observation))
    assert packed.shape == (1, 8 + 2 * 3 * 64 * 64) and torch.equal(
        packed[:, :8], adapter.features(conditioning)
    )
    for index, key in enumerate(list(observation)[:2]):
        pixels = packed[:, 8:].unflatten(1, (2, -1))[:, index]
        assert abs(pixels.mean() / 255 - observation[key].mean()) < 0.01
    adapter.observer = build_observer(ObserveConfig(inputs=["task"]), adapter, ["open the drawer"])
    adapter.check_identity(adapter.identity(policy_server), policy_server)  # asked with another task
    adapter.features = lambda conditioning: None  # as where no state is sent
    adapter.offers_features = False
    assert ObserveConfig().resolved(adapter, []).inputs == ["state", "images"]
    adapter.close()


def test_aloha(policy_server):
    remote = RemoteConfig(
        keys={"observation.images.top": "images.cam_high", "observation.state": "state"},
        dims={"observation.state": 14},
        channels_first=True,
    )
    adapter = load_adapter(PolicyConfig(path=f"{policy_server}/aloha", device="cpu", remote=remote))
    assert adapter.noise_spec.shape == (10, 32) and adapter.chunk_shape == (10, 13)
    adapter.close()


@pytest.mark.parametrize(
    "height, width", [(224, 224), (256, 256), (180, 320), (481, 320), (60, 79), (5, 500)]
)
def test_images_are_resized_as_openpis_clients_do(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = image_tools.convert_to_uint8(image_tools.resize_with_pad(image, 224, 224))
    assert np.array_equal(resize_with_pad(image, 224), expected)


def test_images_come_through_lerobots_conversion_unchanged(policy_server):
    adapter = load_adapter(PolicyConfig(path=f"{policy_server}/libero", device="cpu"))
    pixels = torch.arange(256, dtype=torch.uint8).repeat(588).reshape(1, 224, 224, 3)
    sent = sent_images(
        adapter.options, pixels.permute(0, 3, 1, 2).float() / 255
    )  # as `preprocess_observation` does
    assert torch.equal(sent, pixels)
    adapter.close()


# What can go wrong is one clear line.

FAILURES = {
    "ignores": "the same noise gave two different chunks: .*/ignores ignores the noise it is sent",
    "blind": r"two different noises gave the same chunk: .*obs.pop\('noise', None\).*\(obs, noise=noise\)",
    "raises": r"failed: KeyError: 'observation/wrist_image'; it was sent observation/state \(2,\), .*\.keys",
    "unnamed": r"it was sent noise of shape \(1, 8, 32\) \(--policy.remote.noise_shape\)",
    "dies": "dropped the connection twice",
    "leaves": "closed the connection at once",
    "nan": "returned NaN or Inf actions",
    "shape": r"actions of shape \(2,\); they must be \(horizon, action dimension\)",
    "changes": r"actions of shape \(., 2\); they must be always \(., 2\)",
    "empty": "answered without 'actions'",
    "garbage": "sent what is not openpi's message format",
    "objects": "arrays of '|O' are not accepted",
}


@pytest.mark.parametrize("mode", FAILURES)
def test_failure_of_the_server(mode, policy_server):
    with pytest.raises(UserError, match=FAILURES[mode]) as caught:
        connect(policy_server, mode)
    assert caught.value.option == "--policy.path" and policy_server in caught.value.message
    assert "\n" not in str(caught.value)


def test_a_server_that_never_answers(policy_server):
    with pytest.raises(UserError, match=r"did not answer within 0.3 s; raise --policy.remote.timeout"):
        connect(policy_server, "silent", timeout=0.3)


def test_a_late_answer_is_not_taken_for_that_to_the_next_request(policy_server):
    server = PolicyServer(f"{policy_server}/late", timeout=0.2)
    message = {"observation/state": np.zeros(2), "observation/environment_state": np.zeros(16)}
    with pytest.raises(UserError, match=r"did not answer within 0.2 s"):
        server.request({**message, "slow": True})
    server.timeout = 60.0
    answer = server.request({**message, "observation/state": np.ones(2)})
    assert np.array_equal(answer["state"], np.ones(2))
    server.close()


def test_the_answer_to_an_interrupted_request_is_not_taken_for_another(policy_server, monkeypatch):
    """As Ctrl-C, or a notebook's stop, interrupts it."""
    server = PolicyServer(f"{policy_server}/late", timeout=60.0)
    message = {"observation/state": np.zeros(2), "observation/environment_state": np.zeros(16)}
    server.request(message)

    def stopped(**options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(server._connection, "recv", stopped)
        with pytest.raises(KeyboardInterrupt):
            server.request({**message, "observation/state": np.full(2, 5.0)})
    for value in (1.0, 2.0):
        answer = server.request({**message, "observation/state": np.full(2, value)})
        assert np.array_equal(answer["state"], np.full(2, value))
    server.close()


def test_an_answer_may_be_long(policy_server, remote, observation):
    adapter = connect(policy_server, "wide")  # websockets refuses more than 1 MiB unless it is told
    noise = noise_like(adapter, 2)
    once = adapter.denoise(adapter.observe(observation), noise)
    assert (once - remote.denoise(remote.observe(observation), noise)).abs().max() < 1e-5
    adapter.close()


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"ws://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=f"nobody listens at {address}"):
        connect(address)
    with pytest.raises(UserError, match=r"nobody listens at ws://no-such-host.invalid"):
        connect("ws://no-such-host.invalid:8000")


@pytest.mark.parametrize(
    "reply", [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"SSH-2.0-OpenSSH_9.6\r\n"]
)
def test_another_kind_of_server(reply):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            connection.recv(4096)
            connection.sendall(reply)
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(UserError, match="is not the address of an openpi policy server"):
            connect(f"ws://127.0.0.1:{server.getsockname()[1]}")
        thread.join()


@pytest.mark.parametrize("address", ["ws://", "ws://:8000", "ws://host:port"])
def test_no_address(address):
    with pytest.raises(UserError, match=r"--policy.path: ") as caught:
        connect(address)
    assert "\n" not in str(caught.value)


def test_options_that_do_not_fit(policy_server):
    cases = [
        ({"n_action_steps": 9}, "--policy.remote.n_action_steps: must be between 1 and 8"),
        ({"dims": {}}, "--policy.remote.dims: say how many entries observation.state has"),
        ({"keys": {}}, "--policy.remote.keys: name at least one"),
        ({"keys": dict.fromkeys(KEYS, "state")}, "--policy.remote.keys: the server's name state is used"),
        ({"keys": {**KEYS, "observation.state": "prompt"}}, "name prompt is used twice"),
        (
            {"keys": dict(zip(KEYS, ("arm", "arm.joints")))},
            "name arm.joints is used twice, as arm and arm.joints",
        ),
        ({"timeout": 0}, "--policy.remote.timeout: must be positive"),
        ({"noise_shape": [8]}, r"--policy.remote.noise_shape: must be \[horizon, dimension\], got \[8\]"),
    ]
    for fields, message in cases:
        with pytest.raises(UserError, match=message):
            connect(policy_server, "unnamed", **fields)
    given = {"dtype": "bfloat16", "num_inference_steps": 4, "n_action_steps": 4, "rename_map": {"a": "b"}}
    given |= {"engine": "cuda_graph"}
    for field, value in given.items():
        with pytest.raises(UserError, match=f"--policy.{field}: has no effect on a policy server"):
            load_adapter(PolicyConfig(path=policy_server, device="cpu", **{field: value}))


def test_the_servers_noise_shape_wins(policy_server):
    adapter = connect(policy_server, noise_shape=[50, 32])
    assert adapter.noise_spec.shape == (8, 2)
    assert "--policy.remote.noise_shape has no effect" in adapter.notes[0]
    adapter.close()
    adapter = connect(policy_server, "unnamed", noise_shape=[8, 2])
    assert adapter.noise_spec.shape == (8, 2)
    adapter.close()


def test_an_environment_that_does_not_fit(remote, observation):
    with pytest.raises(
        UserError, match=r"--policy.remote.keys: the server is sent observation.state, the env"
    ):
        remote.observe({key: value for key, value in observation.items() if key != "observation.state"})
    with pytest.raises(UserError, match=r"--policy.remote.dims: observation.state is said to have 2 entries"):
        remote.observe({**observation, "observation.state": torch.zeros(2, 1, 7)})


@pytest.mark.parametrize("package", ["websockets.sync.client", "msgpack"])
def test_without_the_packages(package, policy_server, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("adapter", "openpi_client", "packing"):  # as in a process that has not met a server yet
        monkeypatch.delitem(sys.modules, f"trimtab.adapters.remote.{module}")
    with pytest.raises(UserError, match=r"pip install 'lerobot_policy_trimtab\[remote\]'"):
        connect(policy_server)
