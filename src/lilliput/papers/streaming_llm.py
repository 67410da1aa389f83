"""StreamingLLM: the first few tokens soak up attention that has nowhere to go; keep them (sinks) beside a rolling window, give
positions inside the cache, and a model runs for ever at constant memory. It does not lengthen what the model can see.

Xiao et al. 2024, ICLR 2024, arXiv 2309.17453.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="streamingllm",
    system="StreamingLLM",
    title="Efficient Streaming Language Models with Attention Sinks",
    authors="Xiao et al.",
    year=2024,
    where="ICLR 2024, arXiv 2309.17453",
    claim=(
        "Llama-2-13B's perplexity on PG19 is 5,158 with a window of 1,024 and 5.40 with 4 sinks and 1,020; up to 22.2x faster than recomputing the "
        "window, steady over 4 million tokens."
    ),
)
