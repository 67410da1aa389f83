"""How the engine runs a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lilliput.serve.runners.mover import NO_SWAP, Swap

if TYPE_CHECKING:
    from lilliput.models.decoder import Decoder
    from lilliput.models.native import NativeDecoder
    from lilliput.serve.runners.eager import Eager
    from lilliput.serve.runners.native import Native


def runner_of(model: Decoder | NativeDecoder, blocks: int, kv: str, swap: Swap = NO_SWAP) -> Eager | Native:
    """The runner of a model over a cache of its own. kv: how a native model's cache is stored."""
    from lilliput.models.native import NativeDecoder

    if isinstance(model, NativeDecoder):
        from lilliput.serve.runners.native import Native

        return Native(model, blocks, kv, swap)
    from lilliput.serve.runners.eager import Eager

    return Eager(model, blocks, swap)
