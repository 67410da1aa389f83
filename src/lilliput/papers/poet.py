"""POET: one mixed-integer program decides for every activation at every step whether it is kept, recomputed or paged to flash,
for the least energy under a memory budget and a deadline, with time and energy of every operation profiled on the device.

Patil et al. 2022, ICML 2022, arXiv 2207.07697.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="poet",
    system="POET",
    title="POET: Training Neural Networks on Tiny Devices with Integrated Rematerialization and Paging",
    authors="Patil et al.",
    year=2022,
    where="ICML 2022, arXiv 2207.07697",
    claim="ResNet-18 and BERT are fine-tuned within the memory of a Cortex-M class device, with less energy than others; the savings are drawn, not printed.",
)
