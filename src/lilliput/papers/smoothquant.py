"""SmoothQuant: divide each activation channel by s and multiply the weights behind it by s, folded into the norm before, so that
outliers move to where 8 bits can hold them. The product is unchanged; weights and activations both become int8.

Xiao et al. 2023, ICML 2023, arXiv 2211.10438.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="smoothquant",
    system="SmoothQuant",
    title="SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
    authors="Xiao et al.",
    year=2023,
    where="ICML 2023, arXiv 2211.10438",
    claim="8-bit weights and activations take Llama-2-7B's perplexity from 5.474 to 5.515, up to 1.56x faster in half the memory.",
)
