"""transformers as a worker: the same weights in its own model, eager, fp32, in a process of its own.

    PYTHON -m lilliput.loops.peers.transformers_worker MODEL THREADS      then {"batch": B, "steps": N} or {"prefill": T}, one a line, on stdin
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


class Server:
    """transformers' model of a Lilliput checkpoint, in memory."""

    def __init__(self, name: str, threads: int) -> None:
        import torch
        import transformers

        from lilliput.models import families, hub
        from lilliput.models.checkpoints import open_checkpoint

        torch.set_num_threads(threads)
        checkpoint = open_checkpoint(hub.locate(name))
        words = families.hf_from_spec(checkpoint.spec)
        config = transformers.AutoConfig.for_model(**words)
        self.model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self.model.load_state_dict(dict(families.from_canonical(checkpoint.spec, checkpoint.read)), strict=False)
        self.model.tie_weights()

    def decode(self, batch: int, steps: int, context: int = 32) -> float:
        """Tokens a second of `steps` greedy steps of `batch` sequences that begin with `context` tokens."""
        import torch

        with torch.inference_mode():
            out = self.model(torch.arange(1000, 1000 + context).repeat(batch, 1), use_cache=True, logits_to_keep=1)
            start = time.perf_counter()
            for _ in range(steps):
                out = self.model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
            return batch * steps / (time.perf_counter() - start)

    def prefill(self, tokens: int) -> float:
        """Tokens a second of one prompt."""
        import torch

        with torch.inference_mode():
            start = time.perf_counter()
            self.model(torch.arange(1000, 1000 + tokens)[None], use_cache=True, logits_to_keep=1)
            return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    server = Server(sys.argv[1], int(sys.argv[2]))
    os.write(1, b'{"ready": true}\n')
    for line in sys.stdin:
        asked = json.loads(line)
        rate = server.prefill(asked["prefill"]) if "prefill" in asked else server.decode(asked["batch"], asked["steps"])
        os.write(1, (json.dumps({"rate": rate}) + "\n").encode())
