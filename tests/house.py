"""The house rules as functions over a tree of Python files: each gives the violations it finds, as `file:line what`.

tests/test_house.py holds the source to them, and proves with tiny bad files that each one bites.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# Highest floor first; inside a floor a package may import those to its right. "|" = the packages of that floor are blind to each other.
FLOORS = (
    ("cli", "api", "web"),
    ("papers", "agents", "loops", "plan"),
    ("train", "|", "compress", "|", "serve"),
    ("parallel", "memory", "models", "data"),
    ("dist", "ops"),
    ("base",),
)
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names if name != "|"}
TECHNIQUE_FREE = ("loops/", "serve/engine.py", "parallel/rig.py")
FILE_LINES, FUNCTION_LINES, COLUMNS, LESSON_LINES = 400, 80, 160, 25


@dataclass(frozen=True)
class Source:
    """One file of a package: `module` is dotted ("lilliput.base.config"), `path` is relative to the package's root."""

    root: Path
    path: str

    @cached_property
    def text(self) -> str:
        return (self.root / self.path).read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def module(self) -> str:
        parts = [self.root.name, *self.path.removesuffix(".py").split("/")]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)} {what}"


def sources(root: Path) -> list[Source]:
    """Every Python file under a package's root (or a folder of tests)."""
    return [Source(root, p.relative_to(root).as_posix()) for p in sorted(root.rglob("*.py"))]


