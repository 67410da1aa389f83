"""QLoRA training tokens/s: Lilliput beside peft + bitsandbytes, the same model, batch, rank and optimizer, in turns, in one process.

    PYTHONPATH=<folder with bitsandbytes> python benchmarks/qlora_speed.py     (--rounds 5 --threads 2 --batch 2 --tokens 128 --rank 16)

Needs bitsandbytes (no dependency), peft and transformers. Both sides: NF4 of 64 with double quantisation on all Linears of the blocks, adapters on
the same Linears, no dropout, clipping 1.0, fused AdamW, no recomputation. Theirs once computes in fp32, as ours, and once in bf16.
Further rows of ours: storage=file, paged (the cost of being counted), fp32 lora, and qlora whose matrices are decoded by plain torch. A turn is
one whole step; tokens/s are medians of the rounds, ratios medians of the rounds' ratios (above 1: ours is faster). First losses
are printed: the same model on the same tokens, apart from the second level of the scales.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes
import peft
import torch
import transformers

from lilliput.base import hardware, registry
from lilliput.base.protocols import Site
from lilliput.base.show import Show
from lilliput.data.batch import MicroBatch
from lilliput.loops.bench import alternate, machine, ratio
from lilliput.models.checkpoints import Checkpoint, open_checkpoint, save_model
from lilliput.models.decoder import Decoder, init_tensor
from lilliput.models.load import resolve_spec
from lilliput.ops import native, nf4
from lilliput.parallel.rig import Rig, assemble

RATE, ALPHA = 1e-4, 16.0


def ours(checkpoint: Checkpoint, batch: int, tokens: int, **rooms: dict[str, Any]) -> Rig:
    """A rig over the checkpoint with these rooms (name -> knobs)."""
    spec = checkpoint.spec
    with torch.device("meta"):
        model = Decoder(spec)
    return assemble(
        model, {name: registry.find("train", name)(**knobs) for name, knobs in rooms.items()}, site=Site(hardware.detect(), sequences=batch, tokens=tokens),
        device=torch.device("cpu"), seed=0, dtype="fp32", read=checkpoint.read, blocks=checkpoint.blocks,
        init=lambda name, shape, seed: init_tensor(name, shape, seed, spec), optimizer={"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}, clip=1.0,
    )  # fmt: skip


def theirs(folder: Path, rank: int, compute: torch.dtype) -> tuple[Any, torch.optim.Optimizer]:
    """The model in 4 bits with adapters, and its optimizer."""
    bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits, dtype=compute, device_map="cpu")
    model = peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM"))
    count = sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules())
    if count == 0:
        raise SystemExit("transformers loaded no Linear in 4 bits")
    return model.train(), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0, fused=True)


def step_of_theirs(model: Any, optimizer: torch.optim.Optimizer, micro: MicroBatch) -> float:
    """One optimizer step; the loss of its batch."""
    logits_BTV = model(input_ids=micro.tokens_BT).logits
    loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), micro.targets_BT.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def main() -> None:
    """Build every side, then take turns."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=hardware.cpus())
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--tokens", type=int, default=128)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    show = Show(json=args.json)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    native.threads(args.threads)
    source = resolve_spec(args.model)[1]
    checkpoint = open_checkpoint(source or args.model)
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(0, checkpoint.spec.vocab, (args.batch, args.tokens), generator=generator)
    micro = MicroBatch(draw(), draw(), args.batch * args.tokens)
    adapter = {"rank": args.rank, "alpha": ALPHA}
    built = lambda **rooms: ours(checkpoint, args.batch, args.tokens, **rooms)
    rigs = {
        "qlora": built(qlora=adapter), "qlora storage=file": built(qlora={**adapter, "storage": "file"}),
        "qlora, paged with room for all": built(qlora=adapter, paged={"budget": "64GB"}), "lora fp32": built(lora=adapter),
    }  # fmt: skip
    sides: dict[str, Callable[[], float]] = {name: (lambda rig=rig: rig.step([micro], RATE, 0).mean) for name, rig in rigs.items()}

    def plain() -> float:
        with patch.object(nf4, "supports", lambda stored: "switched off"):
            return sides["qlora"]()

    with tempfile.TemporaryDirectory() as name:
        save_model(Path(name) / "hf", checkpoint.read, checkpoint.spec, checkpoint.tokenizer())
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
        peers = {f"peft + bitsandbytes {word}": theirs(Path(name) / "hf", args.rank, kind) for word, kind in kinds.items()}
    sides |= {"qlora decoded by torch": plain}
    sides |= {name: (lambda pair=pair: step_of_theirs(*pair, micro)) for name, pair in peers.items()}
    first = {name: round(run(), 4) for name, run in sides.items() if name != "qlora decoded by torch"}
    times = alternate(sides, args.rounds)
    rows = [
        {"side": name, "tokens/s": round(micro.weight / statistics.median(seconds), 1), "ms a step": round(1e3 * statistics.median(seconds), 1),
         "qlora is x times": round(ratio(times, "qlora", name), 2), "first loss": first.get(name, "")} for name, seconds in times.items()
    ]  # fmt: skip
    about = machine() | {"threads": args.threads, "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
                         "bitsandbytes": bitsandbytes.__version__, "batch": f"{args.batch} x {args.tokens}", "load": os.getloadavg()[0]}  # fmt: skip
    show.data(about | {"rows": rows})
    show.table(rows, tuple(rows[0]), ", ".join(f"{key} {value}" for key, value in about.items()))


if __name__ == "__main__":
    main()
