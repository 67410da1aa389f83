"""How a request fails: always {"error": {"message", "type", "param", "code"}}, with the status that OpenAI's clients act on.

    400 the request, its `param` named    401 no key or a wrong one    404 no such model    413 too many bytes
    503 too many requests, or stopping (Retry-After; clients try again by themselves)    504 it took too long    500 our fault
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lilliput.base.errors import UserError, did_you_mean

KINDS = {401: "authentication_error", 404: "not_found_error", 500: "server_error", 503: "overloaded_error", 504: "timeout_error"}


class ApiError(Exception):
    """A refusal with its HTTP status."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with the status."""
        return {"Retry-After": "1"} if self.status == 503 else {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def from_user_error(error: UserError, param: str | None = None) -> ApiError:
    """An engine's refusal. The field is the one its first words name (`temperature=3 is out of range`), else `param`."""
    named = re.match(r"(\w+)=", error.what)
    parts = [error.what, error.why, f"try: {error.fix}" if error.fix else ""]
    long = "longer than the context" in error.what
    return ApiError("; ".join(part for part in parts if part), named[1] if named else param, code="context_length_exceeded" if long else None)


def from_validation(faults: Sequence[Any], known: Sequence[str]) -> ApiError:
    """The first of pydantic's faults, as the field it is about and what is wrong with it. `known`: the names of all fields."""
    fault = max(faults, key=lambda one: (one["type"] != "missing", len(one["loc"])))  # of a union's branches the one that went furthest
    place = [part for part in fault["loc"] if isinstance(part, int) or re.fullmatch(r"[a-z_0-9]+", str(part))]
    place = place[1:] if place[:1] == ["body"] else place
    param = ".".join(map(str, place)) or None
    if fault["type"] == "json_invalid":
        return ApiError(f"the body is not valid JSON: {fault.get('ctx', {}).get('error', fault['msg'])}")
    if fault["type"] == "extra_forbidden":
        name = str(place[-1]) if place else ""
        return ApiError(f"unknown or unsupported field `{param}`; {did_you_mean(name, known)}", param, code="unknown_parameter")
    if fault["type"] == "missing":
        return ApiError(f"`{param}` is missing" if param else "the body is missing", param, code="missing_required_parameter")
    message = str(fault["msg"]).removeprefix("Value error, ")
    return ApiError(f"`{param}`: {message}" if param else message, param, code="invalid_value")
