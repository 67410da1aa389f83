"""GPTQ: quantise a weight matrix column by column and push each column's error into the columns not yet done, through the inverse
Hessian of the layer's own inputs (one Cholesky factor, blocks of 128 columns).

Frantar et al. 2023, ICLR 2023, arXiv 2210.17323.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="gptq",
    system="GPTQ",
    title="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    authors="Frantar et al.",
    year=2023,
    where="ICLR 2023, arXiv 2210.17323",
    claim="OPT-175B goes to 4 bits in 4.2 hours on one A100, its WikiText-2 perplexity from 8.34 to 8.37; decoding is 3.25x faster on A100 at 3 bits.",
)
