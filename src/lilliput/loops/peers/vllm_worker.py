"""vLLM on CPUs as a worker: runs under the Python of an environment that has it, knows nothing of Lilliput.

    PYTHON vllm_worker.py serve MODEL_FOLDER DTYPE      then {"batch": B, "steps": N} or {"prefill": T}, one a line, on stdin

Rates come from the difference of a long and a short answer, so that a request's own cost is not counted against its tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


class Server:
    """One engine in this process."""

    def __init__(self, folder: str, dtype: str) -> None:
        from vllm import LLM

        self.engine = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=4096, max_num_seqs=64, disable_log_stats=True, enable_prefix_caching=False)

    def seconds(self, prompts: int, tokens: int, new: int) -> float:
        """Wall time of answers of `new` tokens to `prompts` prompts of `tokens`."""
        from vllm import SamplingParams

        texts: Any = [{"prompt_token_ids": [1000 + i for i in range(tokens)]} for _ in range(prompts)]
        start = time.perf_counter()
        self.engine.generate(texts, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - start

    def decode(self, batch: int, steps: int) -> float:
        """Tokens a second of decoding."""
        return batch * steps / (self.seconds(batch, 32, steps + 1) - self.seconds(batch, 32, 1))

    def prefill(self, tokens: int) -> float:
        """Tokens a second of one prompt."""
        return tokens / self.seconds(1, tokens, 1)


if __name__ == "__main__":
    pipe = os.dup(1)
    os.dup2(2, 1)  # vLLM talks on stdout
    server = Server(sys.argv[2], sys.argv[3])
    server.seconds(1, 32, 2)
    os.write(pipe, b'{"ready": true}\n')
    for line in sys.stdin:
        asked = json.loads(line)
        rate = server.prefill(asked["prefill"]) if "prefill" in asked else server.decode(asked["batch"], asked["steps"])
        os.write(pipe, (json.dumps({"rate": rate}) + "\n").encode())
