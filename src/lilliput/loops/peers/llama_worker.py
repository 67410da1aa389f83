"""llama.cpp as a worker: runs under the Python of an environment that has llama-cpp-python, knows nothing of Lilliput.

    PYTHON llama_worker.py quantize SOURCE.gguf TARGET.gguf Q4_0      a GGUF of another type (requantising is allowed: for speed only)
    PYTHON llama_worker.py serve MODEL.gguf THREADS                   then {"batch": B, "steps": N} or {"prefill": T}, one a line, on stdin

Decoding B sequences at once goes through llama_batch with B sequence ids; a prompt is one llama_decode. The largest logit is found
by numpy in llama.cpp's own memory: no sampler chain, nothing between us and its kernels.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any

import llama_cpp as ll
import numpy as np

TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}
SEQUENCES, CONTEXT = 64, 64 * 256


def quantize(source: str, target: str, kind: str) -> None:
    """Write `source` as a GGUF of another type."""
    params = ll.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = TYPES[kind], True, 2
    if ll.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp could not quantise {source} to {kind}")


class Server:
    """One model with a unified cache for 64 sequences."""

    def __init__(self, path: str, threads: int) -> None:
        ll.llama_backend_init()
        self.model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max, params.kv_unified = CONTEXT, 2048, 512, SEQUENCES, True
        params.n_threads = params.n_threads_batch = threads
        self.context: Any = ll.llama_init_from_model(self.model, params)
        self.memory = ll.llama_get_memory(self.context)
        self.batch: Any = ll.llama_batch_init(2048, 0, 1)
        self.vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))

    def run(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """One decode of (token, position, sequence, whether its logits are wanted) rows."""
        self.batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i] = token, position, 1
            self.batch.seq_id[i][0], self.batch.logits[i] = sequence, wanted
        if ll.llama_decode(self.context, self.batch):
            sys.exit("llama_decode failed")

    def greedy(self, row: int) -> int:
        """The largest logit of a row."""
        return int(np.ctypeslib.as_array(ll.llama_get_logits_ith(self.context, row), (self.vocab,)).argmax())

    def decode(self, batch: int, steps: int, context: int = 32) -> float:
        """Tokens a second of `steps` greedy steps of `batch` sequences that begin with `context` tokens."""
        ll.llama_memory_clear(self.memory, True)
        for sequence in range(batch):
            self.run([(1000 + i, i, sequence, i == context - 1) for i in range(context)])
        tokens = [1000] * batch
        start = time.perf_counter()
        for step in range(steps):
            self.run([(token, context + step, sequence, True) for sequence, token in enumerate(tokens)])
            tokens = [self.greedy(row) for row in range(batch)]
        return batch * steps / (time.perf_counter() - start)

    def prefill(self, tokens: int) -> float:
        """Tokens a second of one prompt."""
        ll.llama_memory_clear(self.memory, True)
        start = time.perf_counter()
        self.run([(1000 + i, i, 0, i == tokens - 1) for i in range(tokens)])
        self.greedy(tokens - 1)
        return tokens / (time.perf_counter() - start)


def answer(value: dict[str, Any]) -> None:
    """One line to whoever started us."""
    os.write(1, (json.dumps(value) + "\n").encode())


if __name__ == "__main__":
    silent = ll.llama_log_callback(lambda level, text, data: None)  # held: the library keeps a pointer to it
    ll.llama_log_set(silent, ctypes.c_void_p(0))
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:5])
    else:
        server = Server(sys.argv[2], int(sys.argv[3]))
        answer({"ready": True})
        for line in sys.stdin:
            asked = json.loads(line)
            answer({"rate": server.prefill(asked["prefill"]) if "prefill" in asked else server.decode(asked["batch"], asked["steps"])})
