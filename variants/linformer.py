"""--attention linformer: linear attention over summaries of the past (Wang et al. 2020).

A token sees the tokens of its own segment, and each segment before as a few weighted sums of its
keys and values. Cost grows with T rank / segment + segment keys a token, not T. Pitfall: the
paper's form sees the future, so here only past segments are summarised.
Its numbers are the fields linformer_segment and linformer_rank of GPTConfig.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Attention
from nanoswitch.cli import at_least
from nanoswitch.kernels import attention_mask


class Linformer(Attention):
    """Linformer (Wang et al. 2020), made causal: a query sees the tokens of its own segment up to
    itself, and each segment before that as `rank` weighted sums of its keys and values.

    The paper compresses the whole sequence, the future with it, and has no causal form; here a
    summary is visible only once its segment is past. Cost grows with T rank / segment + segment
    keys per token instead of T. S = linformer_segment, R = linformer_rank."""

    replayable = False  # the masks grow with the number of segments

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.S, self.R = config.linformer_segment, config.linformer_rank
        self.e_proj = Summary(config)  # E, for keys
        self.f_proj = Summary(config)  # F, for values

    @staticmethod
    def check(config):
        at_least(config, 1, "linformer_segment linformer_rank")
        if config.window or config.document_mask:
            raise ValueError("linformer has segments of its own: drop window and document_mask")
        if config.attention_kernel in ("flash", "flex"):
            raise ValueError(f"linformer has no {config.attention_kernel} kernel; use auto")

    def attend(self, q, k, v, mask, cache, x):
        B, nh, T, hs = q.size()
        n, S = mask.size(-3), self.S  # n segments hold the queries, the last of `end` segments
        start = cache.ring.start if cache is not None else 0
        first = start // S
        end = first + n
        q = F.pad(q, (0, 0, start - first * S, end * S - start - T))
        q = q.view(B, nh, n, S, hs)
        k, v = self.segments(k, end), self.segments(v, end)  # (B, nh, end, S, hs)
        k_past = self.summarize(k, self.e_proj, n)  # (B, nh, n, end R, hs)
        v_past = self.summarize(v, self.f_proj, n)
        k = torch.cat((k_past, k[:, :, first:]), dim=3)  # (B, nh, n, end R + S, hs)
        v = torch.cat((v_past, v[:, :, first:]), dim=3)
        y = self.kernel(q, k, v, mask, self.dropout * self.training)  # (B, nh, n, S, hs)
        return y.flatten(2, 3)[:, :, start - first * S :][:, :, :T]

    def segments(self, x, end):
        """(B, nkv, Tk, hs) -> its first `end` segments, (B, nh, end, S, hs)."""
        x = self.share(x)[:, :, : end * self.S]
        x = F.pad(x, (0, 0, 0, end * self.S - x.size(2)))
        return x.unflatten(2, (end, self.S))

    def summarize(self, x, proj, n):
        """(B, nh, end, S, hs) -> every segment's summaries, once per query segment:
        (B, nh, n, end R, hs)."""
        past = F.linear(x.transpose(3, 4), proj.weight.type_as(x))  # (B, nh, end, hs, R)
        past = past.transpose(3, 4).flatten(2, 3)  # (B, nh, end R, hs)
        return past[:, :, None].expand(-1, -1, n, -1, -1)

    def mask(self, pos, wpe, docs=None, cache=None):
        """A summary counts as standing at the last position of its segment: (1 or nh, n, S,
        end R + S)."""
        S, R, device = self.S, self.R, pos.device
        start = cache.ring.start if cache is not None else 0
        first, end = start // S, math.ceil((start + len(pos)) / S)
        masks = []
        for segment in range(first, end):
            q_pos = torch.arange(segment * S, segment * S + S, device=device)
            past = torch.arange(S - 1, end * S, S, device=device).repeat_interleave(R)  # (end R,)
            k_pos = torch.cat((past, q_pos))
            mask = attention_mask(q_pos, k_pos, 0, wpe.bias(q_pos, k_pos))  # (.., S, end R + S)
            # the last query would see the summary of its own, just finished segment: it must not
            own = torch.zeros(end * R + S, dtype=torch.bool, device=device)
            own[segment * R : segment * R + R] = True
            hidden = False if mask.dtype == torch.bool else -math.inf
            masks.append(mask.masked_fill(own, hidden).expand(-1 if mask.dim() == 3 else 1, -1, -1))
        return torch.stack(masks, dim=1)

    def keys(self, T):
        return min(T, T * self.R // self.S + self.S)


class Summary(nn.Linear):
    """The S keys or values of a segment -> R sums of them, the same for each of C channels."""

    def __init__(self, config):
        super().__init__(config.linformer_segment, config.linformer_rank, bias=False)
        self.init_std = config.linformer_segment**-0.5  # summaries as large as keys
        self.uses_per_token = config.n_embd / config.linformer_segment

    def uses(self, T):
        return self.uses_per_token


attention = Linformer
