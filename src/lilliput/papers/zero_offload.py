"""ZeRO-Offload: the one cut of the mixed-precision Adam graph that moves only 4 bytes a parameter across the link: fp16 weights,
forward and backward on the device, gradients, master weights and Adam on the host. A one-step delayed update hides the CPU.

Ren et al. 2021, USENIX ATC 2021, arXiv 2101.06840.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="zero-offload",
    system="ZeRO-Offload",
    title="ZeRO-Offload: Democratizing Billion-Scale Model Training",
    authors="Ren et al.",
    year=2021,
    where="USENIX ATC 2021, arXiv 2101.06840",
    claim="13 billion parameters train on one 32 GB V100, where PyTorch reaches 1.4 billion, at 40 TFLOP/s for a model of 10 billion.",
)
