"""Retention: carries out what a cache policy says. It knows no policy, only places and what stays.

A sequence that holds `size` tokens gives up a block: the places that stay are moved together, the last block goes back to the pool (or one in
between, when the same places leave in all heads), and the sequence remembers how many tokens are gone. Eviction is at block borders only, after a
step has been committed, so a step that breaks off changes nothing.

Where the same places stay in all heads, their order is kept, and positions may be places (keys before RoPE). Where heads differ, the last
places fill the holes of each head: the order does not matter, since keys carry their positions. Copies: at most 16 tokens a head and eviction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lilliput.base.errors import UserError
from lilliput.base.protocols import KVPolicy
from lilliput.serve.blocks import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.serve.blocks import BlockPool
    from lilliput.serve.scheduler import Chunk, Seq


@dataclass
class Held:
    """What is known of the keys of one sequence: [layers, kv_heads, size]."""

    mass: Tensor
    positions: Tensor


class Retention:
    """One engine's evictions."""

    def __init__(self, policy: KVPolicy, runner: Any, pool: BlockPool) -> None:
        """UserError when the runner cannot do what the policy needs."""
        self.policy, self.runner, self.pool = policy, runner, pool
        self._held: dict[int, Held] = {}
        refusal = runner.refuses(policy.positions, policy.wants_mass)
        if refusal is not None:
            raise UserError("this cache policy cannot run here", refusal, "serve.policy=full")

    def room(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """Where a step writes the attention mass of these chunks; None when nobody wants it."""
        if not self.policy.wants_mass:
            return None
        import torch

        layers, heads = self.runner.shape
        return torch.zeros(layers, len(chunks), heads, max(chunk.stop for chunk in chunks))

    def ended(self, chunks: Sequence[Chunk], mass_LSGT: Tensor | None, seqs: Sequence[Seq | None]) -> None:
        """A step has been committed: note its mass, then evict from sequences that are full. None: the sequence has ended."""
        for at, (chunk, seq) in enumerate(zip(chunks, seqs)):
            if seq is None:
                continue
            if mass_LSGT is not None:
                self._note(chunk, mass_LSGT[:, at])
            if seq.table.length == self.policy.size:
                self._evict(seq)

    def forget(self, id: int) -> None:
        """The sequence has ended."""
        self._held.pop(id, None)

    def _note(self, chunk: Chunk, mass_LGT: Tensor) -> None:
        import torch

        if chunk.start == 0:  # its first step, or its first after it lost its blocks
            layers, heads = self.runner.shape
            size = layers, heads, self.policy.size
            self._held[chunk.id] = Held(torch.zeros(size), torch.zeros(size, dtype=torch.long))
        held = self._held[chunk.id]
        held.mass[..., : chunk.stop] += mass_LGT[..., : chunk.stop]
        held.positions[..., chunk.start : chunk.stop] = torch.arange(chunk.start + chunk.gone, chunk.stop + chunk.gone)

    def _evict(self, seq: Seq) -> None:
        size = self.policy.size
        held = self._held.get(seq.id)
        keep = self.policy.keep(size - BLOCK, *((held.mass, held.positions) if held else (None, None)))
        if keep.dim() == 1:
            self._close_ranks(seq, keep.tolist())
        else:
            assert held is not None and self.policy.positions == "absolute", "heads that differ need keys that carry their positions"
            self._fill_holes(seq, keep, held)
        seq.gone += BLOCK

    def _close_ranks(self, seq: Seq, keep: list[int]) -> None:
        """The same block of places leaves everywhere: the first places of its first block move on, and the block leaves the table."""
        import torch

        first = next((place for place, old in enumerate(keep) if place != old), len(keep))
        assert keep[first:] == list(range(first + BLOCK, self.policy.size)), "places that leave must be neighbours"
        block, inside = divmod(first, BLOCK)
        if inside:
            source = torch.arange(block * BLOCK, block * BLOCK + inside)
            self.runner.shift(seq.table.blocks, source, source + BLOCK)
        self.pool.cut(seq.table, block)

    def _fill_holes(self, seq: Seq, keep_LGK: Tensor, held: Held) -> None:
        import torch

        count = keep_LGK.shape[-1]
        stays = torch.zeros(held.positions.shape, dtype=torch.bool).scatter_(-1, keep_LGK, True)
        moves = int(stays[..., count:].sum(-1).max())
        if moves:
            anchor = keep_LGK[..., :1]  # stays where it is: what heads with fewer moves copy onto itself
            holes, late = (~stays[..., :count]).int().topk(moves, -1), stays[..., count:].int().topk(moves, -1)
            target = torch.where(holes.values > 0, holes.indices, anchor)
            source = torch.where(late.values > 0, late.indices + count, anchor)
            self.runner.shift(seq.table.blocks, source, target)
            for part in (held.mass, held.positions):
                part.scatter_(-1, target, part.gather(-1, source))
        held.mass[..., count:] = 0
        self.pool.cut(seq.table, count // BLOCK)
