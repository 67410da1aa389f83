"""The generated pages, and the hand-written ones beside them: what they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lilliput.base import registry
from lilliput.base.job import sections
from lilliput.cli import reference
from lilliput.cli.main import VERBS

REPO = Path(__file__).parents[2]


def test_reference_has_every_verb_key_and_room():
    text = reference.generate()
    for verb in VERBS:
        assert f"### lilliput {verb}\n" in text
    for name, cls in sections().items():
        for key, info in cls.model_fields.items():
            word = key if name == "job" else f"{name}.{key}"
            row = next((line for line in text.splitlines() if line.startswith(f"| `{word}` |")), "")
            assert row, f"{word} is not in the reference"
            assert info.description and info.description in row, f"{word} has no meaning in the reference"
    for table in registry.ROOMS.values():
        assert all(f"| `{room}` |" in text for room in table)


def test_tables_keep_their_columns():
    rows = [line for line in reference.generate().splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (4, 5) for row in rows), "a cell with a bare | would break its table"


def test_concepts_hold_each_lesson_whole():
    text = reference.concepts()
    assert "GPT-3 175B trained with 10,000x fewer" in text and "arXiv 1604.06174" in text
    assert text.count("```text") == sum(len(table) for table in registry.ROOMS.values())


def test_pages_do_not_depend_on_the_terminal(monkeypatch):
    before = reference.generate()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert reference.generate() == before


def test_write_makes_both_pages(tmp_path):
    assert [page.name for page in reference.write(tmp_path)] == ["reference.md", "concepts.md"]
    assert (tmp_path / "reference.md").read_text(encoding="utf-8") == reference.generate()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/tour.md", "docs/reference.md", "docs/concepts.md"])
def test_links_lead_somewhere(page):
    file = REPO / page
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (file.parent / link).exists()] == []


def test_tour_reads_eight_files():
    assert len(re.findall(r"^\d\. \[", (REPO / "docs" / "tour.md").read_text(encoding="utf-8"), re.M)) == 8


def test_readme_fits_and_its_floors_exist():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    floors = re.search(r"```\n(cli api .*?)```", text, re.S)[1]
    named = [name for line in floors.splitlines() for name in line[:24].split()]
    assert [name for name in named if not (REPO / "src" / "lilliput" / name).exists() and not (REPO / "src" / "lilliput" / f"{name}.py").exists()] == []
