"""--pos scaled_sinusoidal: sinusoidal positions at a size that is chosen.

A sinusoid has the root mean square 1 / sqrt(2), whatever the width C. So

    p = rms sqrt(2) sin or cos of pos / 10000^(2i / C)     (Vaswani et al. 2017, section 3.5)

Token embeddings start at a root mean square of 0.02. `--pos sinusoidal` divides by sqrt(C), and is
six times as large as they are at C = 32, three times at 128, 1.3 times at 768. Li et al. 2019, a
Transformer that speaks, train the factor; here it is a setting, to be searched as a rate is:
`--settings scaled_sinusoidal.rms=0.04`.
"""

import math

from model import Sinusoidal


class ScaledSinusoidal(Sinusoidal):
    settings = {"rms": 0.02}

    def __init__(self, config):
        super().__init__(config)
        self.rms = config.own_settings["scaled_sinusoidal"]["rms"]

    @staticmethod
    def check(config):
        rms = config.own_settings["scaled_sinusoidal"]["rms"]
        if not rms > 0:
            raise ValueError(f"scaled_sinusoidal.rms is {rms}; it must be above 0")

    def embed(self, pos):
        return super().embed(pos) * (self.rms * math.sqrt(2 * self.C))  # (T, C)


pos = ScaledSinusoidal
