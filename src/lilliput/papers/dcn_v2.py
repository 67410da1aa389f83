"""DCN V2: cross layers x' = x0 * (W x + b) + x multiply features explicitly up to order L+1, with W full, low-rank or a mixture
of low-rank experts, before or beside a plain deep network.

Wang et al. 2021, WWW 2021, arXiv 2008.13535.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="dcn-v2",
    system="DCN V2",
    title="DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank Systems",
    authors="Wang et al.",
    year=2021,
    where="WWW 2021, arXiv 2008.13535",
    claim="On Criteo the log loss is 0.4406 (AUC 0.8115), against 0.4420 (0.8099) for DCN and 0.4421 (0.8098) for a plain deep network.",
)
