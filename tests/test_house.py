"""The house rules of the design, held against the source, and each one proven to bite on a tiny bad file.

After a wanted change of a verb's help or of the public names: `python tests/test_house.py` writes the snapshots anew;
`make docs` writes docs/reference.md anew. Read the difference before you commit it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import house
import pytest

import lilliput
from lilliput.base import registry

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "src" / "lilliput"
SNAPSHOTS = REPO / "tests" / "snapshots"
ROOMS = {name: place for table in registry.ROOMS.values() for name, place in table.items()}
# Files that must answer before torch loads: whole packages by their folder, single modules by name.
TORCH_FREE = ("base", "plan", "cli", "papers", "models.spec", "models.families", "models.facts", "models.hub", "models.gguf", "models.sizes")


def verbs() -> list[str]:
    from lilliput.cli.main import VERBS

    return list(VERBS)


def help_text(verb: str) -> str:
    """A verb's help at 100 columns, without colour."""
    from typer.testing import CliRunner

    from lilliput.cli.main import application

    environment = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
    result = CliRunner().invoke(application(), [verb, "--help"], prog_name="lilliput", env=environment)
    assert result.exit_code == 0, f"lilliput {verb} --help exits with {result.exit_code}: {result.output}"
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines()) + "\n"


def snapshots() -> dict[str, str]:
    """File name -> what it must hold."""
    return {"public_names.txt": "\n".join(lilliput.__all__) + "\n"} | {f"help_{verb}.txt": help_text(verb) for verb in verbs()}


def torch_free_modules() -> list[str]:
    modules = [s.module for s in house.sources(PACKAGE)]
    places = tuple(f"lilliput.{name}" for name in TORCH_FREE)
    free = [m for m in modules if m in places or m.startswith(tuple(p + "." for p in places))]
    return ["lilliput", *free, *(place.partition(":")[0] for place in ROOMS.values())]


RULES = [house.floors, house.cycles, house.sizes, house.calls, house.documented]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_keeps_rule(rule) -> None:
    assert rule(PACKAGE) == [], rule.__doc__


def test_source_names_no_technique() -> None:
    assert house.techniques(PACKAGE, ROOMS) == [], house.techniques.__doc__


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_other_python_keeps_sizes(folder: str) -> None:
    assert house.sizes(REPO / folder) == [], house.sizes.__doc__


def test_torch_free_files_leave_torch_out() -> None:
    assert house.torch_loaded(torch_free_modules()) is None


def test_help_leaves_torch_out() -> None:
    words = "import sys; from lilliput.cli.main import run; sys.argv = ['lilliput', '--help']\n"
    words += "try: run()\nexcept SystemExit as stop: assert not stop.code, stop.code"
    assert house.torch_loaded_by_code(words) is False


def test_importing_the_job_loads_nothing_heavy() -> None:
    import subprocess

    heavy = ("torch", "numpy", "matplotlib", "rich", "typer", "transformers", "tokenizers", "huggingface_hub", "psutil")
    words = f"import sys, lilliput.base.job; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_public_names_are_few_and_real() -> None:
    assert len(lilliput.__all__) <= 20
    assert sorted(lilliput.__all__) == lilliput.__all__ == dir(lilliput)
    assert all(getattr(lilliput, name) is not None for name in lilliput.__all__)


def test_snapshots() -> None:
    wanted = snapshots()
    stored = {p.name: p.read_text(encoding="utf-8") for p in SNAPSHOTS.glob("*.txt")}
    assert sorted(stored) == sorted(wanted), "snapshots and verbs differ: python tests/test_house.py writes them anew"
    for name, text in wanted.items():
        assert stored[name] == text, f"{name} changed: python tests/test_house.py writes it anew"


def test_help_fits_a_screen_with_examples() -> None:
    assert [fault for verb in verbs() for fault in house.help_faults(help_text(verb), verb)] == []


def test_reference_is_as_generated() -> None:
    from lilliput.cli import reference

    assert (REPO / "docs" / "reference.md").read_text(encoding="utf-8") == reference.generate(), "run `make docs`"
    assert (REPO / "docs" / "concepts.md").read_text(encoding="utf-8") == reference.concepts(), "run `make docs`"