def imports(source: Source, known: set[str], typing: bool = False) -> Iterator[tuple[ast.AST, str]]:
    """(node, dotted module) of each import of the package itself, also inside functions; `typing`: also under TYPE_CHECKING."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing:
            skipped |= {inner for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(source.tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = source.module.split(".")
                parts = parts if source.path.endswith("__init__.py") else parts[:-1]
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            targets = [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names]
        else:
            continue
        yield from ((node, target) for target in dict.fromkeys(targets) if target.split(".")[0] == source.root.name)


def floors(root: Path) -> list[str]:
    """Imports go down; on one floor only to the right; packages of train | compress | serve never each other.

    Imports for type checkers count too, but in base/protocols.py, whose contracts name what stands on them.
    """
    files, found = sources(root), []
    known = {s.module for s in files}
    for source in files:
        mine = _package(source.module)
        for node, target in imports(source, known, typing=source.path != "base/protocols.py"):
            theirs = _package(target)
            if mine == theirs:
                continue
            if mine not in FLOOR or theirs not in FLOOR:
                found.append(source.at(node, f"{mine if mine not in FLOOR else theirs} has no place on any floor"))
            elif FLOOR[theirs] < FLOOR[mine]:
                found.append(source.at(node, f"{mine} imports {theirs}, which is above it"))
            elif FLOOR[theirs] == FLOOR[mine]:
                row = FLOORS[FLOOR[mine]]
                if "|" in row:
                    found.append(source.at(node, f"{mine} imports {theirs}: they are blind to each other"))
                elif row.index(theirs) < row.index(mine):
                    found.append(source.at(node, f"{mine} imports {theirs}, which is left of it"))
    return found


def _package(module: str) -> str:
    """The package on a floor; the root module itself is the public names (api)."""
    parts = module.split(".")
    return {"__main__": "cli"}.get(parts[1], parts[1]) if len(parts) > 1 else "api"


def cycles(root: Path) -> list[str]:
    """Import cycles between modules, imports inside functions included."""
    files = sources(root)
    known = {s.module for s in files}
    graph = {s.module: {t for _, t in imports(s, known) if t in known and t != s.module} for s in files}
    found: list[str] = []
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append("cycle " + " -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph[module]):
                walk(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        walk(module, [])
    return found


def sizes(root: Path) -> list[str]:
    """A file has at most 400 lines, a function 80, a line 160 columns."""
    found = []
    for source in sources(root):
        lines = source.text.splitlines()
        if len(lines) > FILE_LINES:
            found.append(f"{source.path}:1 has {len(lines)} lines, at most {FILE_LINES}")
        found += [f"{source.path}:{n} has {len(line)} columns, at most {COLUMNS}" for n, line in enumerate(lines, 1) if len(line) > COLUMNS]
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES:
                found.append(source.at(node, f"{node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines, at most {FUNCTION_LINES}"))
    return found


def techniques(root: Path, rooms: dict[str, str]) -> list[str]:
    """The loops, the engine and the rig name no registered technique. `rooms`: name -> "module:Class"."""
    places = {place.partition(":")[0] for place in rooms.values()}
    files, found = sources(root), []
    known = {s.module for s in files} | places
    for source in files:
        if not source.path.startswith(TECHNIQUE_FREE):
            continue
        found += [source.at(node, f"imports the room {target}") for node, target in imports(source, known, typing=True) if target in places]
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in rooms | dict.fromkeys(places):
                found.append(source.at(node, f"names the technique {node.value!r}"))
    return found


def calls(root: Path) -> list[str]:
    """No print outside base/show.py, no environment variable outside base/env.py, no assert without a message, nothing pickled."""
    found = []
    for source in sources(root):
        show, env = source.path == "base/show.py", source.path == "base/env.py"
        for node in ast.walk(source.tree):
            name = _dotted(node.func) if isinstance(node, ast.Call) else ""
            if not show and (
                name in ("print", "pprint", "pprint.pprint") or re.fullmatch(r"sys\.(__)?std(out|err)(__)?\.(buffer\.)?write|(typer|click)\.s?echo", name)
            ):
                found.append(source.at(node, f"{name}: base/show.py is the only printer"))
            touched = _dotted(node) if isinstance(node, ast.Attribute) else ""
            taken = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) and node.module == "os" else set()
            if not env and (
                touched in ("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv") or taken & {"environ", "getenv", "environb", "putenv"}
            ):
                found.append(source.at(node, "environment variable: base/env.py is the only reader"))
            if isinstance(node, ast.Assert) and node.msg is None:
                found.append(source.at(node, "assert without a message"))
            imported = {a.name for a in node.names} if isinstance(node, ast.Import) else {node.module} if isinstance(node, ast.ImportFrom) else set()
            if imported & {"pickle", "dill", "cloudpickle", "joblib"} or name in ("torch.load", "torch.save"):
                found.append(source.at(node, "pickle: weights and states are safetensors and JSON"))
    return found


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def documented(root: Path) -> list[str]:
    """Every file has its lesson (at most 25 lines); every public class, function and method a docstring and annotations."""
    found = []
    for source in sources(root):
        lesson = ast.get_docstring(source.tree)
        if source.tree.body and lesson is None:
            found.append(f"{source.path}:1 has no docstring")
        elif lesson and len(lesson.splitlines()) > LESSON_LINES:
            found.append(f"{source.path}:1 has a docstring of {len(lesson.splitlines())} lines, at most {LESSON_LINES}")
        for node, name in _public(source.tree.body, ""):
            if ast.get_docstring(node) is None and not name.endswith(".__init__") and not _setter(node):
                found.append(source.at(node, f"{name} has no docstring"))
            if not isinstance(node, ast.ClassDef) and (bare := _bare(node, "." in name)):
                found.append(source.at(node, f"{name} does not annotate {', '.join(bare)}"))
    return found


def _public(body: list[ast.stmt], owner: str) -> Iterator[tuple[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            yield from _public([*node.body, *node.orelse], owner)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (not node.name.startswith("_") or (owner and node.name == "__init__")):
            yield node, owner + node.name
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{owner}{node.name}.")


def _setter(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """The second half of a property: its docstring stands on the first."""
    return any(isinstance(d, ast.Attribute) and d.attr in ("setter", "deleter") for d in node.decorator_list)


def _bare(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> list[str]:
    static = any(_dotted(d) == "staticmethod" for d in node.decorator_list)
    arguments = [*node.args.posonlyargs, *node.args.args][1 if method and not static else 0 :] + node.args.kwonlyargs
    arguments += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
    return [a.arg for a in arguments if a.annotation is None] + (["what it returns"] if node.returns is None else [])


def torch_loaded(modules: list[str], path: Path | None = None) -> str | None:
    """The first of these modules after whose import torch is loaded, in a fresh interpreter; None when none loads it."""
    lines = ["import importlib, sys", f"for module in {modules!r}:", "    importlib.import_module(module)"]
    lines += ["    if 'torch' in sys.modules:", "        sys.stderr.write('\\nLOADED ' + module)", "        break"]
    told = _fresh("\n".join(lines), path)
    return told.removeprefix("LOADED ") if told.startswith("LOADED ") else None


def torch_loaded_by_code(code: str, path: Path | None = None) -> bool:
    """Whether torch is loaded after this code has run in a fresh interpreter."""
    return _fresh(f"{code}\nimport sys\nsys.stderr.write('\\nLOADED' if 'torch' in sys.modules else '')", path) == "LOADED"


def _fresh(code: str, path: Path | None) -> str:
    """The last line on stderr; AssertionError where the code fails. `path` goes before everything else on the import path."""
    before = f"import sys\nsys.path[:0] = {[str(path)] if path else []!r}\n"
    answer = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, f"the code does not run: {answer.stderr}"
    return (answer.stderr.strip().splitlines() or [""])[-1]


def help_faults(text: str, verb: str, lines: int = 45, examples: int = 3) -> list[str]:
    """A verb's help fits a screen and has three examples to paste."""
    count = len(text.strip().splitlines())
    shown = len(re.findall(rf"^\s*(?:\w+=\S+ |.*\| )?lilliput {verb}\b", re.sub(r"^\s*usage:.*$", "", text, flags=re.M | re.I), re.M))
    found = [f"help of {verb} has {count} lines, at most {lines}"] if count > lines else []
    return found + ([f"help of {verb} has {shown} examples, at least {examples}"] if shown < examples else [])
