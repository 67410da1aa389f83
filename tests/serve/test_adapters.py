"""LoRA serving: an adapter's tokens are those of the model with it merged, whatever else is in the batch; nothing is shared between adapters."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import lowered, merged, pairs_of, written
from served import FAMILIES, SPECS, engine_of, model_of, prompts_of

from lilliput.base.errors import DoesNotFit, UserError
from lilliput.models.decoder import Decoder
from lilliput.models.native import NativeDecoder, lower_adapter
from lilliput.ops import native
from lilliput.serve.adapters import Adapter, Adapters, Library, segments, together
from lilliput.serve.beams import Beam
from lilliput.serve.blocks import BlockPool, Table, salted
from lilliput.serve.engine import Engine
from lilliput.serve.request import Sampling
from lilliput.serve.runners.eager import Eager
from lilliput.serve.runners.native import Native
from lilliput.serve.scheduler import Chunk

compiled = pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
RUNNERS = ["eager", pytest.param("native", marks=compiled)]
NAMES = ("", "one", "two", "three")  # "": the model's own weights
SEEDS, RANKS = {"one": 11, "two": 12, "three": 13}, {"one": 4, "two": 1, "three": 7}
TARGETS = {"one": ("q_proj", "v_proj"), "two": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "three": ("up_proj", "o_proj")}


def how(name: str, tokens: int = 24, **more: Any) -> Sampling:
    return Sampling(tokens, ignore_eos=True, adapter=name, **more)


def served(model: Decoder, folder: Path, runner: str, **settings: object) -> Engine:
    """An engine with the three adapters."""
    engine = engine_of(lowered(model) if runner == "native" else model, **settings)  # type: ignore[arg-type]
    for name in NAMES[1:]:
        place = folder / name
        if not place.is_dir():
            written(place, model, SEEDS[name], RANKS[name], TARGETS[name])
        engine.load(engine.adapters.read(name, place))
    return engine


def alone(model: Decoder, name: str, prompts: list[list[int]], tokens: int = 24) -> list[list[int]]:
    """The tokens of the model with the adapter merged, on the plain engine."""
    whole = merged(model, SEEDS[name], RANKS[name], TARGETS[name]) if name else model
    return [list(done.tokens) for done in engine_of(whole, kv_tokens=4096).generate(prompts, Sampling(tokens, ignore_eos=True))]


def crowd(engine: Engine, prompts: list[list[int]], tokens: int = 24, **more: Any) -> dict[str, list[list[int]]]:
    """All prompts under all names, in one batch."""
    ids = {(name, at): engine.add(prompt, how(name, tokens, **more)) for at, prompt in enumerate(prompts) for name in NAMES}
    said: dict[int, list[int]] = {id: [] for id in ids.values()}
    while engine.busy:
        for delta in engine.step():
            assert delta.finish_reason != "error", delta.message
            said[delta.id] += [] if delta.token is None else [delta.token]
    return {name: [said[ids[name, at]] for at in range(len(prompts))] for name in NAMES}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_three_adapters_and_the_base_in_one_batch(family: str, runner: str, tmp_path: Path) -> None:
    """Each family's own places (gpt2 keeps q, k, v as one matrix), prompts whole and in chunks of 7."""
    model, prompts = model_of(family), prompts_of(3)
    expected = {name: alone(model, name, prompts) for name in NAMES}
    assert len({json.dumps(expected[name]) for name in NAMES}) == 4, "adapters must change something"
    for settings in (dict(kv_tokens=4096), dict(kv_tokens=4096, max_batch_tokens=7)):
        engine = served(model, tmp_path, runner, **settings)
        assert crowd(engine, prompts) == expected
        assert engine.pool.free_count == engine.pool.total


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("way", ["swap", "recompute"])
def test_preempted_answers_go_on_under_their_adapter(way: str, runner: str, tmp_path: Path) -> None:
    model, prompts = model_of("llama"), prompts_of(3, seed=2)
    expected = {name: alone(model, name, prompts, 40) for name in NAMES}
    engine = served(model, tmp_path, runner, kv_tokens=256, swap_tokens=1024, preemption=way)
    assert crowd(engine, prompts, 40) == expected
    assert engine.scheduler.preempted[way] > 0, "the pool must be too small for all"  # type: ignore[index]


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_prompt_is_found_again_under_its_own_adapter_alone(runner: str, tmp_path: Path) -> None:
    model, prompt = model_of("llama"), list(range(1, 60))
    engine = served(model, tmp_path, runner)
    for name in NAMES:
        first, again = engine.generate([prompt], how(name))[0], engine.generate([prompt], how(name))[0]
        assert (first.cached, again.cached) == (0, 48), f"{name or 'the base'} found what another had computed"
        assert list(first.tokens) == list(again.tokens) == alone(model, name, [prompt])[0]


