"""FP8: all three matrix products of every linear layer take 8-bit operands, E4M3 for weights and activations, E5M2 for gradients.
Each tensor carries one power-of-two scale from its own largest value, so that rescaling is exact.

Perez et al. 2023, WANT at NeurIPS 2023, arXiv 2309.17224.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="fp8",
    system="FP8",
    title="Training and inference of large language models using 8-bit floating point",
    authors="Perez et al.",
    year=2023,
    where="WANT at NeurIPS 2023, arXiv 2309.17224",
    claim="GPT and Llama 2 models from 111 million to 70 billion parameters keep at least 99.5 % of their FP16 accuracy.",
)
