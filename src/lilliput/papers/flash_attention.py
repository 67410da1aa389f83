"""FlashAttention-2: softmax(Q K^T) V block by block with a running maximum and sum, divided once at the end; only the output and
one log-sum a row are kept, so memory is O(S). Causal blocks above the diagonal are skipped. Same numbers as plain attention.

Dao 2023, ICLR 2024, arXiv 2307.08691.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="flashattention-2",
    system="FlashAttention-2",
    title="FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
    authors="Dao",
    year=2023,
    where="ICLR 2024, arXiv 2307.08691",
    claim="About 2x the speed of FlashAttention, 50-73 % of an A100's peak; GPT models train at up to 225 TFLOP/s on each A100 (72 % utilisation).",
)
