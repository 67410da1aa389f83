"""QLoRA: the base model is stored in 4 bits (NF4: 16 quantiles of a normal distribution, one scale per 64 weights, the scales
quantised again: 4.127 bits a weight), gradients reach only LoRA matrices on all linear layers, the optimizer is paged.

Dettmers et al. 2023, NeurIPS 2023, arXiv 2305.14314.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="qlora",
    system="QLoRA",
    title="QLoRA: Efficient Finetuning of Quantized LLMs",
    authors="Dettmers et al.",
    year=2023,
    where="NeurIPS 2023, arXiv 2305.14314",
    claim="A 65-billion-parameter model is fine-tuned in under 48 GB instead of over 780 GB; mean MMLU is 53.1 with 4-bit NF4 and 53.0 in bf16.",
)
