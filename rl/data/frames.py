"""Frames of a replay buffer: uint8, each kept once however many transitions refer to it."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


class FrameStore:
    """Counts the references to each frame and forgets one that has none left.

    Frames are told apart by their content (128 bits of BLAKE2b): what a transition ends with is found again
    as what another begins with, whoever adds them. Memory grows by doubling, and is touched as it fills.

    Args:
        size: pixels in a frame.

    Attributes:
        pixels: (slots, size) the frames, by slot.
    """

    def __init__(self, size: int) -> None:
        self.pixels = torch.empty(0, size, dtype=torch.uint8)
        self._slots: dict[bytes, int] = {}  # by content
        self._held: dict[int, tuple[bytes, int]] = {}  # content and references, by slot
        self._free: list[int] = []

    def __len__(self) -> int:
        """Distinct frames that are held."""
        return len(self._slots)

    def put(self, frame: np.ndarray) -> int:
        """Refer once more to ``frame`` (size,) uint8; returns its slot."""
        key = hashlib.blake2b(frame.tobytes(), digest_size=16).digest()
        slot = self._slots.get(key)
        if slot is None:
            slot = self._free.pop() if self._free else len(self._slots)
            if slot == len(self.pixels):
                wider = torch.empty(max(64, 2 * slot), self.pixels.shape[1], dtype=torch.uint8)
                wider[:slot] = self.pixels
                self.pixels = wider
            self.pixels[slot] = torch.from_numpy(frame)
            self._slots[key] = slot
        self._held[slot] = key, self._held.get(slot, (key, 0))[1] + 1
        return slot

    def release(self, slot: int) -> None:
        """Refer once less to the frame in ``slot``."""
        key, references = self._held.pop(slot)
        if references > 1:
            self._held[slot] = key, references - 1
        else:
            del self._slots[key]
            self._free.append(slot)
