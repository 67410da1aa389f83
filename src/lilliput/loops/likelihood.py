"""Log-likelihood of continuations: what multiple-choice tasks, LAMBADA and the public harness all ask a model.

The choices of one question share the start of their text, so a question is one row: the shared tokens once, then a
branch for each choice. A branch sees the shared tokens and itself, and its positions go on from the shared ones, which
gives the numbers of separate rows at a fraction of the tokens. Rows of similar length are batched and padded at the
right, where nothing looks. Only hidden states that predict a scored token reach the head, in pieces, so a vocabulary of
128k costs no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lilliput.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.data.tokenizer import Tokenizer
    from lilliput.models.decoder import Attend, Decoder
    from lilliput.models.native import NativeDecoder

HEAD_ROWS = 256  # hidden states through the head at a time


class Score(NamedTuple):
    """Natural log of a continuation's probability, and whether greedy decoding would have written it."""

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class Pair:
    """Token ids of a context (at least one) and of the continuation to score (at least one)."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Tokens of `context + continuation`, cut where the context's own tokens end (as lm-evaluation-harness cuts).

    Blanks at the end of the context go to the continuation. The context begins with BOS where the model was trained with
    it; an empty one is BOS, or the end token. UserError when the continuation adds no token.
    """
    kept = context.rstrip(" ")
    continuation, context = context[len(kept) :] + continuation, kept
    begin = beginning(tokenizer)
    if not context and not begin:
        start = tokenizer.bos_id if tokenizer.bos_id is not None else next(iter(tokenizer.eos_ids), None)
        if start is None:
            raise UserError("nothing stands before the text to score", "the context is empty and the tokenizer has no BOS and no end token", "give a context")
        begin = (start,)
    whole, before = tokenizer.encode(context + continuation), tokenizer.encode(context) if context else []
    if len(whole) <= len(before):
        why = f"{continuation!r} after {context[-40:]!r} makes {len(whole)} tokens, the context alone {len(before)}"
        raise UserError("a continuation adds no token", why, "start it with a blank, or make it longer")
    return Pair((*begin, *whole[: len(before)]), tuple(whole[len(before) :]))


def beginning(tokenizer: Tokenizer) -> tuple[int, ...]:
    """(BOS,) where the tokenizer puts it before texts, else ()."""
    start = tokenizer.encode("", special=True)[:1]
    return tuple(start) if start == [tokenizer.bos_id] else ()


def score(model: Decoder | NativeDecoder, groups: Sequence[Sequence[Pair]], batch: int, advance: Callable[[int], None] | None = None) -> list[list[Score]]:
    """Scores of every pair, in their order. Pairs of a group share a row; `batch` rows in one forward.

    Contexts too long for the model lose their oldest tokens. `advance(n)` is told of n more groups that are done.
    UserError when a continuation alone is longer than the model's context.
    """
    import torch

    from lilliput.models.native import NativeDecoder

    if isinstance(model, NativeDecoder) and any(len(group) > 1 for group in groups):  # its attention has no branches: a pair is a row of its own
        alone = iter(score(model, [[pair] for group in groups for pair in group], batch, advance))
        return [[next(alone)[0] for _ in group] for group in groups]
    rows = [_Row([_fit(pair, model.facts.context) for pair in group]) for group in groups]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
    found: list[list[Score]] = [[] for _ in rows]
    with torch.inference_mode():
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
            for index, scores in zip(chosen, _forward(model, [rows[i] for i in chosen])):
                found[index] = scores
            if advance is not None:
                advance(len(chosen))
    return found


