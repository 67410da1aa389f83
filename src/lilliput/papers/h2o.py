"""H2O: a few tokens gather most of the attention; keep those with the largest accumulated mass beside the most recent ones and
evict the rest, head by head. Costs one running sum for each key; evicted tokens are gone, so prefixes cannot be shared.

Zhang et al. 2023, NeurIPS 2023, arXiv 2306.14048.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="h2o",
    system="H2O",
    title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    authors="Zhang et al.",
    year=2023,
    where="NeurIPS 2023, arXiv 2306.14048",
    claim="With 20 % of the cache, throughput is up to 29x DeepSpeed ZeRO-Inference and Accelerate and 3x FlexGen on OPT-6.7B and OPT-30B.",
)
