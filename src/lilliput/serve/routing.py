"""Which of several replicas answers a request: the one that has read the longest beginning of it, unless that one has too much to do.

    prefix    the text of a request (of a chat: what does not change when it goes on) in pieces of 128 characters, each known by a digest
              of itself and all before it, as blocks of the cache are (blocks.py); a router has no tokenizer and needs none
    affinity  every replica is remembered with the digests that were sent to it, the latest 4,096 of them
    balance   a replica that has `slack` more requests in flight than the idlest is not chosen for its memory: then the idlest is

A conversation so stays where its keys and values are; a system message that all share is computed once on each replica that it reaches, and
load decides between those. Costs microseconds a request. The same idea as Ray's PrefixCacheAffinityRouter and SGLang's cache-aware router.

Plain Python: nothing of HTTP, nothing of Ray.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

PIECE = 128  # characters
MOST_PIECES = 256  # of one request: what lies behind says nothing about where it belongs
REMEMBERED = 4096  # digests a replica
SLACK = 4  # requests in flight


def text_of(body: Mapping[str, Any]) -> str:
    """What a request's keys and values depend on first, as text: the model, the instructions and tools, then messages or the prompt in order."""
    parts = [str(body.get("model") or ""), str(body.get("instructions") or ""), str(body.get("tools") or "")]
    for name in ("messages", "input", "prompt"):
        value = body.get(name)
        if isinstance(value, str):
            parts.append(value)
        elif isinstance(value, Sequence):
            parts += [f"{item.get('role', '')}\n{item.get('content', '')}" if isinstance(item, Mapping) else str(item) for item in value]
    return "\0".join(parts)


def digests(text: str) -> list[bytes]:
    """One for each whole piece of the text, each of all before it."""
    found: list[bytes] = []
    before = b""
    for start in range(0, min(len(text) - len(text) % PIECE, PIECE * MOST_PIECES), PIECE):
        before = blake2b(text[start : start + PIECE].encode("utf-8", "surrogatepass"), digest_size=16, key=before).digest()
        found.append(before)
    return found


class Affinity:
    """What each replica has read."""

    def __init__(self, slack: int = SLACK, remembered: int = REMEMBERED) -> None:
        """`slack`: requests in flight that a replica may have above the idlest and still be chosen; `remembered`: digests a replica."""
        self.slack, self.remembered = slack, remembered
        self._read: dict[str, OrderedDict[bytes, None]] = {}

    def order(self, keys: Sequence[bytes], loads: Mapping[str, int]) -> list[str]:
        """The replicas (name -> requests in flight), whom to ask first first."""
        least = min(loads.values(), default=0)

        def rank(name: str) -> tuple[int, int, int, str]:  # of equally idle ones the one that has read least: conversations spread over the caches
            memory = self.match(name, keys) if loads[name] - least <= self.slack else 0
            return -memory, loads[name], len(self._read.get(name, ())), name

        return sorted(loads, key=rank)

    def match(self, name: str, keys: Sequence[bytes]) -> int:
        """Pieces of the beginning that a replica has read."""
        read = self._read.get(name, OrderedDict())
        return next((at for at, key in enumerate(keys) if key not in read), len(keys))

    def sent(self, name: str, keys: Sequence[bytes]) -> None:
        """A request went to a replica."""
        read = self._read.setdefault(name, OrderedDict())
        for key in reversed(keys):  # the beginning is forgotten last
            read[key] = None
            read.move_to_end(key)
        while len(read) > self.remembered:
            read.popitem(last=False)

    def keep(self, names: Sequence[str]) -> None:
        """These replicas are there; what others had read is gone with them."""
        self._read = {name: read for name, read in self._read.items() if name in names}
