"""DeepSpeed Inference: operators fused wherever tiles do not depend on each other, matrix products made for a handful of rows,
tensor and pipeline parallelism with a token-level schedule, and weights streamed from host memory or NVMe.

Aminabadi et al. 2022, SC 2022, arXiv 2207.00032.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="deepspeed-inference",
    system="DeepSpeed Inference",
    title="DeepSpeed Inference: Enabling Efficient Inference of Transformer Models at Unprecedented Scale",
    authors="Aminabadi et al.",
    year=2022,
    where="SC 2022, arXiv 2207.00032",
    claim="Latency falls up to 6.4x; weight streaming runs models 25x larger than GPU memory alone allows, at 84 TFLOP/s on an A6000 (over half its peak).",
)
