"""ZeRO-Offload's cut against the paper's table 1 and against a second enumeration that knows nothing of the first."""

from __future__ import annotations

import itertools

from lilliput.memory.planners.mincut import EDGES, STATES, WORK, Cut, best, cheapest, cuts

UPDATE = frozenset({"update", "float2half", "p32", "m32", "v32"})


def test_table_1() -> None:
    """(g16, update) on device or host -> bytes a parameter on the device, the saving, bytes on the link."""
    rows = {"device, device": Cut(frozenset()), "host, device": Cut(frozenset({"g16"})), "device, host": Cut(UPDATE), "host, host": Cut(UPDATE | {"g16"})}
    assert {name: (cut.device, round(cut.saving, 2), cut.traffic) for name, cut in rows.items()} == {
        "device, device": (16, 1.0, 0), "host, device": (14, 1.14, 4), "device, host": (4, 4.0, 4), "host, host": (2, 8.0, 4),
    }  # fmt: skip


def test_the_optimum_is_unique_and_the_papers() -> None:
    found = cheapest()
    assert best().host == UPDATE | {"g16"} and best().traffic == 4
    assert [cut.device for cut in found] == [2, 4, 14], "three cuts move 4 bytes, and no two of them free the same"
    assert {cut.host for cut in found} == {UPDATE | {"g16"}, UPDATE, frozenset({"g16"})}


def test_every_partition_was_tried() -> None:
    nodes = [*STATES, *WORK]
    assert len({cut.host for cut in cuts()}) == len(list(cuts())) == 2 ** (len(nodes) - 1)
    for sides in itertools.product((False, True), repeat=len(nodes)):
        host = {node for node, side in zip(nodes, sides) if side}
        crossing = sum(w for a, b, w in EDGES if (a in host) + (b in host) == 1)
        if host and "FWD-BWD" not in host:
            assert crossing > 4 or host in ({"g16"}, UPDATE, UPDATE | {"g16"})


def test_no_way_out_is_cheaper_than_two_edges() -> None:
    """Every node is on a cycle, and nothing of fp32 can cross for less than 6 bytes."""
    for node in (*STATES, *WORK):
        assert any(a == node for a, _, _ in EDGES) and any(b == node for _, b, _ in EDGES), node
    split = [cut for cut in cuts() if cut.host & UPDATE and not cut.host >= UPDATE]
    assert min(cut.traffic for cut in split) >= 6