@pytest.mark.parametrize("draft", ["ngram", "model"])
def test_guesses_do_not_change_an_adapters_answer(draft: str, tmp_path: Path) -> None:
    """A model that guesses knows nothing of adapters; what it guesses is judged under them."""
    model, prompts = model_of("llama"), [(p * 9)[:90] for p in prompts_of(2, seed=3)]
    other = draft if draft == "ngram" else model_of("qwen3", seed=1)  # of other shapes: an adapter would not fit it
    engine = served(model, tmp_path, "eager", draft=other, guesses=4, kv_tokens=4096)
    if draft == "model":
        assert engine.guesses is not None
    assert crowd(engine, prompts) == {name: alone(model, name, prompts) for name in NAMES}


@compiled
def test_layers_of_the_model_guess_under_the_adapter(tmp_path: Path) -> None:
    model, prompts = model_of("llama"), prompts_of(2, seed=3)
    engine = served(model, tmp_path, "native", draft="layers:2", guesses=3, kv_tokens=4096)
    assert crowd(engine, prompts) == {name: alone(model, name, prompts) for name in NAMES}


@pytest.mark.parametrize("runner", RUNNERS)
def test_several_answers_and_beams_of_an_adapter(runner: str, tmp_path: Path) -> None:
    model, prompt = model_of("llama"), prompts_of(1, seed=6)[0]
    engine, whole = served(model, tmp_path, runner), engine_of(merged(model, SEEDS["two"], RANKS["two"], TARGETS["two"]))
    more = dict(n=3, temperature=0.8, seed=5)
    ours, theirs = engine.generate([prompt], how("two", **more)), whole.generate([prompt], how("", **more))
    assert [done.tokens for done in ours] == [done.tokens for done in theirs]
    ours, theirs = (one.generate([prompt], Beam(3, 8, ignore_eos=True, adapter=name)) for one, name in ((engine, "two"), (whole, "")))
    assert [done.tokens for done in ours] == [done.tokens for done in theirs]


@pytest.mark.parametrize("runner", RUNNERS)
def test_one_that_is_replaced_or_removed_ends_with_its_last_request(runner: str, tmp_path: Path) -> None:
    model, prompt = model_of("llama"), list(range(1, 60))
    engine, plain = served(model, tmp_path, runner), {name: alone(model, name, [prompt])[0] for name in NAMES}
    old = engine.adapters.find("one")
    assert old is not None
    engine.generate([prompt], how("one"))
    running = engine.add(prompt, how("one"))
    said = [delta.token for delta in engine.step() if delta.id == running]
    engine.load(engine.adapters.read("one", tmp_path / "two"), replace=True)
    assert engine.pool.find(engine.pool.keys(Table(old.salt), prompt, 3)) == [], "what the old one computed is still found"
    fresh = engine.generate([prompt], how("one"))[0]
    while engine.busy:
        said += [delta.token for delta in engine.step() if delta.id == running]
    said = [token for token in said if token is not None]
    assert said == plain["one"], "a running answer changed its weights"
    assert fresh.cached == 0 and list(fresh.tokens) == plain["two"]
    engine.unload("one")
    with pytest.raises(UserError, match="no adapter is named `one`"):
        engine.request(prompt, how("one"))
    assert list(engine.generate([prompt], how("three"))[0].tokens) == plain["three"]
    assert engine.pool.free_count == engine.pool.total


def test_names_and_their_number() -> None:
    adapters = Adapters(SPECS["llama"], lambda pairs: pairs, most=2)
    first, second = (Adapter(name, at, 1, None) for at, name in enumerate(("a", "b"), 1))
    adapters.put(first)
    with pytest.raises(UserError, match="loaded already"):
        adapters.put(Adapter("a", 5, 1, None))
    assert adapters.put(Adapter("a", 3, 1, None), replace=True) is first
    adapters.put(second)
    with pytest.raises(DoesNotFit, match="one too many"):
        adapters.put(Adapter("c", 4, 1, None))
    assert adapters.names == ("a", "b") and adapters.find("") is None and adapters.remove("b") is second and adapters.names == ("a",)


def test_rows_of_an_adapter_lie_side_by_side() -> None:
    a, b = Adapter("a", 1, 1, "A"), Adapter("b", 2, 1, "B")
    chunk = lambda id, rows, adapter: Chunk(id, 0, rows, True, array("i", [0]), 1, [0] * rows, adapter=adapter)
    mixed = [chunk(0, 2, b), chunk(1, 1, a), chunk(2, 3, None), chunk(3, 1, b), chunk(4, 4, a)]
    ordered = together(mixed)
    assert [one.id for one in ordered] == [2, 1, 4, 0, 3]
    assert segments(ordered) == [(3, 8, "A"), (8, 11, "B")]
    plain = [chunk(0, 1, None), chunk(1, 1, None)]
    assert together(plain) is plain and segments(plain) == []


