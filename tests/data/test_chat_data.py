"""Conversations: what is scored, how records become messages, padded rows, exact resume."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.base.errors import UserError
from lilliput.data.batch import IGNORE
from lilliput.data.chat import Conversation, Conversations, conversations, to_conversation, tokenize_conversation
from lilliput.data.sources import shape
from lilliput.data.tokenizer import Tokenizer

BYTES = Tokenizer.bytes_()  # ChatML, ids are bytes: what is scored can be read
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello é"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": " bye\n"},
]


def with_template(template: str, tokenizer: Tokenizer = BYTES) -> Tokenizer:
    return Tokenizer(replace(tokenizer._parts, chat_template=template))


def scored_text(messages, tokenizer=BYTES, tools=None) -> str:
    ids, scored = tokenize_conversation(Conversation("f line 1", messages, tools), tokenizer)
    assert len(ids) == len(scored) and ids == tokenizer.encode(tokenizer.apply_chat(messages, False, tools))
    return tokenizer.decode([i for i, s in zip(ids, scored) if s], skip_special=False)


def test_only_assistant_turns_and_their_end_token_are_scored():
    assert scored_text(CHAT) == "hello é<|im_end|> bye\n<|im_end|>"
    bpe = Tokenizer.train_bpe(["the user and the assistant say hello and bye to the system " * 3], 280)
    assert scored_text(CHAT, bpe) == "hello é<|im_end|> bye\n<|im_end|>"


def test_a_prompt_is_what_generation_will_see():
    ids, scored = tokenize_conversation(Conversation("", CHAT[:3]), BYTES)
    assert ids[: scored.index(True)] == BYTES.encode(BYTES.apply_chat(CHAT[:2]))


def test_templates_without_end_token_or_generation_prompt():
    assert scored_text(CHAT[1:3], with_template("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")) == "assistant: hello é\n"
    brackets = "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else m.content + '<|endoftext|>' }}{% endfor %}"
    assert scored_text(CHAT[1:], with_template(brackets)) == "hello é<|endoftext|> bye\n<|endoftext|>"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    rewriting = "{% for m in messages %}{{ m.role + ': ' + (m.content if loop.last or m.role == 'user' else 'x') + '\n' }}{% endfor %}"
    assert scored_text(CHAT[1:3], with_template(rewriting)) == "assistant: hello é\n"
    with pytest.raises(UserError, match="f line 1: the chat template rewrites earlier turns"):
        scored_text(CHAT[1:], with_template(rewriting))


def test_tool_calls_are_scored_and_results_are_not():
    template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ '<' + m.role + '>' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}{{ (m.content or '') + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    record = {
        "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "four"},
        ],
        "tools": '[{"name": "add"}]',
        "system": "s",
    }
    conversation = to_conversation(record, ("conversations",), "f")
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert scored_text(conversation.messages, with_template(template), conversation.tools) == 'add{"a": 2}<|im_end|>four<|im_end|>'
    with pytest.raises(UserError, match="f line 1: the chat template refuses"):  # ChatML cannot say a call: nothing is left out silently
        scored_text(conversation.messages)


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": CHAT}, CHAT),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "do", "input": "this", "output": "done"}, [("user", "do\nthis"), ("assistant", "done")]),
        ({"instruction": "do", "input": "", "output": "done"}, [("user", "do"), ("assistant", "done")]),
        ({"instruction": "do", "output": "done"}, [("user", "do"), ("assistant", "done")]),
        ({"prompt": "p", "completion": "c"}, [("user", "p"), ("assistant", "c")]),
        ({"prompt": "p", "response": "r"}, [("user", "p"), ("assistant", "r")]),
        ({"question": "q", "answer": "a"}, [("user", "q"), ("assistant", "a")]),
    ],
)
def test_records_become_messages(record, messages):
    expected = [{"role": m[0], "content": m[1]} if isinstance(m, tuple) else m for m in messages]
    assert to_conversation(record, shape(record, "f")[1], "f").messages == expected


@pytest.mark.parametrize(
    ("record", "what", "why"),
    [
        ({"messages": []}, "not a list of turns", "it is []"),
        ({"messages": "hi"}, "not a list of turns", '"hi"'),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn", "roles: user"),
        ({"conversations": [{"from": "martian", "value": "a"}]}, "known speaker", "from: martian"),
        ({"conversations": [{"speaker": "gpt", "text": "a"}]}, "known speaker", "keys that came: speaker, text"),
        ({"conversations": [{"from": "function_call", "value": "add(2)"}]}, "broken function_call", "add(2)"),
        ({"instruction": "a", "output": None}, "`output` is not a string", "NoneType"),
        ({"instruction": "a", "input": 3, "output": "b"}, "`input` is not a string", "int"),
        ({"messages": CHAT, "tools": "{"}, "`tools` is not JSON", ""),
    ],
)
def test_faults_in_records(record, what, why):
    with pytest.raises(UserError, match=f"f line 3: .*{what}") as error:
        to_conversation(record, shape(record, "")[1], "f line 3")
    assert why in error.value.why


def test_all_records_have_the_shape_of_the_first(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match="line 2: unknown kind of record") as error:
        list(conversations([path]))
    assert "completion, prompt" in error.value.why
    path.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="line 1: a record with text"):
        list(conversations([path]))


# ---- the stream


def rows_of(lengths):
    """Conversations of these lengths; ids tell which one and where; the second half is scored."""
    return [([10 * i % 256] + [(10 * i + t) % 256 for t in range(1, n)], [t >= n // 2 for t in range(n)]) for i, n in enumerate(lengths)]


lengths = st.lists(st.integers(2, 20), min_size=1, max_size=12)


@settings(deadline=None, max_examples=100)
@given(lengths=lengths, seed=st.integers(0, 3), sequences=st.integers(1, 5))
def test_an_epoch_has_every_conversation_once(lengths, seed, sequences):
    rows = rows_of(lengths)
    stream = Conversations(rows, BYTES, 32, seed)
    seen = []
    for _ in range(len(rows)):
        batch = stream.next(1)
        ids = batch.tokens_BT[0].tolist()
        index = next(i for i, (row, _) in enumerate(rows) if row[:-1] == ids and i not in seen)
        seen.append(index)
        assert batch.targets_BT[0].tolist() == [i if s else IGNORE for i, s in zip(rows[index][0][1:], rows[index][1][1:])]
        assert batch.weight == sum(rows[index][1][1:])
    assert sorted(seen) == list(range(len(rows)))
    scored = sum(batch.weight for batch in stream.eval_batches(sequences, 10_000))
    assert scored == stream.summary()["scored"] == sum(sum(mask[1:]) for _, mask in rows)


@settings(deadline=None, max_examples=50)
@given(lengths=lengths, before=st.lists(st.integers(1, 5), max_size=5), n=st.integers(1, 5))
def test_restore_goes_on_bitwise(lengths, before, n):
    stream, other = (Conversations(rows_of(lengths), BYTES, 32, 7) for _ in range(2))
    for m in before:
        stream.next(m)
    other.restore(json.loads(json.dumps(stream.state())))
    a, b = stream.next(n), other.next(n)
    assert torch.equal(a.tokens_BT, b.tokens_BT) and torch.equal(a.targets_BT, b.targets_BT) and a.weight == b.weight


def test_restore_refuses_other_conversations():
    state = Conversations(rows_of([4, 5]), BYTES, 32, 0).state()
    for rows in (rows_of([4, 6]), [(ids, [True] * len(ids)) for ids, _ in rows_of([4, 5])]):
        with pytest.raises(UserError, match="not the data of this checkpoint"):
            Conversations(rows, BYTES, 32, 0).restore(state)


def test_padding_is_the_pad_token_and_never_scored():
    stream = Conversations(rows_of([3, 8]), BYTES, 32, 0)
    batch = next(stream.eval_batches(2, 100))
    assert batch.tokens_BT.shape == (2, 7)
    assert batch.tokens_BT[0, 2:].tolist() == [BYTES.pad_id] * 5 and batch.targets_BT[0, 2:].tolist() == [IGNORE] * 5


def test_long_conversations_are_cut_and_counted():
    rows = [([1] * 10, [False] * 5 + [True] * 5), ([2] * 10, [False] * 9 + [True]), ([3] * 4, [False, True, True, True])]
    stream = Conversations(rows, BYTES, 6, 0)
    assert stream.summary() == {"tokens": 11, "rows": 2, "scored": 2 + 3, "shortened": 1, "dropped": 1}
    assert max(batch.tokens_BT.shape[1] for batch in stream.eval_batches(1, 100)) == 6
    with pytest.raises(UserError, match="no conversation to train on") as error:
        Conversations(rows[1:2], BYTES, 6, 0)
    assert "of 1 conversations none" in error.value.why


def test_evaluation_stops_at_the_tokens_asked_for():
    stream = Conversations(rows_of([10] * 6), BYTES, 32, 0)
    assert [batch.weight for batch in stream.eval_batches(2, 25)] == [10, 10]
    assert [batch.weight for batch in stream.eval_batches(2, 1)] == [10]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("file", "count"), [("llamafactory-demo/alpaca_en_demo.json", 999), ("mt-bench/fastchat_dummy_conversation.json", 500), ("gsm8k/test.jsonl", 1319)]
)
def test_real_files(shared_data, file, count):
    rows = [tokenize_conversation(c, BYTES) for c in conversations([shared_data / file])]
    stream = Conversations(rows, BYTES, 1 << 16, 0)
    assert stream.summary()["rows"] == count and stream.summary()["dropped"] == stream.summary()["shortened"] == 0
