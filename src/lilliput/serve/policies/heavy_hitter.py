"""Heavy hitters: of all keys, those that have drawn the most attention so far stay, and the most recent ones; each head has its own.

The score of a key is the probability it got, summed over all queries since it came and over the query heads of its group. When the cache is
full, the lowest scores among those that are not recent leave, and with them their scores. Greedy eviction by what was seen is near-optimal
under the paper's assumptions; one fifth of the cache loses little where a few keys get most of the attention.

"heavy_hitter:104+104" holds at most 208 tokens: 104 heavy, 104 recent, in whole blocks of 16 (16 leave at a time, so between 192 and 208 at
any time). The scores come from the attention kernel of the native runner. Not with kv=int4, where two tokens share a byte.

Zhang et al. 2023 (H2O), arXiv 2306.14048, sections 4.1 and 4.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lilliput.serve.policies import Bounded

if TYPE_CHECKING:
    from torch import Tensor


class HeavyHitter(Bounded):
    """H heavy and R recent tokens a head."""

    name, usual = "heavy_hitter", "128+128"
    wants_mass = True

    def keep(self, count: int, mass_LGT: Tensor | None, positions_LGT: Tensor | None) -> Tensor:
        """The R most recent places of each head and the heaviest of the others."""
        assert mass_LGT is not None and positions_LGT is not None, "heavy hitters are chosen by mass"
        recent = min(self.sizes[1], count)
        newest_LG1 = positions_LGT.amax(-1, keepdim=True)
        score_LGT = mass_LGT.masked_fill(positions_LGT > newest_LG1 - recent, float("inf"))  # positions of recent tokens have no gaps
        return score_LGT.topk(count, -1).indices.sort(-1).values
