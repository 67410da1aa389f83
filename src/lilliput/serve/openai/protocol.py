"""What may be asked: OpenAI's request bodies, as far as the engine can do what they say.

A field that is unknown or cannot be honoured is a 400 that names it; nothing is dropped silently. Fields that ask for nothing of an
engine (user, metadata, service_tier, ...) are taken and have no effect. Beyond OpenAI's are vLLM's: top_k, min_p, repetition_penalty,
min_tokens, stop_token_ids, ignore_eos, bad_words, priority, structured_outputs, prompt_logprobs, include_stop_str_in_output,
skip_special_tokens, allowed_token_ids, truncate_prompt_tokens, add_special_tokens, return_token_ids, echo, chat_template_kwargs,
continue_final_message, use_beam_search with length_penalty and early_stopping.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lilliput.base.errors import UserError
from lilliput.serve.beams import Beam
from lilliput.serve.request import Sampling

Json = dict[str, Any]
MOST_LOGPROBS = 20
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}  # a function that says nothing takes no arguments
Number = Annotated[float, Field(allow_inf_nan=False)]


UNSEARCHED: dict[str, tuple[Any, ...]] = {  # field -> values that change nothing, so that a beam search takes them
    "temperature": (0, 1), "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,), "presence_penalty": (0,), "frequency_penalty": (0,),
    "min_tokens": (0,), "logprobs": (False,), "prompt_logprobs": (), "stop": ([],), "bad_words": ([],), "logit_bias": ({},), "best_of": (),
    "allowed_token_ids": (), "structured_outputs": (), "response_format": (), "tools": ([],), "stream": (False,), "echo": (False,),
    "include_stop_str_in_output": (False,), "skip_special_tokens": (True,), "priority": (0,),
}  # fmt: skip


class Body(BaseModel):
    """Base of every request: strict about types and names."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(Body):
    """`include_usage`: a last event with the token counts."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # we add no noise either way


class Structured(Body):
    """vLLM's structured_outputs: one of these."""

    json_: Any = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> Structured:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of json, regex, choice, grammar, json_object, got {len(given)}")
        return self


class JsonSchema(Body):
    """response_format.json_schema."""

    name: str = "answer"
    description: str | None = None
    schema_: Json = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type json_schema, which needs it")
        return self