# Each rule bites: (rule, file, content, part of the message). The good twin of each file passes in test_good_tree_is_silent.
BAD = [
    (house.floors, "ops/a.py", "import lilliput.models.b", "ops imports models, which is above it"),
    (house.floors, "ops/a.py", "def f():\n    from lilliput import models", "above it"),
    (house.floors, "ops/a.py", "from ..models.b import x", "above it"),
    (house.floors, "data/a.py", "from lilliput.models.b import x", "data imports models, which is left of it"),
    (house.floors, "serve/a.py", "from lilliput.train import lora", "blind to each other"),
    (house.floors, "train/a.py", "from lilliput.serve.x import y", "blind to each other"),
    (house.floors, "base/a.py", "if TYPE_CHECKING:\n    from lilliput.ops import x", "above it"),
    (house.floors, "loops/a.py", "import lilliput", "loops imports api, which is above it"),
    (house.floors, "attic/a.py", "from lilliput.base import env", "attic has no place on any floor"),
    (house.cycles, "ops/a.py", "from lilliput.ops import b\n", "cycle lilliput.ops.a -> lilliput.ops.b -> lilliput.ops.a"),
    (house.cycles, "ops/b.py", "def f():\n    from .a import x\n    from .b2 import y", "cycle lilliput.ops.a -> lilliput.ops.b -> lilliput.ops.a"),
    (house.sizes, "ops/a.py", "x = 1\n" * 401, "has 401 lines"),
    (house.sizes, "ops/a.py", "def f():\n" + "    x = 1\n" * 80, "f has 81 lines"),
    (house.sizes, "ops/a.py", "class C:\n    async def g(self):\n" + "        x = 1\n" * 80, "g has 81 lines"),
    (house.sizes, "ops/a.py", "#" * 161, "has 161 columns"),
    (house.calls, "ops/a.py", "print('x')", "only printer"),
    (house.calls, "ops/a.py", "import sys\nsys.stderr.write('x')", "only printer"),
    (house.calls, "cli/a.py", "import typer\ntyper.echo('x')", "only printer"),
    (house.calls, "ops/a.py", "import os\nx = os.environ['A']", "only reader"),
    (house.calls, "ops/a.py", "import os\nx = os.getenv('A')", "only reader"),
    (house.calls, "ops/a.py", "from os import environ", "only reader"),
    (house.calls, "ops/a.py", "assert 1", "assert without a message"),
    (house.calls, "ops/a.py", "import pickle", "pickle"),
    (house.calls, "ops/a.py", "import torch\ntorch.load('x')", "pickle"),
    (house.documented, "ops/a.py", "x = 1", "has no docstring"),
    (house.documented, "ops/a.py", '"""' + "a\n" * 26 + '"""', "docstring of 26 lines"),
    (house.documented, "ops/a.py", '"""A."""\ndef f() -> None:\n    pass', "f has no docstring"),
    (house.documented, "ops/a.py", '"""A."""\nclass C:\n    """C."""\n    def m(self) -> None:\n        pass', "C.m has no docstring"),
    (house.documented, "ops/a.py", '"""A."""\nclass C:\n    x = 1', "C has no docstring"),
    (house.documented, "ops/a.py", '"""A."""\ndef f(x, *rest, y=1):\n    """F."""', "f does not annotate x, y, rest, what it returns"),
    (house.documented, "ops/a.py", '"""A."""\nclass C:\n    """C."""\n    def __init__(self, x) -> None: ...', "C.__init__ does not annotate x"),
]


def tree(folder: Path, files: dict[str, str]) -> Path:
    root = folder / "lilliput"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