def test_what_was_computed_under_a_salt_is_forgotten_and_taken_first() -> None:
    pool = BlockPool(6)
    tables = [Table(salted(name)) for name in ("a", "b", "a")]
    for at, table in enumerate(tables):
        pool.grow(table, 32)
        pool.commit(table, [at] * 32, 32)
    kept = pool.find(pool.keys(tables[1], [1] * 32, 2))
    held = tables[2].blocks[:]
    pool.free(tables[1])
    pool.free(tables[0])
    pool.forget(salted("a"))
    assert [pool.find(pool.keys(Table(salted("a")), [at] * 32, 2)) for at in (0, 2)] == [[], []]
    assert pool.find(pool.keys(Table(salted("b")), [1] * 32, 2)) == kept and tables[2].blocks == held
    other = Table()
    pool.grow(other, 32)
    assert not set(other.blocks) & set(kept), "a block that can be found was taken before one that cannot"
    pool.free(tables[2])
    pool.free(other)
    pool.forget(salted("a"))
    assert pool.free_count == 6


# ---- the native update


@compiled
@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("family", FAMILIES)
def test_the_native_update_is_the_plain_one(family: str, level: str) -> None:
    """Logits of both runners within rounding; rows of three adapters and of none in one step, in any order of adapters."""
    model = model_of(family)
    names = [None, *(Adapter(name, at, 4, pairs_of(model, SEEDS[name], RANKS[name], TARGETS[name])) for at, name in enumerate(SEEDS, 1))]
    texts = prompts_of(6, seed=9)
    pool = BlockPool(40)
    tables = [Table() for _ in texts]
    for table, text in zip(tables, texts):
        pool.grow(table, len(text))
    with native.using(level):
        runners = Eager(model, pool.total), Native(lowered(model), pool.total)
        logits = []
        for runner in runners:
            forms = [name and Adapter(name.name, name.number, 4, runner.lower(name.lowered)) for name in names]
            batch = [Chunk(i, 0, len(t), True, tables[i].blocks, 1, t, adapter=forms[i % 4]) for i, t in enumerate(texts)]
            logits.append(runner.forward(batch).clone())
    torch.testing.assert_close(logits[1], logits[0], atol=5e-4, rtol=1e-4)


@compiled
def test_bit_equal_alone_in_a_crowd_and_in_chunks() -> None:
    model = model_of("llama")
    runner, pool, texts = Native(lowered(model), 60), BlockPool(60), prompts_of(8, seed=4)
    texts[0] = texts[0] * 7  # several tiles of rows
    forms = [None, *(Adapter(n, at, 4, lower_adapter(model.spec, pairs_of(model, SEEDS[n], RANKS[n], TARGETS[n]))) for at, n in enumerate(SEEDS, 1))]
    tables = [Table() for _ in texts]
    for table, text in zip(tables, texts):
        pool.grow(table, len(text))
    chunk = lambda i, a, b: Chunk(i, a, b, b == len(texts[i]), tables[i].blocks, int(b == len(texts[i])), texts[i][a:b], adapter=forms[i % 4])
    order = together([chunk(i, 0, len(text)) for i, text in enumerate(texts)])
    whole = dict(zip((one.id for one in order), runner.forward(order).clone()))
    for i, text in enumerate(texts):
        for cut in {len(text), min(len(text), 13), max(1, len(text) - 1)}:
            for start in range(0, len(text), cut):
                last = runner.forward([chunk(i, start, min(start + cut, len(text)))])
            assert torch.equal(last[0], whole[i]), f"prompt {i} of {len(text)} in chunks of {cut}"


@compiled
def test_adapters_in_half_precision_take_half_the_bytes() -> None:
    """Products widen them: what fp16 holds exactly loses nothing."""
    model = model_of("llama")
    whole = pairs_of(model, SEEDS["two"], 4, TARGETS["two"])
    halves = {path: (a.half().float(), b.half().float()) for path, (a, b) in whole.items()}
    small, large = lower_adapter(model.spec, halves, half=True), lower_adapter(model.spec, whole)
    assert 2 * small.bytes == large.bytes
    runner, text = Native(lowered(model), 8), prompts_of(1, seed=4)[0]
    table = Table()
    BlockPool(8).grow(table, len(text))
    logits = runner.forward([Chunk(0, 0, len(text), True, table.blocks, 1, text, adapter=Adapter("a", 1, 4, small))])
    plain = Eager(model, 8)
    expected = plain.forward([Chunk(0, 0, len(text), True, table.blocks, 1, text, adapter=Adapter("a", 1, 4, plain.lower(halves)))])
    torch.testing.assert_close(logits, expected, atol=5e-4, rtol=1e-4)


