"""StreamingLLM: the first few tokens soak up attention that has nowhere to go; keep them (sinks) beside a rolling window, give
positions inside the cache, and a model runs for ever at constant memory. It does not lengthen what the model can see.

The run streams more tokens than the model's context through 256 tokens of cache, with four sinks and without, and computes the window
anew at some places. A hundred thousand tokens, and what a token costs: benchmarks/cache_policies.py.

Xiao et al. 2024, ICLR 2024, arXiv 2309.17453.
"""

from __future__ import annotations

from lilliput.papers.paper import Finding, Paper

TOKENS, STRETCH, SIZE, PLACES = 10_240, 2048, 256, 24
PLAY = "hamlet"


def run() -> Finding:
    """Perplexity of each stretch of Hamlet, and of the window computed anew at places of it; about a minute."""
    import torch

    from lilliput.papers import scored

    sides = {policy: scored.engine(policy, SIZE) for policy in (f"sinks:4+{SIZE - 4}", f"sinks:0+{SIZE}")}
    again = scored.engine("full", SIZE)
    ids = again.tokenizer.encode(scored.play(PLAY))[:TOKENS]
    found = {policy: scored.logprobs(one, ids) for policy, one in sides.items()}
    rows: list[dict[str, str | int | float]] = []
    for first in range(0, TOKENS, STRETCH):
        start = max(SIZE, first)
        places = [start + i * (first + STRETCH - start) // PLACES for i in range(PLACES)]
        windows = torch.tensor([ids[at - SIZE + 8 : at] for at in places])  # 248 tokens: what the cache holds on average
        with torch.inference_mode():
            logits = again.model.head(again.model.hidden(windows)[:, -1])
        anew = logits.log_softmax(-1)[torch.arange(PLACES), torch.tensor([ids[at] for at in places])].tolist()
        row: dict[str, str | int | float] = {"tokens": f"{first:,}-{first + STRETCH:,}"}
        row |= {policy: round(scored.perplexity(values[first : first + STRETCH]), 2) for policy, values in found.items()}
        for policy, values in found.items():
            row[f"{policy} / anew"] = round(scored.perplexity([values[at - 1] for at in places]) / scored.perplexity(anew), 3)
        rows.append(row)
    whole = [scored.perplexity(values) for values in found.values()]
    ratios = [float(row[f"sinks:4+{SIZE - 4} / anew"]) for row in rows]
    summary = (
        f"over {TOKENS:,} tokens of Hamlet (the context is {again.context:,}) SmolLM2's perplexity in {SIZE} tokens of cache is {whole[0]:.1f} with 4 "
        f"sinks and {whole[1]:.1f} without; against the window computed anew it is {min(ratios):.2f} to {max(ratios):.2f} in stretches of {STRETCH:,}"
    )
    holds = whole[1] > 1.5 * whole[0] and all(0.85 < ratio < 1.15 for ratio in ratios) and len(ids) > again.context
    return Finding(summary, tuple(rows), holds)


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
    measured=(
        "over 10,240 tokens of Hamlet (the context is 8,192) SmolLM2's perplexity in 256 tokens of cache is 39.0 with 4 sinks and 80.9 without; against the "
        "window computed anew it is 0.99 to 1.07 in stretches of 2,048"
    ),
    switches=("serve.policy=sinks:4+252",),
    run=run,
)
