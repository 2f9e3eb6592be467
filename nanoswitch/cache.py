"""Keys and values of the positions seen so far, for generation and for scoring continuations.

Every layer's attention makes its own LayerCache. Before the layers run, KVCache.advance makes room
for the tokens that come next; the masks and the layers then only read where they lie.
"""

import copy

import torch


class Ring:
    """Slots for the newest `size` positions: position p lies in slot p % size. Shared by the layers
    of one size. Python decides which of three cases it is, and nothing else, so that a CUDA graph
    can replay the rest."""

    FAR = 2**62  # the position of an empty slot: in every query's future, so never visible

    def __init__(self, size):
        self.size = size

    def advance(self, start, pos, static):
        """The keys of the positions pos (T,), from start on, come next. k_pos (Tk,): the positions
        of what their queries attend to; pos itself where that is nothing else. static: empty slots
        are among them, so that Tk stays the same."""
        self.start, self.slots, self.static = start, pos[-self.size :] % self.size, static
        T = len(pos)
        if start == 0 and T > 1:
            self.seen_as = "chunk"  # nothing came before: the chunk attends to itself
            self.k_pos = pos
        elif T == 1 or start + T <= self.size:
            self.seen_as = "ring"  # what is overwritten is out of every query's window
            self.filled = self.size if static else min(self.size, start + T)
            self.k_pos = self.positions(pos[-1])[: self.filled]
        else:
            self.seen_as = "both"  # the first queries need what the last keys overwrite
            self.k_pos = torch.cat((self.positions(pos[0] - 1), pos))

    def positions(self, newest):
        """The position in each slot, (size,), once position `newest`, (), is the last."""
        behind = (newest - torch.arange(self.size, device=newest.device)) % self.size
        return (newest - behind).masked_fill(behind > newest, self.FAR)


class LayerCache:
    """What one layer keeps of each position: tensors (B, heads, size, width), such as its keys and
    values, each with heads and a width of its own."""

    def __init__(self, size):
        self.size, self.ring, self.tensors = size, None, ()
        self.kept = {}  # what with_last keeps, by name

    def update(self, *new):
        """Store tensors (B, heads, T, width) of the newest positions -> what their queries attend
        to, (B, heads, Tk, width) each."""
        ring = self.ring
        if not self.tensors:
            self.tensors = [x.new_zeros(*x.shape[:2], self.size, x.size(3)) for x in new]
        new = [x.type_as(held) for x, held in zip(new, self.tensors, strict=True)]
        seen = new
        if ring.seen_as == "both":
            seen = [torch.cat(pair, dim=2) for pair in zip(self.tensors, new, strict=True)]
        for held, x in zip(self.tensors, new, strict=True):
            held.index_copy_(2, ring.slots, x[:, :, -self.size :])
        if ring.seen_as == "ring":
            seen = [held[:, :, : ring.filled] for held in self.tensors]
        return seen

    def with_last(self, name, x, n):
        """x (B, T, width), something of the newest positions -> the same with that of the n
        positions before in front, zeros before the first: (B, n + T, width)."""
        held = self.kept.get(name)
        held = x.new_zeros(len(x), n, x.size(2)) if held is None else held.type_as(x)
        seen = torch.cat((held, x), dim=1)
        self.kept[name] = seen[:, seen.size(1) - n :]
        return seen


class KVCache:
    """What a model's layers keep of up to `length` positions, as each one's attention makes it."""

    def __init__(self, model, length):
        self.length, self.seen = length, 0
        self.static = False  # whether shapes must stay the same, see Ring.advance
        self.layers = [block.attn.new_cache(length) for block in model.transformer.h]
        self.rings = {layer.size: Ring(layer.size) for layer in self.layers}
        for layer in self.layers:
            layer.ring = self.rings[layer.size]
        self.documents = None  # (B, length) the document of each position, if the model asks
        self.ids = None  # (B, seen), if the model has to read the whole text again every time

    @property
    def device(self):
        return self.layers[0].tensors[0].device if self.ids is None else self.ids.device

    def read(self, idx):
        """idx (B, T), which comes next, for a model that keeps nothing -> all so far, (B, seen)."""
        self.check_room(idx.size(1))
        self.ids = idx if self.ids is None else torch.cat((self.ids, idx), dim=1)
        self.seen = self.ids.size(1)
        return self.ids

    def advance(self, pos):
        """Make room for the tokens at pos (T,), contiguous, which come next. ValueError when they
        do not fit."""
        start, T = self.seen, len(pos)
        self.check_room(T)
        self.seen += T
        for ring in self.rings.values():
            ring.advance(start, pos, self.static)

    def check_room(self, T):
        if self.seen + T > self.length:
            raise ValueError(f"the cache holds {self.length} positions, {T} more do not fit")

    def number_documents(self, pos, begun):
        """Count on: begun (B, T), the documents that began since pos[0] -> (B, T) the document of
        each token at pos."""
        if self.documents is None:
            self.documents = begun.new_zeros(len(begun), self.length)
        before = self.documents[:, (pos[:1] - 1).clamp(min=0)]  # (B, 1), at the very start 0
        self.documents[:, pos] = before + begun
        return before + begun

    def documents_at(self, pos):
        return self.documents[:, pos.clamp(max=self.length - 1)]  # an empty slot's is never seen

    def pick(self, rows):
        """A new cache whose batch is these rows of this one's, (B',) int64 with repeats: several
        continuations of one context then share the work on it."""
        picked = copy.copy(self)
        picked.layers = [copy.copy(layer) for layer in self.layers]
        for layer in picked.layers:
            layer.tensors = [x[rows] for x in layer.tensors]
            layer.kept = {name: x[rows] for name, x in layer.kept.items()}
        if self.ids is not None:
            picked.ids = self.ids[rows]
        if self.documents is not None:
            picked.documents = self.documents[rows]
        return picked

    def to(self, dtype):
        for layer in self.layers:
            layer.tensors = [x.to(dtype) for x in layer.tensors]
            layer.kept = {name: x.to(dtype) for name, x in layer.kept.items()}