GOOD = {
    "__init__.py": '"""Names."""\nfrom lilliput import loops\n',
    "base/show.py": '"""Prints."""\nprint("x")\n',
    "base/env.py": '"""Reads."""\nimport os\nx = os.environ.get("A")\n',
    "base/protocols.py": '"""Contracts."""\nif TYPE_CHECKING:\n    from lilliput.parallel.rig import Rig\n',
    "ops/a.py": '"""A."""\nimport lilliput.base.env\ndef f(x: int) -> int:\n    """F."""\n    assert x, "x is 0"\n    def inner(y): ...\n    return inner(x)\n',
    "ops/b.py": '"""B."""\nfrom lilliput.ops.a import f\nif TYPE_CHECKING:\n    from lilliput.ops import c\n',
    "ops/c.py": '"""C."""\nfrom . import b\n',
    "parallel/rig.py": '"""Rig."""\nfrom lilliput.models import x\nname = "lorax"\n',
    "models/x.py": '"""X."""\nimport lilliput.data.y\n',
    "data/y.py": '"""Y."""\nclass C:\n    """C."""\n    def __init__(self, x: int) -> None: ...\n    def _hidden(self, x): ...\n',
    "loops/train.py": '"""Loop."""\nfrom lilliput.plan import p\nfrom lilliput.train import checkpoint\n',
    "plan/p.py": '"""P."""\n',
    "train/checkpoint.py": '"""C."""\n',
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_good_tree_is_silent(tmp_path: Path, rule) -> None:
    assert rule(tree(tmp_path, GOOD)) == []


@pytest.mark.parametrize(("rule", "name", "text", "message"), BAD, ids=[f"{rule.__name__}-{message[:24]}" for rule, _, _, message in BAD])
def test_rule_bites(tmp_path: Path, rule, name: str, text: str, message: str) -> None:
    other = {"ops/b.py": "from lilliput.ops import a"} if rule is house.cycles and name.endswith("a.py") else {}
    other |= {"ops/a.py": "import lilliput.ops.b"} if rule is house.cycles and name.endswith("b.py") else {}
    extra = {"models/__init__.py": "", "models/b.py": "x = 1", "ops/b2.py": ""} if rule in (house.floors, house.cycles) else {}
    found = rule(tree(tmp_path, {name: text, **other, **extra}))
    assert len(found) == 1, found
    assert message in found[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("loops/a.py", "from lilliput.train.lora import Lora", "imports the room lilliput.train.lora"),
        ("loops/deep/a.py", "def f():\n    from lilliput.train import lora", "imports the room"),
        ("serve/engine.py", "x = 'full'", "names the technique 'full'"),
        ("parallel/rig.py", "def f(rooms): return rooms['lora']", "names the technique 'lora'"),
        ("parallel/rig.py", "import importlib\nimportlib.import_module('lilliput.train.lora')", "names the technique"),
    ],
)
def test_technique_rule_bites(tmp_path: Path, name: str, text: str, message: str) -> None:
    rooms = {"lora": "lilliput.train.lora:Lora", "full": "lilliput.serve.policies.full:Full"}
    found = house.techniques(tree(tmp_path, {name: text}), rooms)
    assert len(found) == 1 and message in found[0], found
    assert house.techniques(tree(tmp_path / "other", {"plan/a.py": text}), rooms) == []


def test_torch_rule_bites(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "light.py").write_text("def f():\n    import torch\n")
    (tmp_path / "heavy.py").write_text("import torch\n")
    assert house.torch_loaded(["light"], tmp_path) is None
    assert house.torch_loaded(["light", "heavy"], tmp_path) == "heavy"
    assert house.torch_loaded_by_code("import light", tmp_path) is False
    assert house.torch_loaded_by_code("import light; light.f()", tmp_path) is True
    with pytest.raises(AssertionError, match="No module named 'absent'"):
        house.torch_loaded(["absent"], tmp_path)


def test_help_rule_bites() -> None:
    good = "Usage: lilliput pull [OPTIONS]\n\n  lilliput pull\n  lilliput pull x\n  lilliput pull data:y\n"
    assert house.help_faults(good, "pull") == []
    assert house.help_faults(good.replace("pull x", "chat x"), "pull") == ["help of pull has 2 examples, at least 3"]
    assert house.help_faults(good + "\n  word" * 50, "pull") == ["help of pull has 56 lines, at most 45"]


if __name__ == "__main__":
    from lilliput.base import records

    for old in SNAPSHOTS.glob("*.txt"):
        old.unlink()
    for name, text in snapshots().items():
        records.atomic_write(SNAPSHOTS / name, text)
