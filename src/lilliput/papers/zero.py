"""ZeRO: each data-parallel rank keeps 1/N of the optimizer (stage 1), gradients (2) and parameters (3): 16 bytes a parameter
fall to 16/N. Stages 1-2 move the bytes of an all-reduce, stage 3 half as many again.

Rajbhandari et al. 2020, SC 2020, arXiv 1910.02054.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="zero",
    system="ZeRO",
    title="ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
    authors="Rajbhandari et al.",
    year=2020,
    where="SC 2020, arXiv 1910.02054",
    claim="The model states of 7.5 billion parameters take 120 GB on every GPU; on 64 of them stages 1, 2 and 3 leave 31.4, 16.6 and 1.9 GB.",
)
