"""FlexGen: weights, cache and activations are placed on device, host and disk by a linear program over a cost model; a block of
batches shares each layer that is loaded, within 2x of the least possible traffic; weights and cache may be 4-bit.

Sheng et al. 2023, ICML 2023, arXiv 2303.06865.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="flexgen",
    system="FlexGen",
    title="FlexGen: High-Throughput Generative Inference of Large Language Models with a Single GPU",
    authors="Sheng et al.",
    year=2023,
    where="ICML 2023, arXiv 2303.06865",
    claim="OPT-175B generates 1.12 tokens/s on one 16 GB T4 at an effective batch of 144.",
)
