"""PETAL: all attention projections of a frozen vision-language model share one low-rank tensor factorisation and differ in one
vector each; a mixture of small experts enriches the instruction embedding.

Zhai et al. 2023, arXiv 2312.12458.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="petal",
    system="PETAL",
    title="When Parameter-efficient Tuning Meets General-purpose Vision-language Models",
    authors="Zhai et al.",
    year=2023,
    where="arXiv 2312.12458",
    claim="Tuning 0.5 % of the parameters beats other efficient methods in most of five multimodal benchmarks and even full fine-tuning.",
)
