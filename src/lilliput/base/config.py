"""Config: strict pydantic models <-> TOML <-> `section.key=value`, where every value knows its source.

A section is one class; a job is the sections that are present. Words win in this order: default, file, flag (the
command line), argument (Python keywords). A key that no section has, or a value of the wrong type, is a UserError
that names the key, what was wanted, what came, and a line to paste. Nothing is guessed but one thing: text on the
command line (`data.path=2024`) is read as TOML first and as plain text only where the TOML value does not fit.
TOML has no null, so a section says "auto" or "" and never None, unless None is the default of an optional key.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from lilliput.base.errors import UserError

TOP = "job"  # the section whose keys are written without a prefix
SWITCH = {True: True, "on": True, "true": True, False: False, "off": False, "false": False}


class Section(BaseModel):
    """Base of every config section and room: frozen, and an unknown key is an error.

    In a room, class attributes that are not config (`needs`) must be `ClassVar`, or they become keys.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


@dataclass(frozen=True)
class Settings:
    """Checked sections of one job. Equal when the same sections are present with the same values, whatever the sources."""

    classes: Mapping[str, type[Section]] = field(compare=False, repr=False)
    values: Mapping[str, Section]  # the sections that are present
    sources: dict[str, str] = field(compare=False, repr=False)  # "train.lr" or "model" -> "default", "file job.toml:3", "flag", ...

    def section(self, name: str) -> Any:
        """The section; its defaults when it is absent."""
        return self.values[name] if name in self.values else self.classes[name]()

    def present(self, name: str) -> bool:
        """Whether the section is on: given by a file, a flag or a keyword, or one of those that always are."""
        return name in self.values

    def given(self, name: str) -> bool:
        """Whether a file, a flag or a keyword set any value of the section."""
        return any(source != "default" for key, source in self.sources.items() if _split(key)[0] == name)

    def with_auto(self, key: str, value: Any, reason: str) -> Settings:
        """These settings with an "auto" filled in; its source becomes `auto: reason`. UserError when the value does not fit."""
        name, short = _split(key)
        assert name in self.values, f"with_auto({key!r}): section `{name}` is absent"
        assert getattr(self.values[name], short) == "auto", f"with_auto({key!r}): the value is {getattr(self.values[name], short)!r}, not auto"
        source = f"auto: {reason}"
        given = {k: v for k, v in dict(self.values[name]).items() if k in self.values[name].model_fields_set} | {short: value}
        checked = _build(name, self.classes[name], {k: (v, None, source) for k, v in given.items()})
        return replace(self, values={**self.values, name: checked}, sources={**self.sources, key: source})

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values ready for JSON: top-level keys first, then one dictionary a section."""
        plain = {name: section.model_dump(mode="json") for name, section in self.values.items()}
        return {**plain.pop(TOP, {}), **plain}

    def flat(self) -> dict[str, Any]:
        """Every value by the key that `sources` has for it: "model", "train.lr", "lora.rank"."""
        return {_join(name, k): getattr(section, k) for name, section in self.values.items() for k in type(section).model_fields}

    def to_toml(self) -> str:
        """The present sections, every key written out, as TOML that loads back to equal settings."""
        lines: list[str] = []
        for name in sorted(self.values, key=lambda n: n != TOP):  # top-level keys must stand before the first table
            lines += [] if name == TOP else ["", f"[{name}]"]
            lines += [f"{_word(k)} = {toml_value(v)}" for k, v in self.values[name].model_dump().items() if v is not None]
        return "\n".join(lines).strip() + "\n"


def load(
    sections: Mapping[str, type[Section]],
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    given: Mapping[str, Any] | None = None,
    always: Iterable[str] = (TOP,),
) -> Settings:
    """Read a TOML file, then `key=value` strings, then keywords (dictionaries, sections or top-level values); later ones win.

    `always` names the sections that are present without being asked for and cannot be switched off.
    Raises UserError for an unreadable file, a TOML fault, an unknown key or section, a wrong type, a missing value.
    """
    always = [name for name in always if name in sections]
    on: dict[str, bool] = dict.fromkeys(always, True)
    raw: dict[str, dict[str, tuple[Any, str | None, str]]] = {name: {} for name in sections}  # key -> (value, its text, source)
    for key, value, text, source in [*_from_file(path), *_from_flags(overrides, sections), *_from_keywords(given or {})]:
        name, short = _split(key)
        if name == TOP and short in sections and short != TOP:  # `lora = true`, `lora=on`, `[lora]`
            on[short] = _switch(short, value, source, short in always)
            if not on[short]:
                raw[short] = {}
            continue
        if key.startswith(f"{TOP}.") or name not in sections or short not in sections[name].model_fields:
            raise _unknown(key, sections, source)
        on[name] = True
        raw[name][short] = (value, text, source)
    present = [name for name in sections if on.get(name)]
    values = {name: _build(name, sections[name], raw[name]) for name in present}
    sources = {_join(n, k): raw[n][k][2] if k in raw[n] else "default" for n in present for k in sections[n].model_fields}
    return Settings(sections, values, sources)


def toml_value(value: Any) -> str:
    """A plain value (text, number, truth, list, dictionary) written as TOML on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but for DEL
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_word(k)} = {toml_value(v)}" for k, v in value.items() if v is not None) + "}"
    assert isinstance(value, (list, tuple)), f"no TOML form for {type(value).__name__} {value!r}"
    return "[" + ", ".join(toml_value(v) for v in value) + "]"