@compiled
def test_adapters_are_as_narrow_as_the_base() -> None:
    """fp16 beside matrices that are stored in less than fp32, fp32 beside fp32; and what fp16 has no room for is refused."""
    model = model_of("llama")
    pairs, read = pairs_of(model, 5), lambda name: model.get_parameter(name).detach()
    runners = {weights: Native(NativeDecoder(model.spec, read, weights=weights), 1) for weights in ("fp32", "fp16", "w8")}  # type: ignore[arg-type]
    sizes = {weights: runner.lower(pairs).bytes for weights, runner in runners.items()}
    assert sizes["fp32"] == 2 * sizes["fp16"] == 2 * sizes["w8"] == lower_adapter(model.spec, pairs).bytes
    a, b = pairs["layers.0.attn.q_proj"]
    with pytest.raises(UserError, match="no room"):
        runners["w8"].lower({"layers.0.attn.q_proj": (a, 1e6 * b)})
    runners["fp32"].lower({"layers.0.attn.q_proj": (a, 1e6 * b)})


# ---- files


def broken(folder: Path, config: dict | None = None, **tensors: Any) -> None:
    from safetensors.torch import load_file, save_file

    if config is not None:
        kept = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(kept | config))
    if tensors:
        kept = load_file(folder / "adapter_model.safetensors")
        for name, value in tensors.items():
            if value is None:
                del kept[name]
            else:
                kept[name] = value
        save_file(kept, folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"r": 8}, {}, "needs [8, 48], has [4, 48]"),
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, {}, "needs [2, 48], has [4, 48]"),
        ({"peft_type": "IA3"}, {}, "peft_type=IA3"),
        ({"use_dora": True}, {}, "use_dora"),
        ({"bias": "all"}, {}, "bias=all"),
        ({"lora_alpha": "16"}, {}, "numbers above 0"),
        ({"rank_pattern": []}, {}, "cannot be read"),
        (None, {f"{Q}A.weight": torch.zeros(4, 64)}, "needs [4, 48], has [4, 64]"),
        (None, {f"{Q}B.weight": None}, "needs [48, 4], has nothing"),
        (None, {"base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight": torch.zeros(4, 48)}, "belong to none of its Linears"),
        (None, {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 48)}, "1 of 13 tensors"),
        (None, {f"{Q}A.weight": torch.zeros(4, 48, dtype=torch.int8)}, "is I8"),
    ],
)
def test_files_that_do_not_fit_are_refused_with_numbers(config: dict | None, tensors: dict, said: str, tmp_path: Path) -> None:
    model = model_of("llama")
    folder = written(tmp_path / "one", model, 1, targets=("q_proj", "o_proj"))
    broken(folder, config, **tensors)
    with pytest.raises(UserError) as error:
        engine_of(model).adapters.read("one", folder)
    assert said in str(error.value), str(error.value)


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "one", model_of("llama"), 1)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="holds no adapter"):
        engine_of(model_of("llama")).adapters.read("one", folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x02pickle")
    with pytest.raises(UserError, match="damaged"):
        engine_of(model_of("llama")).adapters.read("one", folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be read"):
        engine_of(model_of("llama")).adapters.read("one", folder)


def test_adapters_come_from_their_folder_alone(tmp_path: Path) -> None:
    model = model_of("llama")
    inside, outside = written(tmp_path / "library" / "good", model, 1), written(tmp_path / "elsewhere", model, 2)
    (tmp_path / "library" / "link").symlink_to(outside)
    (tmp_path / "library" / "loop").symlink_to(tmp_path / "library" / "loop")
    half = tmp_path / "library" / "half"
    half.mkdir()
    (half / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    library = Library(str(tmp_path / "library"))
    for path in ("good", str(inside), "./good", "good/../good"):
        assert library.place(path) == inside
    for path in ("../elsewhere", str(outside), "link", "half", "good/../../elsewhere", "/etc", "loop", "a\0b", "x" * 5000, "../library-2"):
        with pytest.raises(UserError, match="not in the folder of adapters"):
            library.place(path)
    with pytest.raises(UserError, match="not in the folder of adapters"):
        library.found()
    for name in ("link", "loop", "half/adapter_config.json"):
        (tmp_path / "library" / name).unlink()
    assert library.found() == {"good": inside} and Library(str(inside)).found() == {"good": inside}
    with pytest.raises(UserError, match="is no folder"):
        Library(str(tmp_path / "nothing"))
