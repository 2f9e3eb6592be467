"""--pos yarn: RoPE for a context s times as long as the weights were trained for; s = rope_scaling.

YaRN (Peng et al. 2023, arXiv 2309.00071): pair i of a head's channels turns by pos * f_i,

    f_i = theta^(-2i / hs) (1 - r_i + r_i / s),   r_i = (i - low) / (high - low) within 0 to 1
    low = floor(i(32)), high = ceil(i(1)),  i(n) = hs ln(L / (2 pi n)) / (2 ln theta)

where pair i(n) turns n times in the L tokens of training: fast pairs stay as they are, slow ones
are stretched as --pos rope stretches all. Queries and keys are multiplied by 0.1 ln s + 1, the
paper's temperature. The ramp is linear in i, as in the authors' code and in transformers; the
paper's eq. 18 has it linear in the number of turns.
It buys s times the context after little training or none: `--init_from RUN --pos yarn
--rope_scaling 4 --block_size 4096`. L is block_size / s, unless yarn.trained says otherwise.
Pitfall: short texts lose a little; with rope_scaling 1 it is rope.
"""

import math

import torch

from model import RoPE


class YaRN(RoPE):
    settings = {"trained": 0, "fast": 32.0, "slow": 1.0}

    def __init__(self, config):
        super().__init__(config)
        own = config.own_settings["yarn"]
        L = own["trained"] or config.block_size / self.scaling

        def pair(turns):
            return self.hs * math.log(L / (2 * math.pi * turns)) / (2 * math.log(self.theta))

        self.low = max(0, math.floor(pair(own["fast"])))
        self.high = max(self.low + 0.001, min(self.hs - 1, math.ceil(pair(own["slow"]))))

    @staticmethod
    def check(config):
        RoPE.check(config)
        own = config.own_settings["yarn"]
        if own["trained"] < 0 or not 0 < own["slow"] < own["fast"]:
            raise ValueError(f"yarn needs trained 0 or more and 0 < slow < fast, not {own}")
        if config.rope_scaling < 1 or config.rope_theta <= 1:
            raise ValueError(
                f"yarn needs rope_scaling 1 or more and rope_theta above 1, not "
                f"{config.rope_scaling} and {config.rope_theta}"
            )

    def rotation(self, pos):
        i = torch.arange(self.hs // 2, device=pos.device)
        slow = ((i - self.low) / (self.high - self.low)).clamp(0, 1)
        turn = self.theta ** (-2 * i / self.hs) * (1 - slow + slow / self.scaling)
        angle, scale = pos[:, None] * turn, 0.1 * math.log(self.scaling) + 1  # (T, hs/2)
        return angle.cos() * scale, angle.sin() * scale


pos = YaRN
