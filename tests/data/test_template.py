"""Chat templates render as in transformers, and stay in their sandbox."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lilliput.base.errors import UserError
from lilliput.data.template import CHATML, render

# shapes of templates in use: a system default, trimmed headers with BOS, tools with a namespace loop, [INST] brackets with refusals
DEFAULTED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = """{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}
    {% if loop.index0 == 0 %}
        {% set content = bos_token + content %}
    {% endif %}
    {{- content }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{% endif %}"""
TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {%- if message.content is none %}{%- continue %}{%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + message['content'] + eos_token}}{% endgeneration %}{% endif %}{% endfor %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [{"role": "user", "content": "Hi <b> & 'é' "}, {"role": "assistant", "content": "  Hello\n"}, {"role": "user", "content": "日本?"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é<"}}}]}
TOOL = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}}]


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize(
    ("template", "messages", "tools"),
    [
        (CHATML, CHAT, None),
        (DEFAULTED, CHAT, None),
        (DEFAULTED, [{"role": "system", "content": "s"}, *CHAT], None),
        (HEADERS, CHAT, None),
        (TOOLS, CHAT, None),
        (TOOLS, [*CHAT, CALL, {"role": "tool", "content": "3"}, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "7"}], TOOL),
        (BRACKETS, CHAT, None),
        ("{{ strftime_now('%Y') }} {{ messages | length }} {{ bos_token }}", CHAT, None),
    ],
)
def test_renders_as_transformers(template, messages, tools, generate):
    (theirs,), _ = render_jinja_template([messages], tools=tools, chat_template=template, add_generation_prompt=generate, **SPECIAL)
    assert render(template, messages, generate, tools, SPECIAL) == theirs


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ messages.append(1) }}",
    ],
)
def test_escapes_are_stopped(template):
    with pytest.raises(UserError) as error:
        render(template, CHAT, False, None, SPECIAL)
    assert "sandbox" in error.value.what


def test_faults_of_templates_and_conversations_are_user_errors():
    with pytest.raises(UserError, match="refuses this conversation") as error:
        render(BRACKETS, CHAT[1:], False, None, SPECIAL)
    assert "must alternate" in error.value.why and "assistant, user" in error.value.why
    with pytest.raises(UserError, match="not valid Jinja") as error:
        render("a\n{% for %}", CHAT, False, None, SPECIAL)
    assert "line 2" in error.value.why
    with pytest.raises(UserError, match="refuses this conversation"):
        render(CHATML, [CALL], False, None, SPECIAL)  # content null: this template cannot say it
    with pytest.raises(UserError, match="refuses this conversation"):
        render("{% for i in range(999999999) %}x{% endfor %}", CHAT, False, None, SPECIAL)
    with pytest.raises(UserError, match="JSON values"):
        render(CHATML, [{"role": "user", "content": object()}], False, None, SPECIAL)


def test_the_callers_messages_are_not_touched():
    messages = [dict(CHAT[0])]
    with pytest.raises(UserError):
        render("{% set _ = messages[0].update({'content': 'x'}) %}", messages, False, None, SPECIAL)
    assert messages == [CHAT[0]]
