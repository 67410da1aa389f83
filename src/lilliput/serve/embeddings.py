"""Embeddings: one vector a text, from the last hidden states of a decoder or of a BERT-class encoder.

    mean   the mean over the text's tokens (encoders; decoders where nothing better is known)
    last   the state of the last token, which alone has seen all others (decoders trained for it)

Vectors have length 1. A decoder runs here as the eager model, apart from the engine: on the native runner that is a second copy of the
weights, in fp32, taken at the first call. An encoder runs padding-free (models/encoder.py). Reimers and Gurevych 2019, arXiv 1908.10084.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Literal

from lilliput.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.data.tokenizer import Tokenizer
    from lilliput.models.spec import DecoderSpec

Pooling = Literal["mean", "last"]
Hidden = Callable[["Tensor", "Tensor"], "Tensor"]  # tokens [B, S] and mask [B, S] -> hidden states [B, S, C]
BATCH_TOKENS = 4096  # of one forward, padding included


class Embedder:
    """Texts, as token ids, to vectors. One call at a time; the model is made at the first."""

    def __init__(self, make: Callable[[], Hidden], dim: int, context: int, vocab: int, pooling: Pooling) -> None:
        """`make`: builds the model's forward; `dim`: length of a vector; `context`: tokens of a text at most; `vocab`: ids there are."""
        self.dim, self.context, self.vocab, self.pooling = dim, context, vocab, pooling
        self._make, self._hidden, self._lock = make, None, Lock()

    def check(self, texts: Sequence[Sequence[int]]) -> None:
        """UserError for a text without tokens, with too many, or with ids that do not exist."""
        for number, ids in enumerate(texts):
            if stranger := [one for one in ids if not 0 <= one < self.vocab]:
                raise UserError(f"token id {stranger[0]} is not in the vocabulary", f"ids go from 0 to {self.vocab - 1}", "use the model's own tokenizer")
            if not 1 <= len(ids) <= self.context:
                raise UserError(f"text {number} has {len(ids):,} tokens", f"1 to {self.context:,} are possible", "shorten the text, or cut it in parts")

    def embed(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """A vector for each text, in order. UserError as check."""
        import torch

        self.check(texts)
        found: dict[int, list[float]] = {}
        with self._lock, torch.inference_mode():
            if self._hidden is None:
                self._hidden = self._make()  # type: ignore[assignment]
            order = sorted(range(len(texts)), key=lambda at: len(texts[at]))  # neighbours of a length share a forward with little padding
            while order:
                longest = len(texts[order[-1]])
                batch = [order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // longest)))]
                tokens, mask = torch.zeros(len(batch), longest, dtype=torch.long), torch.zeros(len(batch), longest, dtype=torch.long)
                for row, at in enumerate(batch):
                    tokens[row, : len(texts[at])], mask[row, : len(texts[at])] = torch.tensor(texts[at]), 1
                vectors = pooled(self._hidden(tokens, mask), mask, self.pooling)  # type: ignore[misc]
                found |= {at: vector for at, vector in zip(batch, vectors.tolist())}
        return [found[at] for at in range(len(texts))]


def pooled(hidden_BSC: Tensor, mask_BS: Tensor, pooling: Pooling) -> Tensor:
    """[B, C], each of length 1. The mask is 1 for a text's tokens, which come first."""
    from torch.nn import functional as F

    from lilliput.models.encoder import mean_pool

    if pooling == "mean":
        return F.normalize(mean_pool(hidden_BSC.float(), mask_BS), dim=-1)
    last_B = mask_BS.sum(1) - 1
    return F.normalize(hidden_BSC[range(len(last_B)), last_B].float(), dim=-1)


def of_decoder(name: str, device: str, dtype: str, spec: DecoderSpec, pooling: Pooling) -> Embedder:
    """An embedder on the eager form of a decoder, loaded at the first call. Padding comes last, where causal attention never looks."""

    def make() -> Hidden:
        import torch

        from lilliput.models.load import load_model

        model, _, _ = load_model(name, device, dtype)

        def hidden(tokens_BS: Tensor, mask_BS: Tensor) -> Tensor:
            positions_BS = torch.arange(tokens_BS.shape[1], device=model.device).expand(tokens_BS.shape)
            return model.hidden(tokens_BS.to(model.device), positions_BS).cpu()

        return hidden

    return Embedder(make, spec.embed_dim or spec.dim, spec.context, spec.vocab, pooling)


def of_encoder(folder: Path, pooling: Pooling) -> tuple[Embedder, Tokenizer]:
    """An embedder on a BERT-class encoder, and its tokenizer. UserError as load_encoder."""
    from lilliput.data.tokenizer import Tokenizer
    from lilliput.models.encoder import load_encoder

    model = load_encoder(folder)
    spec = model.spec
    return Embedder(lambda: lambda tokens, mask: model(tokens, mask), spec.dim, spec.context, spec.vocab, pooling), Tokenizer.from_folder(folder)
