"""The compiled kernels (csrc/), or why they are not there.

    module()      the extension, or None        missing()   the reason, with the fix
    level()       the instruction set in use    using()     another one for a while (tests run them all)
    define()      a kernel as a torch.library op that torch.compile, meta tensors and autograd see
    watched()     whether any of these would see it now; if not, the op's function may be called itself

Without the extension everything runs on the references. Nothing here loads torch except `define`.
A kernel runs on the pool of csrc/pool.h, whose threads are `threads(n)` and not torch's.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from lilliput.base import env, hardware
from lilliput.base.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from torch import Tensor

LEVELS = ("scalar", "avx2", "avx512")  # in the order of csrc/isa.h


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = _from_file(path) if (path := env.native_path()) else importlib.import_module("lilliput.ops._native")
    except ModuleNotFoundError as error:
        if error.name != "lilliput.ops._native":
            raise
        return None, "the extension was not built: install g++ and the headers of Python, then install lilliput again with LILLIPUT_REQUIRE_EXT=1"
    wanted = env.isa()
    if wanted == "none":
        return None, "LILLIPUT_ISA=none switches them off"
    if wanted is not None:
        if wanted not in LEVELS:
            raise UserError(f"LILLIPUT_ISA cannot be {wanted!r}", fix=did_you_mean(wanted, [*LEVELS, "none"]))
        if not module.set_level(LEVELS.index(wanted)):
            best = LEVELS[module.best_level()]
            raise UserError(f"this machine cannot run LILLIPUT_ISA={wanted}", f"its best instruction set is {best}", f"export LILLIPUT_ISA={best}")
    module.set_threads(hardware.cpus())
    return module, ""


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"there is no native build at {path}", "LILLIPUT_NATIVE names it", "unset LILLIPUT_NATIVE")
    spec = importlib.util.spec_from_file_location("lilliput.ops._native", path)
    assert spec is not None and spec.loader is not None, f"{path} is no extension module"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def module() -> Any:
    """The extension module, or None when there is none. UserError for an impossible LILLIPUT_ISA."""
    return _load()[0]


def missing() -> str | None:
    """Why there are no compiled kernels, or None when there are."""
    return _load()[1] or None


def level() -> str:
    """The instruction set in use: scalar, avx2 or avx512; "none" without kernels."""
    return "none" if module() is None else LEVELS[module().level()]


def levels() -> tuple[str, ...]:
    """Every level this machine can run; empty without kernels."""
    return () if module() is None else LEVELS[: module().best_level() + 1]


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run with another instruction set, one of levels(), for the length of a `with`. The whole process sees it."""
    assert name in levels(), f"level {name} is not one of {levels()}"
    before = module().level()
    module().set_level(LEVELS.index(name))
    try:
        yield
    finally:
        module().set_level(before)


def threads(count: int) -> None:
    """Threads of every kernel from now on, the caller's own included; what the cgroup allows before this is called. Nothing without kernels."""
    if module() is not None:
        module().set_threads(count)


@cache
def library() -> Any:
    """The torch.library that holds the ops `lilliput::...`."""
    import torch

    for constant in (module, missing):  # torch.compile asks them while it traces, instead of tracing what loads an extension
        torch.compiler.assume_constant_result(constant)
    return torch.library.Library("lilliput", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any], cuda: Callable[..., Any] | None = None) -> Any:
    """Register `lilliput::name` once and return the op. schema: "name(Tensor x, int n) -> Tensor"; fake: the same on shapes alone;
    cuda: the same on CUDA tensors, or None.

    Cost of a call through the dispatcher: 10 us with a schema of tensors and numbers (torch.library.custom_op takes 40 to 80): where that
    counts, ask `watched` first.
    """
    import torch

    holder, name = library(), schema.partition("(")[0]
    holder.define(schema)
    holder.impl(name, run, "CPU")
    if cuda is not None:
        holder.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"lilliput::{name}", fake, lib=holder)
    return getattr(torch.ops.lilliput, name).default


def watched(x: Tensor) -> bool:
    """Whether a call with this tensor must go through the dispatcher: it is traced, differentiated, of a class of its own (fake, wrapped), or
    some mode looks on (counters, meters). 0.5 us."""
    import torch

    return (
        torch.compiler.is_compiling()  # first: the tracer cannot look at the stack of modes
        or type(x) not in (torch.Tensor, torch.nn.Parameter)
        or (x.requires_grad and torch.is_grad_enabled())
        or torch._C._len_torch_dispatch_stack() > 0  # type: ignore[attr-defined]
    )
