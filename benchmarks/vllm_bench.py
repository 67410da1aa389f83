"""vLLM's own load client, unmodified (`vllm bench serve`), against our server and any others that speak OpenAI's API.

    make bench X=vllm_bench ARGS="--vllm VENV/bin/vllm --tokenizer FOLDER --ours smollm2-135m,serve.kv=fp16"
    make bench X=vllm_bench ARGS="--vllm VENV/bin/vllm --tokenizer FOLDER --peer llama.cpp=http://127.0.0.1:8002,NAME"

Random prompts of --input tokens, answers of --output (ignore_eos), at most 1, 4 and 16 at once, other prompts in each run; a warm-up request for each
client before. How peers are started: serve_peers. `vllm`: of an environment of its own; --tokenizer: a folder of the model in transformers' form,
read by the client. Sides are loaded in turn, client by client. Times are the client's own: TTFT, TPOT = (last - first) / (tokens - 1), in ms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from serve_load import start, stop

from lilliput.base.show import Show
from lilliput.loops.bench import machine

COLUMNS = ("at once", "side", "complete", "out tok/s", "all tok/s", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99")


def load(arguments: argparse.Namespace, url: str, model: str, clients: int, seed: int) -> dict[str, Any]:
    """One run of the client."""
    count = arguments.prompts * clients if clients > 1 else 2 * arguments.prompts
    with tempfile.TemporaryDirectory() as folder:
        words = [arguments.vllm, "bench", "serve", "--backend", "openai", "--base-url", url, "--model", model, "--tokenizer", arguments.tokenizer]
        words += ["--dataset-name", "random", "--random-input-len", str(arguments.input), "--random-output-len", str(arguments.output), "--ignore-eos"]
        words += ["--num-prompts", str(count), "--max-concurrency", str(clients), "--num-warmups", str(clients), "--seed", str(seed), "--disable-tqdm"]
        words += ["--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,99", "--save-result", "--result-dir", folder, "--result-filename", "found"]
        done = subprocess.run(words, capture_output=True, text=True)
        found = Path(folder, "found")
        if not found.exists():
            raise SystemExit(f"{url}: the client failed: {done.stdout[-500:]}{done.stderr[-1500:]}")
        said = json.loads(found.read_text())
    at = lambda key: round(said[key], 1)
    return {"at once": clients, "complete": f"{said['completed']} of {count}", "out tok/s": at("output_throughput"), "all tok/s": at("total_token_throughput"),
            "TTFT p50": at("p50_ttft_ms"), "TTFT p99": at("p99_ttft_ms"), "TPOT p50": at("p50_tpot_ms"), "TPOT p99": at("p99_tpot_ms")}  # fmt: skip


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="the program")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--ours", nargs="*", default=[], metavar="MODEL[,KEY=VALUE...]")
    parser.add_argument("--peer", action="append", default=[], metavar="TITLE=URL,MODEL")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompts", type=int, default=4, help="of each client; twice as many where it is alone")
    parser.add_argument("--input", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    show, processes, sides, rows = Show(), [], {}, []
    try:
        for text in arguments.ours:
            model, *overrides = text.split(",")
            process, url, _ = start(model, overrides)
            processes.append(process)
            sides[f"ours {' '.join(overrides) or 'as the file is'}"] = url, model
        for text in arguments.peer:
            title, _, rest = text.partition("=")
            url, _, model = rest.rpartition(",")
            sides[title] = url, model
        for clients in arguments.clients:
            for side, (url, model) in sides.items():
                rows.append({"side": side, **load(arguments, url, model, clients, 100 * arguments.seed + clients)})
                show.line(str(rows[-1]))
    finally:
        stop(processes)
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    show.table(rows, COLUMNS, f"{arguments.input} tokens in, {arguments.output} tokens out; ms; {where}")
    return 1 if any(row["complete"] != f"{row['complete'].split()[-1]} of {row['complete'].split()[-1]}" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
