"""--pos partial_rope: RoPE on a part of a head's channels, the rest without positions.

As in GPT-NeoX (Black et al. 2022; rotary_pct 0.25) and in the half-truncated form of
modded-nanogpt (2024): of hs / 2 pairs of channels the first `part` turn,

    pair i turns by pos * theta^(-2i / (part hs)) for 2i < part hs, the others not at all

It buys channels that compare content whatever the distance, and better lengths beyond training.
NoPE in every n-th layer (Kazemnejad et al. 2023; SmolLM3) is a pattern of what there is:
`--pos partial_rope --pos_pattern partial_rope,partial_rope,partial_rope,none`.
Pitfall: the channels that turn must be even in number. `--settings partial_rope.part=0.25`.
"""

import torch
import torch.nn.functional as F

from model import NoPosition


class PartialRoPE(NoPosition):
    settings = {"part": 0.5}

    def __init__(self, config):
        super().__init__(config)
        self.pairs = config.head_size // 2
        self.turning = round(config.own_settings["partial_rope"]["part"] * self.pairs)
        self.theta, self.scaling = config.rope_theta, config.rope_scaling

    @staticmethod
    def check(config):
        part = config.own_settings["partial_rope"]["part"]
        if config.head_size % 2 or round(part * (config.head_size // 2)) < 1:
            raise ValueError(
                f"partial_rope turns no pair: head size {config.head_size}, part {part}"
            )
        if part > 1:
            raise ValueError(f"partial_rope.part is {part}; it must be at most 1")

    def rotation(self, pos):
        i = torch.arange(self.turning, device=pos.device)
        angle = pos[:, None] / self.scaling * self.theta ** (-i / self.turning)
        angle = F.pad(angle, (0, self.pairs - self.turning))  # (T, hs / 2)
        return angle.cos(), angle.sin()


pos = PartialRoPE
