"""Each process of several renders on its own GPU."""

import os

import pytest
import torch

from trimtab.rl.rendering import choose_gl_backend, render_device


@pytest.mark.parametrize(
    "rank, gpus, visible, device",
    [
        (0, 8, None, "0"),
        (5, 8, None, "5"),
        (1, 2, "2, 6", "6"),  # two of the machine's eight
        (3, 1, "7", "7"),  # a cluster shows each process one
        (1, 2, "GPU-8a1f,GPU-77c0", "1"),
        (1, 1, None, "0"),
        (1, 0, "", None),  # a software renderer has one device, whose number is not ours to say
    ],
)
def test_the_device_of_a_process(rank, gpus, visible, device):
    assert render_device(rank, gpus, visible) == device


def test_only_one_of_several_processes_is_told_its_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("MUJOCO_EGL_DEVICE_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # restored at the end, whatever is set here
        monkeypatch.delenv(name)
    found = []
    for size, rank in (("", ""), ("1", "0"), ("4", "3"), ("4", "2")):  # what is set stays
        monkeypatch.setenv("LOCAL_WORLD_SIZE", size)
        monkeypatch.setenv("LOCAL_RANK", rank)
        choose_gl_backend()
        found.append(os.environ.get("MUJOCO_EGL_DEVICE_ID"))
    assert found == [None, None, "3", "3"]
