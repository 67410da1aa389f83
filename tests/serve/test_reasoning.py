"""Thoughts: any cut of a text gives the same parts, the template is told what was asked, a grammar begins behind the thought."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator

import pytest
import torch
from http_server import Running, running
from hypothesis import given
from hypothesis import strategies as st

from lilliput.data import template as jinja
from lilliput.data.tokenizer import Tokenizer
from lilliput.serve.reasoning import Afterwards, Begin, Thinking, begin
from lilliput.serve.request import Delta

pytest.importorskip("fastapi", reason="needs the extra `serve`")
openai = pytest.importorskip("openai", reason="needs OpenAI's client")
pytest.importorskip("llguidance", reason="needs the extra `structured`")

QWEN = """{%- for message in messages %}
    {%- if message.role == 'assistant' and message.reasoning_content is defined and message.reasoning_content %}
        {{- '<|im_start|>assistant\n<think>\n' + message.reasoning_content + '\n</think>\n\n' + message.content + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""  # the part of Qwen3's that is about thoughts
HELLO = [{"role": "user", "content": "Hello"}]


def read(pieces: list[str], at: Begin) -> tuple[str, str]:
    thinking, found = Thinking(at), [("", "")]
    found += [thinking.push(piece) for piece in pieces]
    found.append(thinking.flush())
    return "".join(thought for thought, _ in found), "".join(said for _, said in found)


@pytest.mark.parametrize(("text", "at", "thought", "said"), [
    ("<think>\na\nb\n</think>\n\nHi <think>", "before", "a\nb", "Hi <think>"),
    ("\n<think></think>Hi", "before", "", "Hi"),
    ("Hi </think> there", "before", "", "Hi </think> there"),
    ("a</think>b", "inside", "a", "b"),
    (" a < b </thin", "inside", "a < b </thin", ""),
    ("<thi", "before", "", "<thi"),
    (" \n", "before", "", " \n"),
    ("<think>a</think>", "after", "", "<think>a</think>"),
    ("a </think>\n \n b ", "inside", "a", "b "),
])  # fmt: skip
def test_what_a_text_holds(text: str, at: Begin, thought: str, said: str) -> None:
    assert read([text], at) == read(list(text), at) == (thought, said)


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "\n", "<", "</thin", "k>"]), max_size=8), st.data())
def test_any_cut_gives_the_same_parts(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    for at in ("inside", "before", "after"):
        assert read(pieces, at) == read([text], at)


def test_where_an_answer_begins() -> None:
    assert begin(QWEN, "x<|im_start|>assistant\n") == "before" and begin(QWEN, "x<think>\n\n</think>\n\n") == "after"
    assert begin(QWEN, "x<think>\n") == "inside" and begin("{{ messages }}", "x<think>") == "after"
    assert jinja.switches(QWEN) == {"enable_thinking"} and jinja.switches(jinja.CHATML) == frozenset()


class Letters:
    """A guide that allows `a` twice."""

    def __init__(self) -> None:
        self.left = 2

    def mask(self) -> torch.Tensor:
        words = torch.zeros(9, dtype=torch.int32)
        words[ord("a") // 32] = 1 << ord("a") % 32
        return words

    def accept(self, token: int) -> None:
        assert token == ord("a")
        self.left -= 1

    @property
    def finished(self) -> bool:
        return self.left == 0


def test_a_guide_waits_for_the_thoughts_end() -> None:
    tokenizer = Tokenizer.bytes_()
    allowed = lambda guide: {at for at in range(256) if guide.mask()[at // 32].item() >> at % 32 & 1}
    guide = Afterwards(Letters(), tokenizer, 259, [31, 95], "inside")
    for byte in b"hm </think":
        assert allowed(guide) == set(range(256)) - {31, 95}, "a thought is free, but the answer does not end in it"
        guide.accept(byte)
    guide.accept(ord(">"))
    assert allowed(guide) == {ord("a")} and not guide.finished
    guide.accept(ord("a")), guide.accept(ord("a"))
    assert guide.finished
    plain = Afterwards(Letters(), tokenizer, 259, [31], "before")
    assert allowed(plain) == {ord("a")}, "<think> is no token of this vocabulary"
    plain._opens = ord("t")
    assert allowed(plain) == {ord("a"), ord("t")}
    plain.accept(ord("t"))
    assert len(allowed(plain)) == 255


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("thinks")) as server:
        server.served.tokenizer.chat_template = QWEN
        yield server


def scripted(server: Running, monkeypatch: pytest.MonkeyPatch, *pieces: str) -> list[list[int]]:
    """The engine says these pieces; the prompts it is asked."""
    seen: list[list[int]] = []

    async def stream(prompt: list[int], how: object) -> AsyncIterator[Delta]:
        seen.append(list(prompt))
        for at, piece in enumerate(pieces):
            yield Delta(1, 0, 65 + at, piece, "stop" if at + 1 == len(pieces) else None, logprob=-1.0)

    monkeypatch.setattr(server.served.engine, "stream", stream)
    return seen


def test_a_thought_is_told_apart(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    client = server.client()
    scripted(server, monkeypatch, "<thi", "nk>\nwell", "...\n</th", "ink>\n\nIt ", "is 4.")
    whole = client.chat.completions.create(model="tiny", messages=HELLO)
    message = whole.choices[0].message
    assert (message.model_extra["reasoning_content"], message.content) == ("well...", "It is 4.")
    assert whole.usage.completion_tokens_details.reasoning_tokens == 2
    thought = said = ""
    for event in client.chat.completions.create(model="tiny", messages=HELLO, stream=True):
        thought += (event.choices[0].delta.model_extra or {}).get("reasoning_content", "")
        said += event.choices[0].delta.content or ""
    assert (thought, said) == ("well...", "It is 4.")
    hidden = client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"include_reasoning": False}).choices[0].message
    assert "reasoning_content" not in hidden.model_extra and hidden.content == "It is 4."
    answer = client.responses.create(model="tiny", input="Hello")
    assert [item.type for item in answer.output] == ["reasoning", "message"] and answer.output[0].content[0].text == "well..."
    assert answer.usage.output_tokens_details.reasoning_tokens == 2 and answer.output_text == "It is 4."
    again = [{"role": "user", "content": "Hello"}, *(item.model_dump(exclude_none=True) for item in answer.output), {"role": "user", "content": "Sure?"}]
    seen = scripted(server, monkeypatch, "Yes.")
    assert client.responses.create(model="tiny", input=again).output_text == "Yes."
    assert "<think>\nwell...\n</think>\n\nIt is 4." in server.served.tokenizer.decode(seen[0], skip_special=False)


def test_the_template_is_told_what_was_asked(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    client, seen = server.client(), scripted(server, monkeypatch, "<think>", "4")
    off = client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert off.choices[0].message.content == "<think>4", "behind an empty thought nothing is cut"
    client.chat.completions.create(model="tiny", messages=HELLO, reasoning_effort="none")
    client.responses.create(model="tiny", input="Hello", reasoning={"effort": "none"})
    client.chat.completions.create(model="tiny", messages=HELLO)
    assert seen[0] == seen[1] == seen[2] != seen[3]
    assert server.served.tokenizer.decode(seen[0], skip_special=False).endswith("assistant\n<think>\n\n</think>\n\n")
    for more, said in (({"chat_template_kwargs": {"enable_thinkin": 1}}, "does not read `enable_thinkin`; it reads enable_thinking"),
                       ({"chat_template_kwargs": {"messages": []}}, "does not read `messages`"), ({"reasoning_effort": "low"}, "no degrees")):
        with pytest.raises(openai.BadRequestError, match=said):
            client.chat.completions.create(model="tiny", messages=HELLO, extra_body=more)
    monkeypatch.setattr(server.served.tokenizer, "chat_template", jinja.CHATML)
    with pytest.raises(openai.BadRequestError, match="does not read `reasoning_effort`"):
        client.chat.completions.create(model="tiny", messages=HELLO, reasoning_effort="low")


def test_a_grammar_behind_a_thought_that_the_prompt_opens(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.served.tokenizer, "chat_template", QWEN.replace("assistant\n' }}", "assistant\n<think>\n' }}"))
    cut = server.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=6, response_format={"type": "json_object"}, temperature=0)
    message = cut.choices[0].message
    assert message.content is None and message.model_extra["reasoning_content"] and cut.usage.completion_tokens == 6
    with pytest.raises(json.JSONDecodeError):
        json.loads(message.model_extra["reasoning_content"])
