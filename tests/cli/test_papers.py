"""The table of 27 systems: honest, complete, light; and the one claim that is measured so far."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest

from lilliput.base import registry
from lilliput.base.errors import UserError
from lilliput.base.job import sections
from lilliput.ops import native
from lilliput.papers import index
from lilliput.papers.paper import Finding

SYSTEMS = {
    "GPipe", "ZeRO", "Megatron-LM", "sequence parallelism", "ZeRO++", "gradient checkpointing", "ZeRO-Offload", "ZeRO-Infinity", "POET", "QLoRA",
    "FP8", "FlashAttention-2", "DeepSpeed Inference", "ByteTransformer", "vLLM", "FlexGen", "E.T.", "speculative decoding", "StreamingLLM", "H2O",
    "SmoothQuant", "GPTQ", "Deja Vu", "InstaFlow", "PETAL", "AutoGen", "DCN V2",
}  # fmt: skip


def every():
    return [paper for group in index.papers().values() for paper in group]


def test_all_systems_are_listed_once():
    assert sorted(paper.system for paper in every()) == sorted(SYSTEMS)
    assert len({paper.name for paper in every()}) == 27


def test_each_paper_states_a_reference_and_a_claim():
    for paper in every():
        assert paper.title and paper.authors and 2015 < paper.year < 2030, paper.name
        assert "arXiv" in paper.where or "doi" in paper.where, paper.name
        assert len(paper.claim) > 60 and paper.claim.endswith("."), paper.name
        assert any(letter.isdigit() for letter in paper.claim) or "no figure" in paper.claim, (
            f"{paper.name}: a claim has the published number, or says that there is none"
        )


def test_status_is_derived_from_run_and_registry():
    checkpointing = index.find("checkpointing")
    assert checkpointing.works and checkpointing.status == "works"
    assert not replace(checkpointing, run=None).works
    assert not replace(checkpointing, switches=("nosuchroom.x=1",)).works
    assert replace(index.find("gptq"), run=lambda: Finding("", (), True)).works, "a system that needs no switch works once it is measured"
    assert replace(checkpointing, lacks="the rest").status == "in part" and replace(checkpointing, lacks="the rest", run=None).status == "not yet"


def test_no_system_without_a_run_claims_to_work():
    working = ["checkpointing", "zero-offload", "poet", "qlora", "fp8", "flashattention-2", "bytetransformer", "vllm", "speculative-decoding",
               "streamingllm", "h2o"]  # fmt: skip
    assert [paper.name for paper in every() if paper.status == "works"] == working
    assert [paper.name for paper in every() if paper.status == "in part"] == ["zero-infinity", "deepspeed-inference", "et"]


def test_what_runs_was_measured_and_nothing_else():
    assert all(bool(paper.measured) == paper.runs for paper in every())


def test_switches_name_keys_that_exist():
    known = sections()
    rooms = {"serve"}.union(*registry.ROOMS.values())
    for paper in every():
        for switch in paper.switches:
            section, _, rest = switch.partition(".")
            assert section in rooms and rest.partition("=")[0] in known[section].model_fields, switch


@pytest.mark.parametrize("word", ["GPTQ", "gptq", "E.T.", "zero++", "Deja Vu"])
def test_find_takes_either_name_in_any_case(word):
    assert word.lower() in (index.find(word).name, index.find(word).system.lower())


def test_find_offers_the_nearest_name():
    with pytest.raises(UserError) as fault:
        index.find("smoothqant")
    assert fault.value.fix == "did you mean `smoothquant`?"


def test_listing_leaves_torch_out():
    code = "import sys; from lilliput.papers import index; [p.status for g in index.papers().values() for p in g]; "
    code += "print({'torch', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_checkpointing_claim_holds_here():
    finding = index.find("checkpointing").run()
    assert finding.holds, finding.summary
    assert finding.summary == index.find("checkpointing").measured, "the table of `lilliput papers` tells another number"
    rows = {row["layers"]: row for row in finding.rows}
    small, large = min(rows), max(rows)
    grown = large / small
    assert rows[large]["plain"] / rows[small]["plain"] == pytest.approx(grown, rel=0.15)
    assert rows[large]["sqrt"] / rows[small]["sqrt"] == pytest.approx(grown**0.5, rel=0.15)
    assert rows[large]["recursive"] - rows[small]["recursive"] <= math.log2(grown) + 1
    assert all(n < row["forwards, sqrt"] < 2 * n for n, row in rows.items())


def test_poet_claim_holds_here():
    finding = index.find("poet").run()
    assert finding.holds, finding.summary
    assert finding.summary == index.find("poet").measured, "the table of `lilliput papers` tells another number"
    assert all(row["together"] <= min(row["again only"], row["paging only"]) for row in finding.rows)


def test_zero_offload_claim_holds_here():
    finding = index.find("zero-offload").run()
    assert finding.holds, finding.summary
    assert finding.summary == index.find("zero-offload").measured, "the table of `lilliput papers` tells another number"
    found = [(row["link, bytes a parameter"], row["device, bytes a parameter"]) for row in finding.rows]
    assert found == [(0, 16), (4, 14), (4, 4), (4, 2), (4, 2), (4, 2), (4.1, 2)]


def test_qlora_claim_holds_here():
    finding = index.find("qlora").run()
    assert finding.holds, finding.summary
    assert finding.summary == index.find("qlora").measured, "the table of `lilliput papers` tells another number"
    assert [row["bits a weight"] for row in finding.rows[:2]] == [4.127, 4.5]


@pytest.mark.slow
def test_fp8_claim_holds_here():
    """Two minutes. The order of losses is the claim; their last digits are this machine's."""
    finding = index.find("fp8").run()
    assert finding.holds, finding.summary
    ratio = {(row["scaling"], row["b"]): row["to fp32"] for row in finding.rows}
    assert ratio["amax", ""] <= 1.005 and ratio["cscale", 0] > 1.03 and ratio["cscale", 6] <= 1.005 < min(ratio["cscale", -8], ratio["cscale", 16])


@pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
def test_flashattention_claim_holds_here():
    finding = index.find("flashattention-2").run()
    assert finding.holds, finding.summary
    assert finding.summary == index.find("flashattention-2").measured, "the table of `lilliput papers` tells another number"
    assert [(row["tiles, causal"], row["tiles, full"]) for row in finding.rows] == [(10, 16), (36, 64), (136, 256)]


@pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
def test_bytetransformer_claim_holds_here():
    finding = index.find("bytetransformer").run()
    assert finding.holds, finding.summary
    assert finding.summary == index.find("bytetransformer").measured, "the table of `lilliput papers` tells another number"
    assert [row["form"] for row in finding.rows] == ["packed", "padded", "padded / packed"]


@pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
def test_deepspeed_inference_claim_holds_here():
    finding = index.find("deepspeed-inference").run()
    assert finding.holds, finding.summary
    assert finding.summary == index.find("deepspeed-inference").measured, "the table of `lilliput papers` tells another number"
    counted = {(row["form"], row["sequences"]): row for row in finding.rows if row["weights"] == "fp32"}
    assert all(counted["eager", batch]["torch operations"] > 100 and counted["fused", batch]["torch operations"] == 0 for batch in (1, 4, 16))
    assert counted["fused", 16]["results, KiB"] < counted["eager", 16]["results, KiB"] / 4, "all layers use the same scratch"


@pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
def test_et_claim_holds_here():
    finding = index.find("et").run()
    assert finding.holds, finding.summary
    assert finding.summary == index.find("et").measured, "the table of `lilliput papers` tells another number"
    assert [row["partial, KiB"] for row in finding.rows] == [64, 1024, 4096, 16384, ""], "every score of a head, in whole tiles"
    assert [row["auto is"] for row in finding.rows] == ["strip", "strip", "strip", "tiled", ""]


def test_pagedattention_claim_holds_here():
    finding = index.find("vllm").run()
    assert finding.holds, finding.summary
    assert finding.summary == index.find("vllm").measured, "the table of `lilliput papers` tells another number"
    saved = {row["what"]: row["live, %"] for row in finding.rows if "saved" in row["what"]}
    for kind in ("parallel", "beam"):
        two, four, six = (saved[f"{kind}, {width} answers: saved"] for width in (2, 4, 6))
        assert two < four < six, "more answers share more"


def test_speculative_claim_holds_here():
    finding = index.find("speculative-decoding").run()
    assert finding.holds, finding.summary
    assert finding.summary == index.find("speculative-decoding").measured, "the table of `lilliput papers` tells another number"
    assert all(row["passes"] + row["accepted"] == row["passes without"] for row in finding.rows[:4])
    assert all(row["guessed"] > row["accepted"] > 0 and row["tokens a pass"] == pytest.approx(row["formula"], rel=0.03) for row in finding.rows[-2:])


@pytest.mark.slow
@pytest.mark.skipif(native.module() is None, reason=str(native.missing()))
@pytest.mark.parametrize("name", ["h2o", "streamingllm"])
def test_cache_policies_claims_hold_here(name, smollm2):
    """One to three minutes each: SmolLM2 scores 20,000 tokens with keys leaving its cache."""
    from lilliput.models import hub

    try:
        hub.locate("data:shakespeare")
    except UserError as error:
        pytest.skip(f"needs the plays in the cache: run `lilliput pull data:shakespeare` ({error.what})")
    finding = index.find(name).run()
    assert finding.holds, finding.summary
    assert finding.summary == index.find(name).measured, "the table of `lilliput papers` tells another number"


def test_zero_infinity_claim_holds_here():
    finding = index.find("zero-infinity").run()
    assert finding.holds, finding.summary
    assert finding.summary == index.find("zero-infinity").measured, "the table of `lilliput papers` tells another number"
    assert [row["states, TiB"] for row in finding.rows] == [1.83, 9.16, 18.31, 182.81, 1845.7]
