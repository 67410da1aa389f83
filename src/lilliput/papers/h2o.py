"""H2O: a few tokens gather most of the attention; keep those with the largest accumulated mass beside the most recent ones and
evict the rest, head by head. Costs one running sum for each key; evicted tokens are gone, so prefixes cannot be shared.

The run scores two plays' first 1,024 tokens with a fifth of the cache: what is kept by mass, by age, and everything. Throughput is not in
it (it follows from the sequences that fit, and from the machine): benchmarks/cache_policies.py.

Zhang et al. 2023, NeurIPS 2023, arXiv 2306.14048.
"""

from __future__ import annotations

from lilliput.papers.paper import Finding, Paper

SEGMENT, BUDGET = 1024, 208  # tokens; the budget holds 192 to 208
PLAYS = ("hamlet", "tempest")
POLICIES = ("full", f"heavy_hitter:{BUDGET // 2}+{BUDGET // 2}", f"sinks:4+{BUDGET - 4}", f"sliding:{BUDGET}")


def run() -> Finding:
    """Perplexity of SmolLM2 under four policies at one budget, each segment from an empty cache; about a minute."""
    from lilliput.papers import scored

    rows: list[dict[str, str | int | float]] = []
    texts = [scored.play(name) for name in PLAYS]
    for policy in POLICIES:
        one = scored.engine(policy, SEGMENT + 64)
        found = [value for text in texts for value in scored.logprobs(one, one.tokenizer.encode(text)[:SEGMENT])]
        kept = SEGMENT if policy == "full" else one.policy.size
        rows.append({"policy": policy, "perplexity": round(scored.perplexity(found), 2),
                     "cache, MB": round(kept * one.runner.store.bytes_per_token / 1e6, 2)})  # type: ignore[attr-defined]  # fmt: skip
    full, heavy, sinks, window = (float(row["perplexity"]) for row in rows)
    share = float(rows[1]["cache, MB"]) / float(rows[0]["cache, MB"])
    summary = (
        f"with {share:.0%} of the cache SmolLM2's perplexity on {len(PLAYS)} x {SEGMENT:,} tokens of Shakespeare is {heavy:.2f} ({full:.2f} with all of "
        f"it, {sinks:.2f} with sinks and the most recent, {window:.2f} with the most recent alone)"
    )
    return Finding(summary, tuple(rows), full < heavy < sinks < window and share < 0.21)


PAPER = Paper(
    name="h2o",
    system="H2O",
    title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    authors="Zhang et al.",
    year=2023,
    where="NeurIPS 2023, arXiv 2306.14048",
    claim="With 20 % of the cache, throughput is up to 29x DeepSpeed ZeRO-Inference and Accelerate and 3x FlexGen on OPT-6.7B and OPT-30B.",
    measured=(
        "with 20% of the cache SmolLM2's perplexity on 2 x 1,024 tokens of Shakespeare is 25.26 (23.46 with all of it, 26.44 with sinks and the most "
        "recent, 46.54 with the most recent alone)"
    ),
    switches=("serve.policy=heavy_hitter:128+128",),
    run=run,
)
