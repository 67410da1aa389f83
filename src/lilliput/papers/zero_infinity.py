"""ZeRO-Infinity: every state of ZeRO-3 may lie on the device, the host or NVMe; a prefetcher overlaps disk, link and compute,
every parameter is split over all ranks so that their links add up, and big layers run as a sequence of tiles.

Rajbhandari et al. 2021, SC 2021, arXiv 2104.07857.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="zero-infinity",
    system="ZeRO-Infinity",
    title="ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning",
    authors="Rajbhandari et al.",
    year=2021,
    where="SC 2021, arXiv 2104.07857",
    claim="32 trillion parameters fit on 32 DGX-2 nodes (512 V100), 50x what 3D parallelism holds, at over 25 petaFLOP/s.",
)
