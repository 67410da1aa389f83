"""What an answer may be, as one grammar: response_format, the tools that must or may be called, structured_outputs, allowed tokens."""

from __future__ import annotations

from collections.abc import Callable

from lilliput.base.errors import UserError
from lilliput.serve import tools
from lilliput.serve.openai.errors import ApiError, from_user_error
from lilliput.serve.openai.protocol import ChatRequest, CompletionRequest, Json, NamedTool, ResponseFormat, Structured
from lilliput.serve.openai.served import Served
from lilliput.serve.reasoning import Begin
from lilliput.serve.request import Guide


async def of_chat(served: Served, body: ChatRequest, functions: list[Json], bare: bool, at: Begin) -> Callable[[], Guide] | None:
    """Of a chat with these functions; None = any text. ApiError for what does not go together or cannot be enforced."""
    return served.among(body.allowed_token_ids, await _of_message(served, body, functions, bare, at))


async def _of_message(served: Served, body: ChatRequest, functions: list[Json], bare: bool, at: Begin) -> Callable[[], Guide] | None:
    if body.structured_outputs is not None:
        if functions or body.response_format is not None:
            raise ApiError("structured_outputs goes without tools and response_format", "structured_outputs")
        return await structured(served, body.structured_outputs, at)
    schema = schema_of(body.response_format)
    if not functions:
        return None if schema is None else await served.guide(lambda: served.grammars.json_schema(schema), "response_format", at)
    if isinstance(body.tool_choice, NamedTool):
        functions = [function for function in functions if function["name"] == body.tool_choice.function.name]
    required, many = body.tool_choice not in (None, "auto"), body.parallel_tool_calls is not False
    try:
        grammars = served.grammars
    except UserError as error:
        if required or schema is not None:
            raise from_user_error(error, "tool_choice" if required else "response_format") from error
        return None  # free text, and calls as well as the model writes them
    return await served.guide(lambda: grammars.grammar(tools.rule(functions, required=required, many=many, bare=bare, answer=schema)), "tools", at)


async def of_completion(served: Served, body: CompletionRequest) -> Callable[[], Guide] | None:
    """Of a completion; None = any text. ApiError for what does not go together or cannot be enforced."""
    if body.structured_outputs is not None and body.response_format is not None:
        raise ApiError("structured_outputs goes without response_format", "structured_outputs")
    schema, guide = schema_of(body.response_format), None
    if body.structured_outputs is not None:
        guide = await structured(served, body.structured_outputs)
    elif schema is not None:
        guide = await served.guide(lambda: served.grammars.json_schema(schema), "response_format")
    return served.among(body.allowed_token_ids, guide)


def schema_of(wanted: ResponseFormat | None) -> Json | None:
    """The JSON schema of a response_format; None for free text."""
    if wanted is None or wanted.type == "text":
        return None
    return {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_


async def structured(served: Served, wanted: Structured, at: Begin = "after") -> Callable[[], Guide]:
    """The guide of vLLM's structured_outputs."""

    def make() -> Callable[[], Guide]:
        grammars = served.grammars
        if wanted.json_object is not None:
            return grammars.json_object()
        if wanted.regex is not None:
            return grammars.regex(wanted.regex)
        if wanted.choice is not None:
            return grammars.choice(wanted.choice)
        return grammars.grammar(wanted.grammar) if wanted.grammar is not None else grammars.json_schema(wanted.json_)

    return await served.guide(make, "structured_outputs", at)
