"""The only training loop. It names no technique: the job's sections become rooms, the rooms shape the rig, the loop turns.

    Job -> spec and facts (no torch) -> plan: auto values, does it fit -> data -> assemble -> step, step, step -> folder

`tokens_per_step` is the one truth about batch size: the loop hands the rig all micro-batches of one optimizer step.
The run folder holds job.toml, metrics.jsonl (a line a step), checkpoints/, loss.png|svg, model/ (loadable by transformers).
Ctrl-C saves and stops; the same command goes on bitwise; a finished run is not run again.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.base import hardware, records, registry
from lilliput.base.errors import DoesNotFit, UserError
from lilliput.base.hardware import Hardware
from lilliput.base.job import Job
from lilliput.base.seeds import key
from lilliput.base.show import Show, size
from lilliput.loops.schedule import learning_rate
from lilliput.ops import native

if TYPE_CHECKING:
    from lilliput.data.tokenizer import Tokenizer
    from lilliput.models.checkpoints import Checkpoint
    from lilliput.models.spec import DecoderSpec
    from lilliput.parallel.rig import Rig

LARGE = 8 << 20  # bytes of data from which reading gets a progress bar
MAY_CHANGE = ("threads", "train.steps", "train.eval_every", "train.eval_tokens", "train.save_every", "train.tensorboard")  # between a run and its resume


@dataclass(frozen=True)
class TrainResult:
    """What a run did. Losses in nats per scored token; evaluations are None when there is no held-out data."""

    out: str
    steps: int
    loss_first: float | None
    loss_last: float | None
    eval_before: float | None
    eval_after: float | None
    tokens_per_second: float
    peak_bytes: int
    interrupted: bool
    resumed_from: int = 0


def train(job: Job, out: Path, show: Show) -> TrainResult:
    """Run a job, or go on with it, in the folder `out`. UserError before torch is loaded where the fault can be seen."""
    from lilliput.models.load import resolve_spec

    spec, source = resolve_spec(job.top.model)
    if source is None and job.train.init == "weights":
        raise UserError(f"`{job.top.model}` is a size without weights", fix="train.init=scratch")
    with records.Run(out) as run:
        finished = run.finished()
        if finished:
            refuse_changes(out, flat(Job.load(out / "job.toml")), flat(job))
        if finished and finished["steps"] >= job.train.steps:
            show.line(f"{out} is finished ({finished['steps']} steps); raise train.steps to go on, or choose another out folder")
            return TrainResult(**finished)
        with ExitStack() as around:
            loop = _Loop(job, run, show, around)
            loop.prepare(spec, source)
            loop.resume()
            result = loop.run_steps()
            if not result.interrupted:
                loop.export()
                run.finish(asdict(result))
            return result


def flat(job: Job) -> dict[str, str]:
    """key -> value as text, of every key whose change makes another run."""
    return {k: str(v) for k, v in job.settings.flat().items() if k not in MAY_CHANGE and not k.startswith(("eval.", "generate."))}


def refuse_changes(folder: Path, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """UserError that names up to five keys in which the run of this folder differs from what is asked for."""
    changed = [f"{k}: {saved.get(k, 'unset')} -> {now.get(k, 'unset')}" for k in sorted({*saved, *now}) if saved.get(k) != now.get(k)]
    if changed:
        raise UserError(f"{folder} holds another run", "; ".join(changed[:5]), "choose another out folder, or take the change back")


class _Loop:
    """The state of one run between its phases."""

    def __init__(self, job: Job, run: records.Run, show: Show, around: ExitStack) -> None:
        self.job, self.run, self.show, self.around = job, run, show, around
        self.pinned = run.folder / "rooms.json"  # what was chosen when the run began
        self.start = 0

    def prepare(self, spec: DecoderSpec, source: Path | None) -> None:
        """Open files, make the data, settle auto values, check that it fits, build the rig."""
        from lilliput.data.load import open_data
        from lilliput.data.tokenizer import make_tokenizer
        from lilliput.models import hub
        from lilliput.models.checkpoints import open_checkpoint

        checkpoint = open_checkpoint(source) if source is not None else None
        data = self.job.data
        if not data.path:
            raise UserError("nothing to train on", "data.path is empty", "data.path=notes/*.jsonl")
        data = data.model_copy(update={"path": hub.resolve_data(data.path), "eval_path": hub.resolve_data(data.eval_path)})
        self.tokenizer: Tokenizer = self._tokenizer(make_tokenizer, checkpoint, data)
        if self.job.train.init == "scratch":
            spec = replace(spec, vocab=self.tokenizer.vocab_size, bos_id=self.tokenizer.bos_id, eos_ids=self.tokenizer.eos_ids)
        if data.sequence > spec.context:
            raise UserError(f"data.sequence={data.sequence} is too long", f"the model knows {spec.context} positions", f"data.sequence={spec.context}")
        self.spec, self.lineage = spec, checkpoint
        self.micro, self.estimate = self._plan(spec, data.sequence)
        self.stream, self.held = self._open(open_data, data, spec.context)
        self._count()
        self.rig = self._fitted(spec, checkpoint, data.sequence)
        self.around.callback(self.rig.close, self.rig)
        self.identity = self._identity(spec)
        self._write_plans()
        if self.rig.plan is not None:
            self.show.line(f"memory: {self.rig.plan.planner} ({self.run.folder / 'memory.json'})")

    def _count(self) -> None:
        """From here on to the end of the run, the bytes of the process or of the CUDA device."""
        import torch

        from lilliput.memory.outside import outside
        from lilliput.models.load import pick_device

        self.outside = self.around.enter_context(outside(torch.device(pick_device(self.job.top.device)), self.job.memory.bytes(), self.show.line))

    def _open(self, open_data: Any, data: Any, context: int) -> tuple[Any, Any]:
        with ExitStack() as stack:
            bars: list[Any] = []

            def progress(done: int, total: int) -> None:  # bytes; small data needs no bar
                if total > LARGE and not bars:
                    bars.append(stack.enter_context(self.show.bar(total, "tokenise")))
                if bars:
                    bars[0].advance(done - bars[0].done)

            stream, held = open_data(data, self.tokenizer, context, self.job.top.seed, progress)
        self.show.line("data: " + ", ".join(f"{count:,} {name}" for name, count in stream.summary().items()))
        return stream, held

    def _tokenizer(self, make: Any, checkpoint: Checkpoint | None, data: Any) -> Tokenizer:
        from lilliput.data.load import texts

        saved = self.run.folder / "tokenizer"
        if data.tokenizer == "auto":
            if checkpoint is None:
                raise UserError(f"`{self.job.top.model}` has no tokenizer of its own", fix="data.tokenizer=bytes (or chars, bpe:1024, a folder)")
            return checkpoint.tokenizer()
        if saved.is_dir():  # made from the data by the run that is resumed
            return make(str(saved), [])
        tokenizer = make(data.tokenizer, texts(data))
        with records.atomic_folder(saved) as folder:
            tokenizer.save(folder)
        return tokenizer

    def _fitted(self, spec: DecoderSpec, checkpoint: Checkpoint | None, sequence: int) -> Rig:
        """The rig of the sections that were chosen; of the next ones, as long as a plan to the byte refuses those. Then they are pinned."""
        from lilliput.plan.choose import words

        given, refused = dict(self.job.rooms), {}
        while (choice := self.estimate.choice) is not None and not self.pinned.is_file():
            self.job.rooms = {**given, **choice.added}
            try:
                rig = self._assemble(spec, checkpoint)
            except DoesNotFit as fault:
                self.show.line(f"not {words(choice.added)}, planned to the byte: {fault.what}")
                self.job.rooms, refused[words(choice.added)] = given, fault
                self.micro, self.estimate = self._plan(spec, sequence, refused)
                continue
            for line in choice.lines():
                self.show.line(line)
            records.write_json(self.pinned, {name: section.model_dump(exclude_unset=True) for name, section in choice.added.items()})
            return rig
        return self._assemble(spec, checkpoint)

    def _plan(self, spec: DecoderSpec, sequence: int, refused: Mapping[str, DoesNotFit] | None = None) -> tuple[int, Any]:
        from lilliput.models.facts import facts
        from lilliput.plan.estimate import estimate_training

        if self.pinned.is_file():
            self.job.rooms |= {name: registry.find("train", name).model_validate(section) for name, section in records.read_json(self.pinned).items()}
        self.hardware: Hardware = hardware.find(self.job.top.hardware).select(self.job.top.device)
        estimate = estimate_training(self.job, facts(spec), self.hardware, refused)
        if not estimate.fits:
            raise DoesNotFit(*estimate.verdict())
        micro = estimate.site.sequences
        if self.job.train.tokens_per_step % (micro * sequence):
            near = max(1, round(self.job.train.tokens_per_step / (micro * sequence))) * micro * sequence
            why = f"one micro-batch has {micro} x {sequence} = {micro * sequence} tokens"
            raise UserError(f"train.tokens_per_step={self.job.train.tokens_per_step} is no multiple of a micro-batch", why, f"train.tokens_per_step={near}")
        return micro, estimate

    def _assemble(self, spec: DecoderSpec, checkpoint: Checkpoint | None) -> Rig:
        import torch

        from lilliput.memory.plan import MemoryPlan
        from lilliput.models.decoder import Decoder, init_tensor
        from lilliput.models.load import pick_device
        from lilliput.parallel.rig import assemble

        top, settings = self.job.top, self.job.train
        device = torch.device(pick_device(top.device))
        count = hardware.cpus() if top.threads == "auto" else top.threads
        torch.set_num_threads(count)
        native.threads(count)
        with torch.device("meta"):
            model = Decoder(spec)
        model.dropout = settings.dropout
        source = checkpoint if settings.init == "weights" else None
        begun = [MemoryPlan.from_json(file.read_text()) for file in self.run.folder.glob("memory*.json")]
        return assemble(
            model, self.job.rooms, plans={plan.trace: plan for plan in begun}, budget=self.job.memory.bytes(), site=self.estimate.site,
            device=device, seed=top.seed, dtype=top.dtype, clip=settings.clip,
            read=source.read if source else None, blocks=source.blocks if source else lambda name: None,
            init=lambda name, shape, seed: init_tensor(name, shape, seed, spec),
            optimizer={"betas": (settings.beta1, settings.beta2), "eps": settings.eps, "weight_decay": settings.weight_decay},
        )  # fmt: skip

    def _identity(self, spec: DecoderSpec) -> dict[str, str]:
        return {**flat(self.job), "model": format(key(repr(spec)), "x"), "tokenizer": self.tokenizer.digest(), "micro_batch": str(self.micro)}

    def _counted(self) -> dict[str, float]:
        """The most bytes so far: of the whole process, and as the meter counted them where there is a budget."""
        return {tier: float(peak) for tier, (_, peak) in self.rig.meter.tiers.items() if self.rig.meter.budget} | self.outside.figures()

    def _write_plans(self) -> None:
        """The memory plans, with the most bytes so far."""
        counted = self._counted()
        others = [plan for plan in self.rig.plans.values() if plan.trace != self.rig.plan.trace]
        for name, plan in zip(("memory.json", "memory-2.json"), (self.rig.plan, *others)):
            if plan is not None:
                before = plan.measured
                measured = {tier: max(before.get(tier, 0.0), counted.get(tier, 0.0)) for tier in sorted({*before, *counted})}
                records.atomic_write(self.run.folder / name, replace(plan, measured=measured).to_json())

    def resume(self) -> None:
        """Go on from the newest checkpoint of the run folder, if it has one."""
        from lilliput.train import checkpoint

        folder = checkpoint.latest(self.run)
        if folder is None:
            self.run.truncate_metrics(-1)
            records.atomic_write(self.run.folder / "job.toml", self.job.to_toml())
            self.run.note_environment()
            return
        step, saved = checkpoint.identity(folder)
        refuse_changes(self.run.folder, saved, self.identity)
        self.stream.restore(checkpoint.restore(folder, self.rig))
        self.run.truncate_metrics(step)
        self.start = step
        for change in self.run.note_environment():
            self.show.line(f"{change}: the numbers may differ in the last bits from those of an uninterrupted run")
        self.show.line(f"resumed after step {step} of {self.job.train.steps}")

    def run_steps(self) -> TrainResult:
        """The loop itself."""
        settings, show = self.job.train, self.show
        micros = settings.tokens_per_step // (self.micro * self.job.data.sequence)
        tokens, interrupted = 0, False
        before = self._evaluate(0)
        after, done, computing = before, self.start, 0.0
        with stoppable() as stop, show.bar(settings.steps, "train", done=self.start) as bar, self._board() as board:
            for step in range(self.start, settings.steps):
                begin = time.monotonic()
                batch = [self.stream.next(self.micro) for _ in range(micros)]
                rate = learning_rate(step, settings)
                sums = self.rig.step(batch, rate, step)
                spent = time.monotonic() - begin
                done, computing, tokens = step + 1, computing + spent, tokens + settings.tokens_per_step
                event = self._event(done, sums, rate, spent, computing / (done - self.start))
                self.run.metrics(event)
                board(event)
                bar.advance(1, f"loss {sums.mean:.3f}  {event['tokens_per_second']:,.0f} tok/s")
                if not math.isfinite(sums.norm):
                    show.line(f"step {done}: the gradient norm is {sums.norm}; the update was skipped")
                interrupted = stop.requested
                if settings.eval_every and done % settings.eval_every == 0 and done < settings.steps and not interrupted:
                    after = self._evaluate(done)
                if interrupted or done == settings.steps or (settings.save_every and done % settings.save_every == 0):
                    self._save(done)
                if interrupted:
                    break
            if not interrupted:
                self.rig.flush(self.rig)  # the weights that are exported
                after = self._evaluate(done)
        self._write_plans()
        if self.rig.meter.budget:
            show.line(f"most bytes: {', '.join(f'{name} {size(int(count))}' for name, count in self._counted().items())}")
        if interrupted:
            show.line(f"stopped; saved after step {done}. The same command goes on from there.")
        rows = [r["loss"] for r in self.run.read_metrics() if "loss" in r]
        return TrainResult(
            str(self.run.folder), done, rows[0] if rows else None, rows[-1] if rows else None, before, after,
            tokens / computing if computing else 0.0, self.outside.peak, interrupted, self.start,
        )  # fmt: skip

    def _event(self, step: int, sums: Any, rate: float, spent: float, average: float) -> dict[str, Any]:
        per_second = self.job.train.tokens_per_step / spent
        peak = self.hardware.device.peak("fp32" if self.hardware.device.kind == "cpu" else self.job.top.dtype)
        return {
            "step": step, "loss": sums.mean, "grad_norm": sums.norm, "lr": rate, "targets": sums.weight,
            "tokens_per_second": per_second, "mfu": self.estimate.step_flops / spent / peak if peak else None,
            "eta_seconds": average * (self.job.train.steps - step), "peak_bytes": self.outside.peak, "seconds": spent, **sums.told,
        }  # fmt: skip

    def _evaluate(self, step: int) -> float | None:
        found = self.run.read_metrics() if step <= self.start else []  # what a run that goes on has found already
        known = next((float(r["eval_loss"]) for r in found if "eval_loss" in r and r["step"] == step), None)
        if self.held is None or known is not None:
            return known
        sums = self.rig.evaluate(self.held.eval_batches(self.micro, self.job.train.eval_tokens))
        self.run.metrics({"step": step, "eval_loss": sums.mean, "eval_targets": sums.weight})
        self.show.line(f"step {step}: held-out loss {sums.mean:.4f} (perplexity {math.exp(min(50, sums.mean)):.2f}, {sums.weight} tokens)")
        return sums.mean

    def _save(self, step: int) -> None:
        from lilliput.train import checkpoint

        checkpoint.save(self.run, self.rig, step, self.stream.state(), self.identity)

    @contextmanager
    def _board(self) -> Iterator[Any]:
        if not self.job.train.tensorboard:
            yield lambda event: None
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("train.tensorboard needs the tensorboard package", fix="pip install 'lilliput[tensorboard]'") from error
        writer = SummaryWriter(str(self.run.folder / "tensorboard"))

        def write(event: dict[str, Any]) -> None:
            for name, value in event.items():
                writer.add_scalar(name, value or 0.0, event["step"])

        try:
            yield write
        finally:
            writer.close()

    def export(self) -> None:
        """Write model/ (transformers' layout), the rooms' own folders, and the loss curve."""
        from lilliput.loops.figure import loss_curve
        from lilliput.models.checkpoints import save_model

        folder = self.run.folder
        self.rig.flush(self.rig)
        rows = self.run.read_metrics()
        lineage = {
            "parents": [{"model": self.job.top.model, "sha256": self.lineage.digest()}] if self.lineage is not None else [],
            "sections": {name: room.model_dump(mode="json") for name, room in self.job.rooms.items()},
            "evaluation": {str(r["step"]): r["eval_loss"] for r in rows if "eval_loss" in r},
        }
        save_model(folder / "model", lambda name: self.rig.weight(self.rig, name), self.spec, self.tokenizer, dtype=self.job.top.dtype, lineage=lineage)
        for name, write in self.rig.exports.items():
            with records.atomic_folder(folder / name) as building:
                told = write(self.rig, building)
            self.show.line(told or f"wrote {folder / name}")
        loss_curve(rows, folder, f"{self.job.top.model}: {self.job.train.steps} steps")
        self.show.line(f"wrote {folder / 'model'}")


@dataclass
class Stop:
    """Set when the user asked to stop."""

    requested: bool = False


@contextmanager
def stoppable() -> Iterator[Stop]:
    """SIGINT and SIGTERM finish the step and save; a second one ends at once. Outside the main thread nothing is caught."""
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    try:
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller owns the signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