class Common(Body):
    """What completions and chat share."""

    model: str | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    n: int | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    top_k: int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    bad_words: list[str] | None = None
    priority: int | None = None
    structured_outputs: Structured | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: Literal[True] = True
    allowed_token_ids: list[int] | None = Field(None, min_length=1)
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    return_token_ids: bool | None = None
    echo: bool | None = None
    use_beam_search: bool = False
    length_penalty: Number | None = None
    early_stopping: bool | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > 16:
            raise ValueError(f"at most 16 stop strings, got {len(value)}")
        return value

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Common:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream=true")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs come with whole answers: stream=false")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens is at least 1, or -1 for what the context leaves")
        if not self.use_beam_search and (self.length_penalty is not None or self.early_stopping is not None):
            raise ValueError("length_penalty and early_stopping need use_beam_search=true")
        return self

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int, defaults: Mapping[str, Any], **more: Any) -> Sampling:
        """The engine's Sampling; what is not said is in `defaults` (temperature 1 as at OpenAI, unless the server says otherwise).
        UserError for a value out of range."""
        said = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                "frequency_penalty", "seed", "n", "min_tokens", "ignore_eos", "priority") if getattr(self, name) is not None}  # fmt: skip
        if said.get("top_k") == -1:
            said["top_k"] = 0
        if self.stop:
            said["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        said |= {name: tuple(value) for name, value in (("stop_ids", self.stop_token_ids), ("bad_words", self.bad_words)) if value}
        said |= {"include_stop": self.include_stop_str_in_output, "skip_special": self.skip_special_tokens}
        if self.logit_bias:
            said["logit_bias"] = {_token_id(key): float("-inf") if value == -100 else value for key, value in self.logit_bias.items()}
        return Sampling(**{"temperature": 1.0, **defaults, **said, "max_tokens": max_tokens, **more})

    def beam(self, max_tokens: int, adapter: str) -> Beam | None:
        """The beam search that is asked for, of n beams; None where none is. UserError for what a search has no use for."""
        if not self.use_beam_search:
            return None
        for name, harmless in UNSEARCHED.items():
            if getattr(self, name, None) not in (None, *harmless):
                raise UserError(f"{name}={getattr(self, name)!r} has no meaning in a beam search", "it draws nothing and gives whole answers at its end",
                                f"leave {name} out")  # fmt: skip
        return Beam(self.n or 1, max_tokens, length_penalty=1.0 if self.length_penalty is None else self.length_penalty,
                    early_stopping=bool(self.early_stopping), ignore_eos=bool(self.ignore_eos), stop_ids=tuple(self.stop_token_ids or ()),
                    adapter=adapter)  # fmt: skip


def _token_id(key: str) -> int:
    if not key.isdecimal() or len(key) > 9:
        raise UserError(f"logit_bias={key!r} names no token", "its keys are token ids", '{"50256": -100}')
    return int(key)


class CompletionRequest(Common):
    """POST /v1/completions. A prompt is text or token ids, or a list of either."""

    prompt: str | list[str] | list[int] | list[list[int]]
    best_of: int | None = None
    add_special_tokens: bool = True
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        """Each prompt for itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class Part(Body):
    """A piece of a message; text is all that a text model reads."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None

    @property
    def content(self) -> str:
        """What it says."""
        return self.text or self.refusal or ""


class FunctionCall(Body):
    """A call that was made: `arguments` is JSON as text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise ValueError(f"a message of role {self.role} needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the assistant's messages have tool_calls")
        return self

    def plain(self) -> Json:
        """As chat templates want it: content is text, arguments are objects where they are valid JSON."""
        content = self.content if isinstance(self.content, str) else "".join(part.content for part in self.content or ())
        role = "system" if self.role == "developer" else self.role
        message: Json = {"role": role, "content": content or self.refusal or ""}
        if self.tool_calls:
            calls = [{"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": _parsed(call.function.arguments)}} for call in
                     self.tool_calls]  # fmt: skip
            message["tool_calls"] = calls
        more = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": self.reasoning_content}
        return message | {key: value for key, value in more.items() if value is not None}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # a model wrote it: the conversation goes on


class Function(Body):
    """A tool: `parameters` is a JSON schema of its arguments."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None

    def plain(self) -> Json:
        """As chat templates want it."""
        return {"name": self.name, "description": self.description or "", "parameters": self.parameters or NOTHING}


class Tool(Body):
    """A function the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """Its name."""

    name: str


class NamedTool(Body):
    """tool_choice: this one."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    verbosity: Literal["medium"] | None = None
    modalities: list[Literal["text"]] | None = None
    add_special_tokens: bool = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: Json | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    include_reasoning: bool = True

    @model_validator(mode="after")
    def _belongs_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.continue_final_message and (self.add_generation_prompt or self.messages[-1].content is None):
            raise ValueError("continue_final_message goes on from the last message's text: add_generation_prompt is false then")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in [tool.function.name for tool in self.tools or ()]:
            raise ValueError(f"tool_choice names `{self.tool_choice.function.name}`, which is none of the tools")
        return self


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None


class LoadAdapterRequest(Body):
    """POST /v1/load_lora_adapter. `load_inplace`: an adapter of this name is replaced. `model`: which of several models gets it; the first."""

    lora_name: str = Field(min_length=1, max_length=200)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    model: str | None = None


class UnloadAdapterRequest(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: int | None = None  # vLLM takes it and goes by the name, too
    model: str | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a text, or a chat as the model sees it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]