def token_logprobs(model: Decoder | NativeDecoder, h_NC: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability fp32 [N], whether the target is the most likely token [N]) of targets under the head of hidden states."""
    import torch

    logprobs, greedy = [], []
    for h, targets in zip(h_NC.split(HEAD_ROWS), targets_N.split(HEAD_ROWS)):
        logits = model.head(h)
        logprobs.append(logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1))
        greedy.append(logits.argmax(1) == targets)
    return torch.cat(logprobs), torch.cat(greedy)


def _fit(pair: Pair, context: int) -> Pair:
    """The pair with as much context as the model can read; the last token is predicted and never read."""
    room = context + 1 - len(pair.continuation)
    if room < 1:
        raise UserError("a continuation is longer than the model's context", f"{len(pair.continuation)} tokens, {context} can be read", "shorten it")
    return Pair(pair.context[-room:], pair.continuation)


class _Row:
    """The pairs of one group as one row: tokens, their positions, their branch (0 = shared), and what predicts what."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        texts = [(*pair.context, *pair.continuation) for pair in pairs]
        limit = min(len(pair.context) for pair in pairs)
        shared = next((i for i in range(limit) if len({text[i] for text in texts}) > 1), limit)
        if len(pairs) == 1:
            shared = len(texts[0]) - 1
        self.tokens, self.positions, self.branches = list(texts[0][:shared]), list(range(shared)), [0] * shared
        self.predicts: list[tuple[list[int], tuple[int, ...]]] = []  # for each pair: indices in the row, tokens they predict
        for number, (pair, text) in enumerate(zip(pairs, texts), 1):
            start = len(self.tokens) - shared
            self.predicts.append(([i if i < shared else i + start for i in range(len(pair.context) - 1, len(text) - 1)], pair.continuation))
            self.tokens += text[shared:-1]
            self.positions += range(shared, len(text) - 1)
            self.branches += [number] * (len(text) - 1 - shared)


def _forward(model: Decoder | NativeDecoder, rows: Sequence[_Row]) -> list[list[Score]]:
    import torch

    from lilliput.models.native import NativeDecoder

    device = model.device
    longest = max(len(row.tokens) for row in rows)
    pad = lambda lists, fill: torch.tensor([[*values, *[fill] * (longest - len(values))] for values in lists], device=device)
    tokens_BT, positions_BT = pad((row.tokens for row in rows), 0), pad((row.positions for row in rows), 0)
    branches_BT = pad((row.branches for row in rows), -1)
    branched = any(row.branches[-1] for row in rows)
    if isinstance(model, NativeDecoder):
        h_BTC = model.hidden(tokens_BT)
    else:
        h_BTC = model.hidden(tokens_BT, positions_BT, attend=_branches(positions_BT, branches_BT) if branched else None)
    wanted = [(b, i, token) for b, row in enumerate(rows) for where, what in row.predicts for i, token in zip(where, what)]
    row_N, index_N, target_N = torch.tensor(wanted, device=device).unbind(1)
    logprob_N, greedy_N = token_logprobs(model, h_BTC[row_N, index_N], target_N)
    logprobs, greedy = iter(logprob_N.double().tolist()), iter(greedy_N.tolist())
    return [[Score(sum(next(logprobs) for _ in what), all([next(greedy) for _ in what])) for _, what in row.predicts] for row in rows]


def _branches(positions_BT: Tensor, branches_BT: Tensor) -> Attend:
    """Attention in which a token sees the shared tokens and its own branch, up to itself. Nothing looks at padding."""
    import torch

    from lilliput.ops.attention import attend

    mine, theirs = branches_BT[:, None, :, None], branches_BT[:, None, None, :]
    behind = positions_BT[:, None, :, None] - positions_BT[:, None, None, :]
    seen = ((theirs == mine) | (theirs == 0)) & (behind >= 0)
    masks: dict[int | None, Tensor] = {}

    def see(layer: int, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, window: int | None) -> Tensor:
        if window not in masks:
            allowed = seen if window is None else seen & (behind < window)
            masks[window] = torch.zeros(allowed.shape, dtype=q_BHTD.dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))
        return attend(q_BHTD, k_BGTD, v_BGTD, causal=False, mask=masks[window])

    return see
