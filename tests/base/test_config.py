"""Config: what wins, what is refused, and that a job written as TOML comes back equal."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from lilliput.base.config import Section, load, toml_value
from lilliput.base.errors import UserError


class Top(Section):
    """Top-level keys."""

    model: str = "tiny"
    seed: int = Field(0, ge=0)


class Train(Section):
    """A section with one key of every kind."""

    steps: int = Field(100, ge=1, le=10**9)
    lr: float = Field(3e-4, gt=0)
    micro_batch: int | Literal["auto"] = "auto"
    path: str | tuple[str, ...] = ""
    schedule: Literal["cosine", "wsd"] = "cosine"
    fast: bool = False
    sizes: tuple[int, ...] = (1, 2)
    weights: dict[str, float] = Field(default_factory=dict)
    note: str | None = None


class Zero(Section):
    """A room that has to be switched on."""

    stage: Literal[1, 2, 3] = 1
    every: int = 1

    @model_validator(mode="after")
    def _fits(self) -> Zero:
        if self.every > 7 and self.stage == 1:
            raise ValueError(f"every={self.every} needs stage >= 2")
        return self


class Named(Section):
    """A room with a key that has no default."""

    name: str


SECTIONS: dict[str, type[Section]] = {"job": Top, "train": Train, "zero": Zero, "named": Named}


def read(path: Path | None = None, *flags: str, **keywords: object):
    return load(SECTIONS, path, flags, keywords, always=("job", "train"))


def refused(*flags: str, path: Path | None = None, **keywords: object) -> UserError:
    with pytest.raises(UserError) as caught:
        read(path, *flags, **keywords)
    return caught.value


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "job.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_later_words_win_and_every_value_knows_its_source(file) -> None:
    path = file('model = "a"\ntrain.steps = 5\n\n[zero]\nstage = 2\n')
    job = read(path, "train.steps=6", "train.lr=0.1", train={"steps": 7})
    assert (job.section("job").model, job.section("train").steps, job.section("train").lr, job.section("zero").stage) == ("a", 7, 0.1, 2)
    wanted = {"model": "file job.toml:1", "seed": "default", "train.steps": "argument", "train.lr": "flag", "zero.stage": "file job.toml:5"}
    assert wanted.items() <= job.sources.items()
    assert read(path).sources["train.steps"] == "file job.toml:2"
    assert set(job.sources) == set(job.flat())


def test_defaults_alone() -> None:
    job = read()
    assert job.section("train") == Train() and not job.present("zero") and job.section("zero") == Zero()
    assert set(job.sources.values()) == {"default"} and "zero.stage" not in job.sources


@pytest.mark.parametrize("flag", ["zero=on", "zero=true", "zero={}", "zero.every=1", "zero={every = 1}"])
def test_a_room_is_on_when_its_section_is_present(flag: str) -> None:
    assert read(None, flag).present("zero")


def test_rooms_switch_on_and_off(file) -> None:
    assert read(file("[zero]")).present("zero") and read(file("zero = true")).present("zero")
    assert not read(file("zero = false")).present("zero")
    assert not read(file("[zero]\nstage = 2"), "zero=off").present("zero")
    assert read(file("[zero]\nstage = 2"), "zero=off", "zero.every=3").section("zero") == Zero(every=3)
    assert read(None, zero=True).present("zero") and read(None, zero={}).present("zero") and not read(None, zero=False).present("zero")
    assert read(None, zero=Zero(stage=3)).section("zero") == Zero(stage=3)
    assert not read(None, zero=None).present("zero")
    assert "zero is a section" in refused("zero=maybe").why
    assert "every job has the section train" in refused("train=off").why


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("train.lr=.5", 0.5), ("train.lr=1", 1.0), ("train.lr=1e-3", 1e-3), ("train.steps=1_000", 1000), ("train.fast=yes", True), ("train.fast=true", True),
        ("model=2024", "2024"), ("model=true", "true"), ('model="a b"', "a b"), ("model=a=b", "a=b"), ("model=", ""), ("model = x", "x"),
        ('train.path=["a", "b"]', ("a", "b")), ("train.path=[ab]*.txt", "[ab]*.txt"), ("train.path=a,b", "a,b"), ("train.micro_batch=auto", "auto"),
        ("train.micro_batch=4", 4), ("train.sizes=[3]", (3,)), ("train.weights={a = 1.5}", {"a": 1.5}),
    ],
)  # fmt: skip
def test_flags_are_toml_and_then_text(flag: str, value: object) -> None:
    key = flag.partition("=")[0].strip()
    found = read(None, flag).flat()[key]
    assert found == value and type(found) is type(value)


def test_several_flags_may_need_a_second_reading() -> None:
    assert read(None, "train.lr=.5", "train.fast=yes", "model=1", "train.path=2").section("train") == Train(lr=0.5, fast=True, path="2")


@pytest.mark.parametrize(
    ("flag", "wanted", "got"),
    [
        ("train.steps=many", "an integer >= 1 and <= 1000000000", "text"),
        ("train.steps=0", "an integer >= 1", "an integer"),
        ("train.steps=1.0", "an integer", "a number"),
        ("train.steps=true", "an integer", "true or false"),
        ("train.lr=true", "a number > 0", "true or false"),
        ("train.lr=nan", "a number > 0", "a number"),
        ("train.lr=-inf", "a number > 0", "a number"),
        ("train.micro_batch=some", 'an integer, or "auto"', "text"),
        ("train.path=[1, 2]", "text, or a list of text", "list"),
        ("train.schedule=linear", 'one of "cosine", "wsd"', "text"),
        ("train.fast=2", "true or false", "an integer"),
        ("zero.stage=4", "one of 1, 2, 3", "an integer"),
        ("zero.stage=true", "one of 1, 2, 3", "true or false"),
        ("train.sizes=3", "a list of integer", "an integer"),
    ],
)
def test_a_wrong_type_says_what_was_wanted_and_what_came(flag: str, wanted: str, got: str) -> None:
    error = refused(flag)
    key, _, text = flag.partition("=")
    assert error.what == f"`{key}` cannot be {text}"
    assert error.why.startswith(f"wanted {wanted}") and f"; got {got} from flag" in error.why
    fix = error.fix.removesuffix(" (the default)")
    assert read(None, fix).flat()[key] == read(None, "zero=on").flat()[key]  # the fix can be pasted


def test_a_wrong_type_in_a_file_names_the_line(file) -> None:
    error = refused(path=file("[train]\nlr = 1\nsteps = '5'\n"))
    assert error.what == '`train.steps` cannot be "5"' and "from file job.toml:3" in error.why  # no second reading of a file's text


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.stepz", "did you mean `train.steps`?"), ("lr", "did you mean `train.lr`?"), ("zero.lr", "did you mean `train.lr`?"),
        ("trian.steps", "did you mean `train.steps`?"), ("zeroo.what", "did you mean `zero.what`?"), ("schedul", "did you mean `train.schedule`?"),
        ("job.model", "did you mean `model`?"), ("modle", "did you mean `model`?"), ("zer", "did you mean `zero`?"),
        ("train.qqq", "keys of train: steps, lr"), ("qqq.rrr", "sections: train, zero"), ("qqq", "top-level keys: model, seed"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_with_the_nearest_one(key: str, near: str) -> None:
    error = refused(f"{key}=1")
    assert error.what == f"unknown key `{key}`" and near in error.fix and "flag" in error.why


def test_unknown_keys_of_files_and_keywords(file) -> None:
    assert refused(path=file("[zero]\nstge = 2\n")).why == "came from file job.toml:2"
    assert refused(path=file("[zro]\nstage = 2\n")).fix == "did you mean `zero`?"
    assert refused(train={"stepz": 2}).fix == "did you mean `train.steps`?"
    assert refused("train.steps").fix == "train.steps=VALUE"
    assert refused("=3").what == "`=3` is no key=value"


def test_values_that_miss_or_clash() -> None:
    assert refused("named=on").what == "`named.name` is missing" and refused("named=on").why == "wanted text"
    assert read(None, "named.name=x").section("named").name == "x"
    assert refused("zero.every=9").why == "every=9 needs stage >= 2"
    assert read(None, "zero.every=9", "zero.stage=2").section("zero").every == 9


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"model = 'a'\nx = = 2\n", "job.toml:2 is not TOML"), (b"a = 1\na = 2\n", "job.toml:2 is not TOML"), (b"model = 'a", "job.toml:1 is not TOML"),
        (b"x = [", "job.toml:1 is not TOML"), (b"x = " + b"[" * 5000, "job.toml:1 is not TOML"), (b"x = " + b"1" * 5000, "job.toml:1 is not TOML"),
        (b"model = '\xff'", "job.toml is not UTF-8"),
    ],
)  # fmt: skip
def test_a_broken_file_names_the_place(file, content: bytes, what: str) -> None:
    path = file(content)
    error = refused(path=path)
    assert error.what.replace(str(path.parent) + "/", "") == what


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert refused(path=tmp_path / "none.toml").why == "No such file or directory"
    assert refused(path=tmp_path).why == "Is a directory"


def test_auto_is_filled_in_with_its_reason() -> None:
    job = read(None, "train.steps=9")
    filled = job.with_auto("train.micro_batch", 4, "the largest that fits")
    assert filled.section("train") == Train(steps=9, micro_batch=4) and job.section("train").micro_batch == "auto"
    assert filled.sources["train.micro_batch"] == "auto: the largest that fits" and filled.sources["train.steps"] == "flag"
    assert filled != job
    with pytest.raises(UserError, match=r"train\.micro_batch"):
        job.with_auto("train.micro_batch", 1.5, "no integer")
    with pytest.raises(AssertionError, match="not auto"):
        filled.with_auto("train.micro_batch", 8, "again")


def test_sections_made_by_hand_are_strict_and_frozen() -> None:
    with pytest.raises(ValueError, match="stpes"):
        Train(stpes=3)  # type: ignore[call-arg]
    with pytest.raises(Exception, match="frozen"):
        read().section("train").steps = 3


plain = st.text(st.characters(exclude_categories=["Cs"]))  # lone surrogates are no Unicode text
trains = st.fixed_dictionaries(
    {},
    optional={
        "steps": st.integers(1, 10**9),
        "lr": st.floats(min_value=1e-300, allow_infinity=False),
        "micro_batch": st.integers() | st.just("auto"),
        "path": plain | st.lists(plain),
        "schedule": st.sampled_from(["cosine", "wsd"]),
        "fast": st.booleans(),
        "sizes": st.lists(st.integers()),
        "weights": st.dictionaries(plain, st.floats(allow_nan=False, allow_infinity=False)),
        "note": plain,
    },
)


@given(model=plain, train=trains, zero=st.none() | st.booleans() | st.fixed_dictionaries({"stage": st.sampled_from([1, 2, 3])}))
@settings(deadline=None, max_examples=200)
def test_a_job_written_as_toml_comes_back_equal(tmp_path_factory, model: str, train: dict, zero: object) -> None:
    job = read(None, model=model, train=train, zero=zero)
    path = tmp_path_factory.getbasetemp() / "round.toml"
    path.write_bytes(job.to_toml().encode())
    again = read(path)
    assert again == job and again.to_toml() == job.to_toml() and again.to_dict() == job.to_dict()
    assert again.present("zero") == bool(zero is not None and zero is not False)


@given(key=st.sampled_from(["model", "seed", "train.steps", "train.path", "train.fast", "train.weights", "zero", "zero.stage"]) | plain, text=plain)
@example("train.steps", "1" * 5000)
@example("train.sizes", "[" * 5000)
@example("train.path", "['a")
@settings(deadline=None, max_examples=300)
def test_no_flag_gives_anything_but_settings_or_a_user_error(key: str, text: str) -> None:
    try:
        found = read(None, f"{key}={text}")
    except UserError as error:
        assert error.what and (error.fix or error.why)
    else:
        assert found.sources


@given(plain)
@settings(deadline=None)
def test_text_survives_quoting_as_a_flag(text: str) -> None:
    assert read(None, f"model={toml_value(text)}").section("job").model == text
