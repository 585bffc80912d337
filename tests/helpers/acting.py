"""A learner for the collector that acts as a test says."""

import torch

from trimtab.policies.noise_samplers import NoiseSampler
from trimtab.rl.algorithms.acting import BehaviorPolicy


class Acts(BehaviorPolicy):
    """Feeds the noise that ``choose`` gives as ``u``; default: the draw itself. ``untrained`` likewise."""

    def __init__(self, space, choose=None, untrained=None):
        self.space = space
        self.choose = choose or (lambda features, prior: space.project(prior, prior))
        self.other = untrained or self.choose

    def act(self, features, prior, denoise, candidates, steered):
        draw = prior[:, 0]
        u = torch.where(steered[:, None], self.choose(features, draw), self.other(features, draw))
        return NoiseSampler(lambda *_: u, self.space).act(features, prior, denoise)
