"""Which tokens stay in the cache."""

from __future__ import annotations

from lilliput.base.errors import UserError

BLOCK = 16  # tokens leave in whole blocks


def sizes(argument: str, name: str, usual: str, count: int) -> list[int]:
    """The numbers of "4+252" (`usual` where nothing is asked). UserError unless there are `count`, with a sum of whole blocks and two at least."""
    words = (argument or usual).split("+")
    if len(words) != count or not all(word.isdigit() for word in words):
        raise UserError(f"policy={name}:{argument} names no sizes", f"it takes {count} number{'s' * (count > 1)}", f"policy={name}:{usual}")
    numbers = [int(word) for word in words]
    total = sum(numbers)
    if total % BLOCK or total < 2 * BLOCK:
        whole = max(2 * BLOCK, -(-total // BLOCK) * BLOCK)
        fix = f"policy={name}:" + "+".join([*words[:-1], str(numbers[-1] + whole - total)])
        raise UserError(f"policy={name}:{argument} holds {total} tokens", f"tokens leave in blocks of {BLOCK}, and two must stay", fix)
    return numbers
