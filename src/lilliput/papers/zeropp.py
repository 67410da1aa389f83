"""ZeRO++: stage 3 with int8 weights on the wire (qwZ), a second copy of the weights inside each node (hpZ) and an int4
all-to-all for gradients (qgZ). Costs 2/P of the parameters as memory, P being the GPUs of a node.

Wang et al. 2024, ICLR 2024, arXiv 2306.10209.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="zero++",
    system="ZeRO++",
    title="ZeRO++: Extremely Efficient Collective Communication for Giant Model Training",
    authors="Wang et al.",
    year=2024,
    where="ICLR 2024, arXiv 2306.10209",
    claim="Traffic between nodes falls 4x, from 3 to 0.75 times the model, for up to 2.16x the throughput on 384 GPUs.",
)