def wanted(info: FieldInfo) -> str:
    """What a key takes, in words: `an integer >= 1, or "auto"`."""
    bounds = [f"{sign} {getattr(m, name)}" for m in info.metadata for name, sign in _SIGNS.items() if getattr(m, name, None) is not None]
    return _kind(info.annotation, " and ".join(bounds))


_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_KINDS: dict[Any, str] = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}


def _kind(annotation: Any, bounds: str = "") -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(toml_value(a) for a in arguments)
    if origin in (Union, UnionType):
        return ", or ".join(_kind(a, bounds) for a in arguments if a is not type(None))
    if origin in (tuple, list):
        return f"a list of {_kind(arguments[0]).removeprefix('an ').removeprefix('a ')}" if arguments else "a list"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "a table {key = value}"
    name = _KINDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
    return f"{name} {bounds}" if bounds and annotation in (int, float) else name


def _word(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def _split(key: str) -> tuple[str, str]:
    name, dot, short = key.partition(".")
    return (name, short) if dot else (TOP, key)


def _join(name: str, short: str) -> str:
    return short if name == TOP else f"{name}.{short}"


def _frozen(value: Any) -> Any:
    """Lists become tuples (sections are frozen) and paths become text."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return {k: _frozen(v) for k, v in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _build(name: str, cls: type[Section], raw: Mapping[str, tuple[Any, str | None, str]]) -> Section:
    """The section from its raw values; flags that fail as TOML values are tried once more as text."""
    values = {k: _frozen(value) for k, (value, _, _) in raw.items()}
    texts = {k: text for k, (value, text, _) in raw.items() if text is not None and not isinstance(value, (list, dict))}
    for key, value in values.items():
        if isinstance(value, bool) and not _takes_truth(cls.model_fields[key].annotation):  # pydantic takes true for Literal[1]
            if key not in texts:
                raise _bad_value(name, cls, key, {"type": "bool"}, raw)
            values[key] = texts.pop(key)
    while True:
        try:
            return cls.model_validate(values, strict=True)
        except ValidationError as fault:
            first = fault.errors(include_url=False)[0]
            key = str(first["loc"][0]) if first["loc"] else ""
            if key not in texts:
                raise _bad_value(name, cls, key, first, raw) from None
            text = texts.pop(key)  # each flag gets one second reading
            values[key] = _leniently(cls, key, text) if values[key] == text else text


def _takes_truth(annotation: Any) -> bool:
    return annotation is bool or isinstance(annotation, bool) or any(_takes_truth(a) for a in get_args(annotation))


def _leniently(cls: type[Section], key: str, text: str) -> Any:
    """The text of a flag that is no TOML, read for this key (`.1`, `yes`); the text itself where that fails."""
    annotation: Any = cls.model_fields[key].annotation
    try:
        return TypeAdapter[Any](annotation).validate_strings(text)
    except ValidationError:
        return text


def _bad_value(name: str, cls: type[Section], key: str, fault: Any, raw: Mapping[str, tuple[Any, str | None, str]]) -> UserError:
    if not key:  # a validator of the whole section
        return UserError(f"section `{name}` is not valid", why=str(fault["msg"]).removeprefix("Value error, "), fix=f"change a key of `{name}`")
    full, info = _join(name, key), cls.model_fields[key]
    want = wanted(info)
    example = "..." if info.is_required() else toml_value(_frozen(info.get_default(call_default_factory=True)))
    fix = f"{full}={example}" + ("" if info.is_required() else " (the default)")
    if fault["type"] == "missing":
        return UserError(f"`{full}` is missing", why=f"wanted {want}", fix=fix)
    value, text, source = raw[key]
    got = text if text is not None else toml_value(_frozen(value)) if isinstance(value, (bool, int, float, str, list, tuple, dict)) else repr(value)
    detail = f"; {str(fault['msg']).removeprefix('Value error, ')}" if fault["type"] == "value_error" else ""
    return UserError(f"`{full}` cannot be {got}", why=f"wanted {want}; got {_KINDS.get(type(value), type(value).__name__)} from {source}{detail}", fix=fix)


def _unknown(key: str, sections: Mapping[str, type[Section]], source: str) -> UserError:
    """An unknown key, with the nearest known one: the same key of another section, then a near key of its own section, then a near section."""
    every = [_join(n, k) for n, cls in sections.items() for k in cls.model_fields]
    name, short = _split(key)
    mine = {k: _join(name, k) for k in sections[name].model_fields} if name in sections else {}
    near = [k for k in every if _split(k)[1] == short]
    near = near or [mine[k] for k in difflib.get_close_matches(short, mine, 1)]
    if not near and name not in sections:
        near = [f"{n}.{short}" for n in difflib.get_close_matches(name, sections, 1)]
    if not near and name == TOP:
        near = difflib.get_close_matches(short, [n for n in sections if n != TOP], 1)
    if not near:
        shorts = {_split(k)[1]: k for k in every}
        near = [shorts[s] for s in difflib.get_close_matches(short, shorts, 1, cutoff=0.75)]
    others = f"sections: {', '.join(n for n in sections if n != TOP)}"
    known = f"keys of {name}: {', '.join(sections[name].model_fields)}" if name in sections and name != TOP else others
    known += f"; top-level keys: {', '.join(mine)}" if name == TOP else ""
    options = ", ".join(f"`{k}`" for k in near[:3])
    return UserError(f"unknown key `{key}`", why=f"came from {source}", fix=f"did you mean {options}?" if near else known)


def _switch(name: str, value: Any, source: str, always: bool) -> bool:
    state = SWITCH.get(value.lower() if isinstance(value, str) else value) if isinstance(value, (bool, str)) else None
    if state is None:
        raise UserError(f"`{name}` cannot be {value!r}", why=f"{name} is a section (from {source})", fix=f"{name}=on, {name}=off, or {name}.KEY=VALUE")
    if always and not state:
        raise UserError(f"`{name}` cannot be off", why=f"every job has the section {name} (from {source})", fix=f"leave out {name}=off")
    return state


def _flat(table: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(key, value) pairs; a section given as a table comes as its switch (on) and one pair a key."""
    pairs: list[tuple[str, Any]] = []
    for name, body in table.items():
        if isinstance(body, Section):
            body = {k: getattr(body, k) for k in body.model_fields_set}
        if isinstance(body, Mapping):
            pairs += [(name, True), *((f"{name}.{k}", v) for k, v in body.items())]
        else:
            pairs.append((name, body))
    return pairs


def _from_file(path: str | Path | None) -> list[tuple[str, Any, None, str]]:
    if path is None:
        return []
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
        table = tomllib.loads(text)
    except OSError as fault:
        raise UserError(f"cannot read {path}", why=fault.strerror or str(fault), fix="name a TOML file that exists and can be read") from None
    except UnicodeDecodeError as fault:
        raise UserError(f"{path} is not UTF-8", why=f"byte {fault.start} is 0x{fault.object[fault.start]:02x}", fix="save the file as UTF-8") from None
    except (ValueError, RecursionError) as fault:
        spot = re.search(r"at line (\d+)", str(fault))
        number = int(spot[1]) if spot else len(text.splitlines())
        line = (text.splitlines() or [""])[min(number, len(text.splitlines())) - 1]
        raise UserError(
            f"{path.name}:{number} is not TOML", why=f"{fault}: {line.strip()!r}", fix='write key = value; text goes in quotes: model = "name"'
        ) from None
    lines = _lines(text)
    return [(key, value, None, f"file {path.name}" + (f":{lines[key]}" if key in lines else "")) for key, value in _flat(table)]


def _lines(text: str) -> dict[str, int]:
    """Key -> line for keys written plainly; keys inside inline tables or strings are left out."""
    found: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            table = header[1] + "."
            found.setdefault(header[1], number)
        elif pair := re.match(r"\s*([\w.-]+)\s*=", line):
            found.setdefault(table + pair[1], number)
    return found


def _from_flags(overrides: Iterable[str], sections: Mapping[str, type[Section]]) -> list[tuple[str, Any, str | None, str]]:
    pairs: list[tuple[str, Any, str | None, str]] = []
    for flag in overrides:
        key, equals, text = (part.strip() for part in flag.partition("="))
        if not equals or not key:
            raise UserError(f"`{flag}` is no key=value", why="settings on the command line are written section.key=value", fix=f"{key or 'train.steps'}=VALUE")
        try:
            value = tomllib.loads(f"v = {text}")["v"] if "\n" not in text else text
        except (ValueError, RecursionError):  # no TOML; a number of thousands of digits; thousands of brackets
            value = text
        if isinstance(value, dict) and key in sections:  # lora={rank = 8}
            pairs += [(k, v, None, "flag") for k, v in _flat({key: value})]
        else:
            pairs.append((key, value, text, "flag"))
    return pairs


def _from_keywords(given: Mapping[str, Any]) -> list[tuple[str, Any, None, str]]:
    return [(key, value, None, "argument") for key, value in _flat(given) if value is not None]
