"""Padding-free against padded: a BERT-base-shaped encoder over batches whose lengths average a share of the longest.

    make bench X=packed_vs_padded            (ARGS="--layers 2 --batch 16 --rounds 5" by default)

Sides, in turns: ours packed; the same weights padded in plain torch; transformers' BertModel (sdpa) with an attention mask. All blocks
are alike, so few layers show what twelve would. Lengths are spread evenly around the mean, the longest is S. The second table times
ours for several shares at one S: a straight line (R2) means that padding costs nothing.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import transformers

from lilliput.base import hardware
from lilliput.base.show import Show
from lilliput.loops.bench import alternate, machine, ratio
from lilliput.models.encoder import Encoder, EncoderSpec, load_encoder
from lilliput.ops import native


def lengths(batch: int, longest: int, share: float) -> torch.Tensor:
    """Evenly spread lengths with the wanted mean; one is `longest`."""
    low = max(1.0, (2 * share - 1) * longest)
    spread = torch.linspace(low, longest, batch)
    return (spread * (share * longest * batch / spread.sum())).round().clamp(1, longest).long().index_fill(0, torch.tensor([batch - 1]), longest)


def batch_of(batch: int, longest: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and their mask."""
    mask = torch.arange(longest)[None] < lengths(batch, longest, share)[:, None]
    return torch.randint(0, 1000, mask.shape), mask.long()


def compare(ours: Encoder, theirs: torch.nn.Module, batch: int, longest: int, share: float, rounds: int) -> dict[str, object]:
    """One row: milliseconds of the three sides, ratios, and the largest difference on valid rows."""
    tokens, mask = batch_of(batch, longest, share)
    sides = {
        "packed": lambda: ours(tokens, mask),
        "padded": lambda: ours.padded(tokens, mask),
        "transformers": lambda: theirs(tokens, mask).last_hidden_state,
    }
    with torch.inference_mode():
        valid = mask.bool()
        apart = max(float((sides["packed"]()[valid] - sides[name]()[valid]).abs().max()) for name in ("padded", "transformers"))
        times = alternate(sides, rounds)
    row: dict[str, object] = {"S": longest, "mean / S": round(float(valid.float().mean()), 3)}
    row |= {f"{name} (ms)": round(1e3 * statistics.median(t), 1) for name, t in times.items()}
    return row | {f"x {name}": round(ratio(times, "packed", name), 2) for name in ("padded", "transformers")} | {"largest difference": f"{apart:.1e}"}


def line(ours: Encoder, batch: int, longest: int, rounds: int) -> tuple[list[dict[str, object]], float]:
    """Time for several shares, and R2 of the straight line through it."""
    shares, seconds = (0.2, 0.4, 0.6, 0.8, 1.0), []
    batches = {str(share): batch_of(batch, longest, share) for share in shares}
    with torch.inference_mode():
        times = alternate({name: (lambda b=b: ours(*b)) for name, b in batches.items()}, rounds)
    filled = [float(batches[str(share)][1].float().mean()) for share in shares]
    seconds = [statistics.median(times[str(share)]) for share in shares]
    fit = statistics.linear_regression(filled, seconds)
    errors = sum((s - fit.intercept - fit.slope * f) ** 2 for f, s in zip(filled, seconds))
    mean = statistics.fmean(seconds)
    rows = [{"mean / S": round(f, 3), "ms": round(1e3 * s, 1)} for f, s in zip(filled, seconds)]
    return rows, 1 - errors / sum((s - mean) ** 2 for s in seconds)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    show, threads = Show(), hardware.cpus()
    torch.set_num_threads(threads)
    native.threads(threads)
    torch.manual_seed(0)
    import tempfile

    config = transformers.BertConfig(num_hidden_layers=options.layers, max_position_embeddings=max(options.tokens))
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_encoder(folder)
    assert isinstance(ours.spec, EncoderSpec), "a folder of BERT gives an encoder"
    show.line(", ".join(f"{key} {value}" for key, value in machine().items()))
    rows = [compare(ours, theirs, options.batch, tokens, options.share, options.rounds) for tokens in options.tokens]
    show.table(rows, list(rows[0]), f"BERT-base shape, {options.layers} layers, batch {options.batch}")
    shares, fit = line(ours, options.batch, 256, options.rounds)
    show.table(shares, list(shares[0]), f"time against the share of valid rows, S = 256: R2 = {fit:.4f}")


if __name__ == "__main__":
    main()
