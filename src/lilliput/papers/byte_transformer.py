"""ByteTransformer: padding is removed once by a prefix sum over the mask, every matrix product runs on packed rows, and attention
works on the true lengths. With average/maximum length a, products cost a and attention a^2 of the padded batch.

Zhai et al. 2023, IPDPS 2023, arXiv 2210.03052.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="bytetransformer",
    system="ByteTransformer",
    title="ByteTransformer: A High-Performance Transformer Boosted for Variable-Length Inputs",
    authors="Zhai et al.",
    year=2023,
    where="IPDPS 2023, arXiv 2210.03052",
    claim=(
        "BERT on inputs of mixed length runs 87, 131, 138, 74 and 55 % faster than on PyTorch JIT, TensorFlow XLA, TurboTransformer, DeepSpeed-"
        "Inference and FasterTransformer."
    ),
)
