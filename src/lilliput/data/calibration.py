"""Calibration batches: a few hundred rows of ordinary text that post-training compression looks at.

GPTQ, SmoothQuant, Wanda and the like estimate each layer's inputs from them; 128 rows of 2,048 tokens are usual
(Frantar et al. 2022, arXiv 2210.17323, section 5). Rows are drawn without overlap, so none counts twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lilliput.base import seeds
from lilliput.base.errors import UserError
from lilliput.data.sources import expand
from lilliput.data.text import read_tokens
from lilliput.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


def calibration_batches(source: str | Path | Sequence[str | Path] | np.ndarray, tokenizer: Tokenizer, sequences: int, length: int, seed: int) -> list[Tensor]:
    """`sequences` tensors tokens_BT of shape [1, length], int64, from text files or from tokens_N; the seed picks which rows.

    UserError when the text has fewer rows.
    """
    import torch

    tokens_N = source if isinstance(source, np.ndarray) else read_tokens(expand(source), tokenizer)
    rows = len(tokens_N) // length
    if rows < sequences:
        why = f"{len(tokens_N)} tokens give {rows} rows of {length}"
        raise UserError(f"too little text for {sequences} calibration rows", why, f"{rows} rows, or rows of {max(1, len(tokens_N) // sequences)} tokens")
    generator = np.random.Generator(np.random.Philox(key=seeds.key(seed, "calibration")))
    chosen = generator.permutation(rows)[:sequences]
    return [torch.from_numpy(tokens_N[row * length : (row + 1) * length].astype(np.int64))[None] for row in chosen]
