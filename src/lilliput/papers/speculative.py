"""Speculative decoding: a small model drafts g tokens, one pass of the large one accepts a prefix of them and resamples the first
rejected from the difference, which leaves the output distribution unchanged. (1 - a^(g+1)) / (1 - a) tokens a pass.

The run counts passes: greedily with prompt lookup against none, and sampled with a small model that guesses, where tokens a pass are held
against the formula (it takes acceptance at one place to be independent of that at another). Times: benchmarks/speculation.py.

Leviathan et al. 2023, ICML 2023, arXiv 2211.17192, sections 2 and 3, table 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lilliput.papers.paper import Finding, Paper

if TYPE_CHECKING:
    from lilliput.serve.engine import Engine

GUESSES, NEW = 4, 96
PROMPTS = ("The king", "O my lord, I", "Come, come, and", "What is the")
DRAWN, SAMPLED = 16, 160  # answers that are sampled, and tokens of each
TABLE_1 = ((0.6, 2, 1.53, 1.96), (0.7, 3, 1.58, 2.53), (0.8, 2, 1.23, 2.44), (0.8, 5, 1.63, 3.69), (0.9, 2, 1.11, 2.71), (0.9, 10, 1.60, 6.86))
Row = dict[str, str | int | float]


def run() -> Finding:
    """Greedy answers with and without prompt lookup, sampled ones with a model that guesses, the paper's table 1; passes are counted. About 20 s."""
    from lilliput.models.load import load_model
    from lilliput.serve import speculative

    model, tokenizer, _ = load_model("lilliput-tiny", "cpu")
    guesser, _, _ = load_model("lilliput-tiny-draft", "cpu")
    rows = [_greedy(model, tokenizer, prompt) for prompt in PROMPTS]
    same, fewer = all(row["same tokens"] == "yes" for row in rows), sum(int(row["passes without"]) for row in rows) / sum(int(row["passes"]) for row in rows)
    drawn = [_sampled(model, tokenizer, guesser, gamma) for gamma in (2, GUESSES)]
    off = max(abs(float(row["tokens a pass"]) / float(row["formula"]) - 1) for row, _ in drawn)
    alpha, cost = drawn[-1][1], sum(p.numel() for p in guesser.parameters()) / sum(p.numel() for p in model.parameters())
    table = [(a, g, round(speculative.operations(a, g, 0), 2), round(speculative.speedup(a, g, 0), 2)) for a, g, _, _ in TABLE_1]
    for found, published in zip(table, TABLE_1, strict=True):
        rows.append(_row(f"table 1: a = {found[0]}, g = {found[1]}", **{"tokens a pass": published[3], "formula": found[3]}))
    rows += [row for row, _ in drawn]
    summary = (
        f"with prompt lookup the shipped model's greedy answers are {'the same tokens' if same else 'NOT the same tokens'} in {fewer:.1f} times fewer "
        f"passes; sampled with guesses of a model of {cost:.2f} its size, {alpha:.2f} are accepted and tokens a pass are within {off:.1%} of "
        f"(1 - a^(g + 1)) / (1 - a); the formula would have {speculative.best_gamma(alpha, cost)} guesses there; the "
        f"paper's table 1 is {'met' if table == list(TABLE_1) else 'NOT met'}"
    )
    return Finding(summary, tuple(rows), same and fewer > 1.2 and off < 0.03 and table == list(TABLE_1))


def _row(what: str, **found: str | int | float) -> Row:
    return {"what": what, "passes without": "", "passes": "", "guessed": "", "accepted": "", "tokens a pass": "", "formula": "", "same tokens": ""} | found


def _greedy(model: Any, tokenizer: Any, prompt: str) -> Row:
    """Always four guesses by prompt lookup, against none."""
    from lilliput.serve.engine import Engine
    from lilliput.serve.request import Sampling

    plain, guessing = Engine(model, tokenizer, kv_tokens=256), Engine(model, tokenizer, kv_tokens=256, draft="ngram")
    _always(guessing, GUESSES)
    said = [engine.generate([prompt], Sampling(NEW, ignore_eos=True))[0].tokens for engine in (plain, guessing)]
    stats = guessing.stats()
    return _row(prompt, **{"passes without": plain.stats().steps, "passes": stats.steps, "guessed": stats.drafted, "accepted": stats.accepted,
                           "tokens a pass": round(stats.generated / stats.steps, 2), "same tokens": "yes" if said[0] == said[1] else "NO"})  # fmt: skip


def _sampled(model: Any, tokenizer: Any, guesser: Any, gamma: int) -> tuple[Row, float]:
    """A row, and the share of guesses that are accepted where all before them were; of passes with `gamma` guesses (an answer's last have fewer)."""
    from lilliput.serve.engine import Engine
    from lilliput.serve.request import Sampling
    from lilliput.serve.speculative import expected_tokens

    engine, seen = Engine(model, tokenizer, kv_tokens=DRAWN * 256, draft=guesser), list[int]()
    assert engine.guesses is not None, "a drafter was asked for"
    _always(engine, gamma)
    engine.guesses.control.observe = lambda proposed, accepted: seen.extend([accepted] * (proposed == gamma))  # type: ignore[method-assign]
    for number in range(DRAWN):
        engine.add(tokenizer.encode(PROMPTS[number % len(PROMPTS)], special=True), Sampling(SAMPLED, temperature=1.0, seed=number, ignore_eos=True))
    while engine.busy:
        engine.step()
    alpha = sum(seen) / sum(min(accepted + 1, gamma) for accepted in seen)
    return _row(f"{DRAWN} sampled answers, g = {gamma}, a = {alpha:.3f}", **{
        "passes": len(seen), "guessed": gamma * len(seen), "accepted": sum(seen), "tokens a pass": round(1 + sum(seen) / len(seen), 3),
        "formula": round(expected_tokens(alpha, gamma), 3)}), alpha  # fmt: skip


def _always(engine: Engine, gamma: int) -> None:
    assert engine.guesses is not None, "a drafter was asked for"
    engine.guesses.control.fixed = gamma


PAPER = Paper(
    name="speculative-decoding",
    system="speculative decoding",
    title="Fast Inference from Transformers via Speculative Decoding",
    authors="Leviathan et al.",
    year=2023,
    where="ICML 2023, arXiv 2211.17192",
    claim="T5-XXL (11 billion) translates 3.4x faster greedily and 2.6x faster sampled, with identical outputs.",
    measured=(
        "with prompt lookup the shipped model's greedy answers are the same tokens in 1.6 times fewer passes; sampled with guesses of a model of 0.25 its "
        "size, 0.66 are accepted and tokens a pass are within 1.3% of (1 - a^(g + 1)) / (1 - a); the formula would have 2 guesses "
        "there; the paper's table 1 is met"
    ),
    switches=("serve.draft=ngram",),
    run=run,
)
