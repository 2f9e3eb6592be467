"""--residual post: the norm after the sum, as in the first Transformer (Vaswani et al. 2017).

    x <- norm(x + branch(x))

The form before GPT-2's norm(x) inside the branch (Xiong et al. 2020 compare them).
It buys, at best, better use of depth. Pitfalls: no clean path for gradients, so it needs a warm-up
and a smaller rate, and fails in deep models; the norm before the head then repeats the last one.
"""

from model import Residual


class Post(Residual):
    def forward(self, x, ln_1, attn, ln_2, mlp, carry):
        x = ln_1(x + attn(x))
        return ln_2(x + mlp(x))


residual = Post
