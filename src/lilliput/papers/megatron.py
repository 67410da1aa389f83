"""Megatron-LM: tensor parallelism inside a node (columns, then rows: 2 all-reduces forward, 2 backward a layer), an interleaved
1F1B pipeline across nodes (bubble (p-1)/(v m) of the ideal time), data parallelism over the rest.

Narayanan et al. 2021, SC 2021, arXiv 2104.04473.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="megatron-lm",
    system="Megatron-LM",
    title="Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
    authors="Narayanan et al.",
    year=2021,
    where="SC 2021, arXiv 2104.04473",
    claim="A GPT of 1,008 billion parameters trains on 3,072 A100 at 502 petaFLOP/s, 52 % of peak.",
)
