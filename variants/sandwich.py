"""--residual sandwich: a norm before each branch and another one after it.

    x <- x + norm'(branch(norm(x)))

Ding et al. 2021 (CogView) and Gemma 2 (2024). It buys branches of a bounded size, and with them
stability in low precision and at large rates. Pitfalls: each branch starts at size 1, far above an
embedding's 0.02. With zero_init it starts at 0, but the first step, however small, brings it to
size 1. Two norms more a block.
"""

from model import NORMS, Residual


class Sandwich(Residual):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.post_1, self.post_2 = NORMS[config.norm](config), NORMS[config.norm](config)

    def forward(self, x, ln_1, attn, ln_2, mlp, carry):
        x = x + self.post_1(attn(ln_1(x)))
        return x + self.post_2(mlp(ln_2(x)))


residual = Sandwich
