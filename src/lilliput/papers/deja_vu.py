"""Deja Vu: for each token small predictors name, one layer ahead, the heads and neurons that matter, and only those are read.
Needs models whose MLPs are truly sparse (ReLU); at batch > 1 the union of the sets is read.

Liu et al. 2023, ICML 2023, arXiv 2310.17157.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="deja-vu",
    system="Deja Vu",
    title="Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time",
    authors="Liu et al.",
    year=2023,
    where="ICML 2023, arXiv 2310.17157",
    claim=(
        "OPT-175B decodes over 2x faster than FasterTransformer and over 6x faster than Hugging Face at batch 1, with no loss of quality down to a "
        "quarter of the parameters."
    ),
)
