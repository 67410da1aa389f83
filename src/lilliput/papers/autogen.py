"""AutoGen: programs are conversations. Agents send, receive and reply by themselves (a model, a tool, code or a human), and the
flow is steered in prose and in Python; a manager picks the speaker of a group.

Wu et al. 2023, arXiv 2308.08155.
"""

from __future__ import annotations

from lilliput.papers.paper import Paper

PAPER = Paper(
    name="autogen",
    system="AutoGen",
    title="AutoGen: Enabling Next-Gen LLM Applications via Multi-Agent Conversation",
    authors="Wu et al.",
    year=2023,
    where="arXiv 2308.08155",
    claim="Two agents solve 69.48 % of the MATH problems, GPT-4 alone 55.18 %.",
)
