"""Giant models, tied down on small machines: plan, train, fine-tune, compress and serve large models on limited hardware.

The public names are below and nowhere else; `import lilliput` loads neither torch nor pydantic.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lilliput.base.version import __version__

if TYPE_CHECKING:
    from lilliput.api import Chat, DoesNotFit, Job, LanguageModel, Sampling, TrainResult, UserError, evaluate, load, plan, pull, train

__all__ = [
    "Chat",
    "DoesNotFit",
    "Job",
    "LanguageModel",
    "Sampling",
    "TrainResult",
    "UserError",
    "__version__",
    "evaluate",
    "load",
    "plan",
    "pull",
    "train",
]


class _Verb(ModuleType):
    """A package of rooms that is also the public verb of its name: lilliput.train(...) runs a job, lilliput.train.lora is a room.

    Python binds an imported subpackage to its parent, so a plain function `lilliput.train` would be replaced by the
    package as soon as any room is imported; the package itself answers the call instead.
    """

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The function of this name in lilliput.api."""
        from lilliput import api

        return getattr(api, self.__name__.rpartition(".")[2])(*arguments, **keywords)


for _name in ("train", "plan"):
    importlib.import_module(f"lilliput.{_name}").__class__ = _Verb


def __getattr__(name: str) -> Any:
    """Public names load when they are first used (PEP 562)."""
    if name in __all__:
        from lilliput import api

        return getattr(api, name)
    raise AttributeError(f"module 'lilliput' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
