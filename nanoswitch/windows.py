"""Shards -> batches. Batch i of a run is a pure function of (seed, i): a seeded permutation over
all windows of all shards, computed and never stored."""

import hashlib
import math

import numpy as np
import torch

from nanoswitch.shards import check_ids, load_shards, match_vocabulary
from nanoswitch.tokenizer import N_VOCAB, trained_vocabulary


def shuffled(i, n, seed):
    """Where a seeded permutation of range(n) takes the indices i: computed, never stored.

    A Feistel network over the next even power of two, walked until it lands inside (Black and
    Rogaway 2002). i int64 array -> int64 array."""
    half = np.uint64(max(1, math.ceil((n - 1).bit_length() / 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.default_rng(seed).integers(0, 2**63, size=6, dtype=np.uint64)
    out, outside = i.astype(np.uint64), np.ones(len(i), dtype=bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0xFF51AFD7ED558CCD)  # MurmurHash3's finaliser
            mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
            mixed ^= mixed >> np.uint64(33)
            left, right = right, left ^ (mixed & mask)
        out[outside] = (left << half) | right
        outside = out >= n
    return out.astype(np.int64)


class Windows:
    """All windows of T inputs and T targets in the shards, read as one stream.

    Window w covers tokens w T to w T + T, the last of them as a target only."""

    def __init__(self, shards, T, vocab=N_VOCAB):
        self.shards, self.T, self.vocab = shards, T, vocab
        self.starts = np.cumsum([0] + [len(s) for s in shards])  # of each shard in the stream
        self.tokens = int(self.starts[-1])
        self.count = (self.tokens - 1) // T

    def read(self, numbers):
        """Window numbers (n,) -> inputs and targets, (n, T) int64 each."""
        rows = np.empty((len(numbers), self.T + 1), dtype=np.int64)
        for row, number in zip(rows, numbers, strict=True):
            begin, end, filled = int(number) * self.T, int(number) * self.T + self.T + 1, 0
            s = int(np.searchsorted(self.starts, begin, side="right")) - 1
            while filled < len(row):  # a window may run on into the next shards
                piece = self.shards[s][max(0, begin - self.starts[s]) : end - self.starts[s]]
                if len(piece) and piece.max() >= self.vocab:
                    check_ids(piece.filename, self.shards[s], self.vocab)  # says where
                row[filled : filled + len(piece)] = piece
                filled, s = filled + len(piece), s + 1
        rows = torch.from_numpy(rows)
        return rows[:, :-1], rows[:, 1:]

    def batch(self, step, size, seed):
        """The window numbers of training step `step`, (size,): a pure function of seed and step.
        Every epoch passes over all windows in an order of its own."""
        sample = np.arange(step * size, (step + 1) * size)
        epoch = sample // self.count
        numbers = np.empty_like(sample)
        for e in np.unique(epoch):
            numbers[epoch == e] = shuffled(
                sample[epoch == e] % self.count, self.count, (seed, int(e))
            )
        return numbers

    def some(self):
        """The bytes of 64 windows all over the stream, however it is cut into shards."""
        if self.count < 1:
            raise ValueError(f"{self.tokens:,} tokens are no window of {self.T} + 1")
        numbers = np.unique(np.linspace(0, self.count - 1, 64).astype(np.int64))
        return self.read(numbers)[0].numpy().tobytes()


def data_sha256(*splits):
    """The hash of what Windows hold, all over each: that of the same data, however it is cut."""
    return hashlib.sha256(b"".join(windows.some() for windows in splits)).hexdigest()


def open_windows(folder, split, model_config):
    shards = load_shards(folder, split, trained_vocabulary(model_config))
    T = model_config.block_size
    windows = Windows(shards, T, match_vocabulary(folder, model_config))
    if windows.count < 1:
        raise ValueError(
            f"{folder} has {windows.tokens:,} {split} tokens, fewer than one window of "
            f"block_size {T} + 1; give it more text or lower --block_size"
        )
    return windows
