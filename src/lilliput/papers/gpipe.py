"""GPipe: cut a chain of layers into K stages and a batch into M micro-batches; all of them use the same weights, and the
summed gradient is applied once. Bubble (K-1)/(M+K-1) of the time, small from M = 4K on. Stages keep only their inputs.

Huang et al. 2019, NeurIPS 2019, arXiv 1811.06965.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="gpipe",
    system="GPipe",
    title="GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism",
    authors="Huang et al.",
    year=2019,
    where="NeurIPS 2019, arXiv 1811.06965",
    claim=(
        "With 32 micro-batches a Transformer on 2, 4 and 8 partitions runs 1.8, 3.4 and 6.3 times as fast as 2 partitions without micro-batches; 128 "
        "partitions hold 83.9 billion parameters."
    ),
)
