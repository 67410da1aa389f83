"""E.T.: for short sequences a strip of 16 query rows keeps its scores on chip, scaled before the product; a length threshold picks
the operator. Weights are pruned in 16x16 tiles, the value matrix by rows, so that attention itself shrinks.

Chen et al. 2021, SC 2021, doi 10.1145/3458817.3476138.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

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
)
