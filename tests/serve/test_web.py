"""The web page in headless Chromium: a chat with the tiny model, stop, markdown without any HTML of the model's, the live view."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import KEY, running

import lilliput

pytest.importorskip("fastapi", reason="needs the extra `serve`")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path")
expect = sync_api.expect
WEB = Path(lilliput.__file__).parent / "web"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    with running(tmp_path_factory.mktemp("web"), page=WEB) as server:
        yield server


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    with running(tmp_path_factory.mktemp("pair"), page=WEB, models=2) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as play:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
        browser = play.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server) -> Iterator:
    yield from opened(browser, server)


@pytest.fixture
def page_of_two(browser, pair) -> Iterator:
    yield from opened(browser, pair)


def opened(browser, server) -> Iterator:
    context = browser.new_context(viewport={"width": 1200, "height": 760})
    page = context.new_page()
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" and "server responded with" not in message.text else None)
    page.on("request", lambda request: page.faults.append(request.url) if not request.url.startswith((server.url, "data:")) else None)
    page.goto(server.url)
    yield page
    assert page.faults == [], "no script error, nothing from elsewhere"
    context.close()


def unlock(page) -> None:
    page.wait_for_selector("#key-row:not([hidden])")
    page.fill("#key", KEY)
    page.press("#key", "Tab")
    expect(page.locator("#state")).to_have_text("live")


def test_a_chat_by_keyboard_and_the_live_view(page, server) -> None:
    unlock(page)
    assert page.text_content("#model") == "tiny"
    page.fill("#max_tokens", "24")
    page.focus("#text")
    page.keyboard.type("Hello <b>you</b>")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("again")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn.assistant .note")
    assert page.text_content(".turn.user") == "Hello <b>you</b>\nagain" and page.locator(".turn.user b").count() == 0
    assert "24 tokens" in page.text_content(".turn.assistant .note") and page.is_visible("#send")
    expect(page.locator("#cache-text")).to_contain_text("blocks")
    page.keyboard.press("Alt+n")
    assert page.locator(".turn").count() == 0 and page.locator("#text:focus").count() == 1


def test_escape_stops_the_answer_and_frees_its_blocks(page, server) -> None:
    unlock(page)
    page.fill("#max_tokens", "1900")
    page.fill("#text", "Tell me all")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.assistant")).to_contain_text(re.compile(r"\w.{10}", re.S))
    page.keyboard.press("Escape")
    page.wait_for_selector(".turn.assistant .note")
    assert page.text_content(".turn.assistant .note") == "stopped"
    for _ in range(100):
        if server.served.open == 0 and server.blocks_used() == 0:
            break
        page.wait_for_timeout(50)
    assert server.served.open == 0 and server.blocks_used() == 0


def test_a_refusal_is_shown(page, server) -> None:
    unlock(page)
    page.fill("#text", "x " * 5000)
    page.focus("#text")
    page.keyboard.press("Enter")
    page.wait_for_selector(".note.error")
    assert "longer than the context" in page.text_content(".note.error")


def test_two_models_side_by_side(page_of_two, pair) -> None:
    """A question goes to both, each answers under its own name and remembers its own answer; one can be put away."""
    page = page_of_two
    unlock(page)
    expect(page.locator("#name-a")).to_have_text("tiny")
    expect(page.locator("#name-b")).to_have_text("tiny-2")
    assert page.text_content("#model") == "tiny, tiny-2" and page.locator(".column:visible").count() == 2
    page.fill("#max_tokens", "12")
    asked = []
    page.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)
    for text in ("Hello", "And then?"):
        page.fill("#text", text)
        page.focus("#text")
        page.keyboard.press("Enter")
        expect(page.locator("#send")).to_be_visible()
    for log in ("#log", "#log-b"):
        assert page.locator(f"{log} .turn.user").all_text_contents() == ["Hello", "And then?"]
        assert page.locator(f"{log} .turn.assistant .note").count() == 2 and page.locator(f"{log} .error").count() == 0
    assert [one["model"] for one in asked] == ["tiny", "tiny-2"] * 2
    assert [len(one["messages"]) for one in asked] == [1, 1, 3, 3]
    for model, one in zip(pair.house.models, asked[2:]):
        assert model.engine.stats().generated > 0, "each engine has written its own answers"
        assert one["messages"][1]["role"] == "assistant"
    page.select_option("#model-b", "")
    assert page.locator(".column:visible").count() == 1 and not page.is_visible("#name-a")
    page.select_option("#model-a", "tiny-2")
    page.fill("#text", "Hello")
    page.focus("#text")
    page.keyboard.press("Enter")
    expect(page.locator("#log .turn.assistant .note")).to_have_count(1)
    assert asked[-1]["model"] == "tiny-2" and len(asked) == 5


def test_one_model_alone_shows_no_choice(page, server) -> None:
    unlock(page)
    assert not page.is_visible("#models") and page.locator(".column:visible").count() == 1 and not page.is_visible("#name-a")


MARKDOWN = """# Title
Some **bold**, *slanted* `co<d>e` and [a link](https://example.com) or [a bad one](javascript:alert(1)).
<img src=x onerror=alert(1)> <script>alert(2)</script>

- one
  - inner
- two

1. first
2. second

> quoted

| a | b |
|---|---|
| 1 | <i>2</i> |

```python
if a < b:
    print("<hi>")
```
```
half open"""


def test_markdown_becomes_nodes_and_never_html(page) -> None:
    html = page.evaluate(
        """async (text) => { const { render } = await import("/web/markdown.js");
        const node = document.createElement("div"); node.append(render(text)); return node.innerHTML; }""",
        MARKDOWN,
    )
    for part in ("<h3>Title</h3>", "<strong>bold</strong>", "<em>slanted</em>", "<code>co&lt;d&gt;e</code>", "<ul><li>inner</li></ul>", "<ol", "<blockquote>",
                 "<td>&lt;i&gt;2&lt;/i&gt;</td>", "print(\"&lt;hi&gt;\")", "half open", 'href="https://example.com"', "&lt;script&gt;"):  # fmt: skip
        assert part in html, (part, html)
    for part in ("<img", "<script", "<i>", 'href="javascript'):
        assert part not in html, (part, html)
    cuts = page.evaluate(
        """async (text) => { const { render } = await import("/web/markdown.js"); let bad = 0;
        for (let at = 0; at <= text.length; at += 1) { const node = document.createElement("div"); node.append(render(text.slice(0, at)));
        if (node.querySelector("img, script, i")) bad += 1; } return bad; }""",
        MARKDOWN,
    )
    assert cuts == 0
