"""E.T.: for short sequences a strip of 16 query rows keeps its scores on chip, scaled before the product; a length threshold picks
the operator. Weights are pruned in 16x16 tiles, the value matrix by rows, so that attention itself shrinks.

The run takes the three forms of attention (ops/flash.py) at some lengths: errors against float64, the bytes of scores that each holds, which one
`auto` is, bit for bit. Then products over 16x16 tiles of which some are dropped: the tiles that are read, found by making one block of
inputs NaN at a time. The softmax is held to base e: the authors' published code answers with powers of 2. Pruning itself is not here.

Chen et al. 2021, SC 2021, doi 10.1145/3458817.3476138, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lilliput.papers.paper import Finding, Paper

if TYPE_CHECKING:
    from torch import Tensor

LENGTHS, HEADS, DIM = (64, 256, 512, 1024), 4, 64
SIDE, TILE, KEPT = 512, 16, 0.25  # a square matrix, and the share of its tiles that stay
SOFTMAX = (0.0321, 0.0871, 0.2369, 0.6439)  # of 0, 1, 2, 3
Row = dict[str, str | int | float]


def run() -> Finding:
    """Forms at four lengths and one matrix in tiles; about 2 s. UserError without compiled kernels."""
    import torch

    from lilliput.base.errors import UserError
    from lilliput.ops import flash, native

    if native.module() is None:
        raise UserError("E.T. cannot be measured", native.missing() or "", "install a compiler and lilliput again")
    rows = [_attended(length) for length in LENGTHS]
    read, of, apart = _tiles()
    rows.append({"what": f"{SIDE} x {SIDE} in tiles", "error": apart, "tiles read": f"{read} of {of}"})
    keys = ("what", "auto is", "error", "strip, KiB a thread", "partial, KiB", "tiled ms", "strip ms", "partial ms", "tiles read")
    rows = [{key: row.get(key, "") for key in keys} for row in rows]
    last, short = rows[len(LENGTHS) - 1], [length for length, row in zip(LENGTHS, rows) if row["auto is"] == "strip"]
    weights = flash.attention(torch.ones(1, 1, 4, 1), torch.arange(4.0).view(1, 1, 4, 1), torch.eye(4)[None, None], causal=False, scale=1.0)[0, 0, 0]
    natural = bool((weights - torch.tensor(SOFTMAX)).abs().max() < 5e-5)
    close = max(float(row["error"]) for row in rows) <= 1e-5
    summary = (
        f"three forms of attention are {'within' if close else 'NOT within'} 1e-5 of float64; at {LENGTHS[-1]:,} keys strips hold "
        f"{last['strip, KiB a thread']} KiB of scores and results a thread, the partial form {last['partial, KiB']:,} KiB of scores; auto is the strip up to "
        f"{max(short, default=0)} of the lengths tried, bit for bit; softmax of 0, 1, 2, 3 is "
        f"{', '.join(f'{weight:.4f}' for weight in weights.tolist())}; a matrix with {KEPT:.0%} of its tiles reads {read} of {of}"
    )
    chosen = short == [length for length in LENGTHS if length <= flash.FORMS["auto"][0]] and all(row["auto is"] != "neither" for row in rows[:-1])
    return Finding(summary, tuple(rows), close and natural and chosen and read == round(KEPT * of))


def _attended(length: int) -> Row:
    import statistics
    from functools import partial

    import torch

    from lilliput.loops.bench import alternate
    from lilliput.ops import flash

    draw = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, HEADS, length, DIM, generator=draw) for _ in range(3))
    forms = {form: partial(flash.attention, q, k, v, causal=True, form=form) for form in ("tiled", "strip", "partial")}
    exact = flash.reference(q.double(), k.double(), v.double(), causal=True)[0]
    found = {form: attend() for form, attend in forms.items()}
    auto = flash.attention(q, k, v, causal=True)
    times: Row = {f"{form} ms": round(1000 * statistics.median(seconds), 2) for form, seconds in alternate(forms, rounds=5).items()}
    row: Row = {
        "what": f"{length:,} keys", "auto is": next((form for form in ("strip", "tiled") if torch.equal(auto, found[form])), "neither"),
        "error": max(float((o - exact).abs().max()) for o in found.values()),
        "strip, KiB a thread": _scores(q, k, v, "strip")[0] // 1024, "partial, KiB": _scores(q, k, v, "partial")[1] // 1024,
    }
    return row | times


def _scores(q: Tensor, k: Tensor, v: Tensor, form: str) -> tuple[int, int]:
    """Bytes of scores that one causal call holds: (a thread's own rows, all in memory)."""
    import threading

    from lilliput.ops import flash

    found: list[tuple[int, int]] = []

    def call() -> None:  # scratch belongs to the thread that calls: a fresh one has none
        flash.attention(q, k, v, causal=True, form=form)
        found.append(flash.scores())

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return found[0]


def _tiles() -> tuple[int, int, float]:
    """(tiles of a pruned matrix that a product reads, tiles of the whole matrix, largest error against float64 relative to the largest result)."""
    import torch

    from lilliput.ops.sparse import prune_tiles

    draw = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, SIDE, generator=draw) for rows in (SIDE, 8))
    count = SIDE // TILE
    order = torch.randperm(count * count, generator=draw)
    matrix = prune_tiles(weight, (order < round(KEPT * count * count)).view(count, count))
    want = x.double() @ matrix.dense().double().t()
    read = 0
    for block in range(count):
        spoilt = x[:1].clone()
        spoilt[:, TILE * block : TILE * (block + 1)] = float("nan")
        read += int(matrix.product(spoilt).view(count, TILE).isnan().all(1).sum())
    return read, count * count, float((matrix.product(x) - want).abs().max() / want.abs().max())


PAPER = Paper(
    name="et",
    system="E.T.",
    title="E.T.: Re-Thinking Self-Attention for Transformer Models on GPUs",
    authors="Chen et al.",
    year=2021,
    where="SC 2021, doi 10.1145/3458817.3476138",
    claim=(
        "Faster than TensorRT and FasterTransformer on Transformer, BERT-base and DistilBERT; the abstract prints no figure, and none is quoted here "
        "unverified."
    ),
    measured=(
        "three forms of attention are within 1e-5 of float64; at 1,024 keys strips hold 80 KiB of scores and results a thread, the partial form 16,384 KiB of "
        "scores; auto is the strip up to 512 of the lengths tried, bit for bit; softmax of 0, 1, 2, 3 is 0.0321, 0.0871, 0.2369, 0.6439; a matrix with 25% of "
        "its tiles reads 256 of 1024"
    ),
    lacks="pruning of a trained model, in tiles and by rows of its value matrices",
    run=run,
)
