"""The page in a real browser: it works, stops, lets nothing in. Needs Chromium and playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from served import Served, serving

from halfbyte.llm import LLM
from halfbyte.specs import LoadOptions

pytestmark = pytest.mark.browser
WAIT_MS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("needs Chromium")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(LLM("demo", LoadOptions(context=1024, threads=1, parallel=2, spare=1))) as it:
        yield it


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """A fresh page; at its end nothing was complained about and nothing came from elsewhere."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    complaints: list[str] = []
    elsewhere: list[str] = []
    page.on("console", lambda it: it.type == "error" and complaints.append(it.text))
    page.on("pageerror", lambda it: complaints.append(str(it)))
    page.on("request", lambda it: it.url.startswith(served.url) or elsewhere.append(it.url))
    page.set_default_timeout(WAIT_MS)
    page.goto(served.url)
    page.locator(".compose textarea").wait_for()
    yield page
    context.close()
    assert elsewhere == []
    assert [it for it in complaints if "401" not in it] == []


def ask(page: Any, text: str) -> None:
    page.locator(".compose textarea").fill(text)
    page.keyboard.press("Enter")


def answered(page: Any, count: int = 1) -> str:
    """Waits until so many answers have their figures; the last one's text."""
    page.locator(".numbers", has_text="first after").nth(count - 1).wait_for()
    return page.locator(".message.assistant .body").last.inner_text()


def test_a_conversation(page: Any):
    ask(page, "Who are you?")
    assert answered(page)
    figures = page.locator(".numbers").last.inner_text()
    assert "tokens/s" in figures and "prompt" in figures
    ask(page, "And what is the sea?")
    assert answered(page, 2)
    page.get_by_label("Answer again").last.click()
    answered(page, 2)
    page.get_by_label("Edit and ask again").last.click()
    assert page.locator(".compose textarea").input_value() == "And what is the sea?"
    assert page.locator(".message").count() == 2
    page.reload()  # it is kept in this browser
    page.locator(".side li button").first.click()
    assert page.locator(".message").count() >= 2


def test_stop_really_stops(page: Any, served: Served):
    page.route("**/v1/chat/completions", lambda route: route.continue_(
        post_data={**route.request.post_data_json, "ignore_eos": True}))  # fmt: skip
    ask(page, "Go on and on.")
    page.get_by_label("Stop").click()
    page.get_by_label("Send").wait_for()
    desk = served.service.desk
    for _ in range(300):
        if not desk.live:
            break
        page.wait_for_timeout(20)
    assert desk.live == 0


def streamed(page: Any, *chunks: dict[str, Any]) -> None:
    """Answers the next question with these chunks."""
    import json

    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        status=200, content_type="text/event-stream", body=body))  # fmt: skip


def chunk(delta: dict[str, Any], *drafted: bool) -> dict[str, Any]:
    return {"choices": [{"delta": delta}], "drafted": list(drafted)}


ATTACK = """<script>window.pwned = 1</script>
<img src=x onerror="window.pwned = 1"> <svg onload="window.pwned = 1">
[link](javascript:window.pwned=1) ![p](https://evil.example/p.gif)
<iframe src="https://evil.example"></iframe> <style>body{display:none}</style>
"""


def test_a_model_cannot_do_anything_to_the_page(page: Any):
    call = {"id": "c", "index": 0, "function": {"name": "<b>x", "arguments": ATTACK}}
    streamed(page, chunk({"reasoning_content": ATTACK}), chunk({"content": ATTACK}, False),
             chunk({"tool_calls": [call]}))  # fmt: skip
    ask(page, ATTACK)
    page.locator(".call").wait_for()
    for label in ("drafted tokens", None):
        if label:
            page.get_by_label(label).check()
        assert page.evaluate("() => window.pwned") is None
        body = page.locator(".log")
        assert body.locator("script, iframe, style, form, img").count() == 0
        assert body.locator("a[href^='javascript']").count() == 0


def test_thoughts_calls_and_drafted_tokens(page: Any):
    streamed(page, chunk({"reasoning_content": "Let me see."}, False),
             chunk({"content": "It is "}, False), chunk({"content": "31 degrees"}, True, True),
             chunk({"content": "."}, False))  # fmt: skip
    ask(page, "Is it warm?")
    page.locator(".thought summary", has_text="Thought").click()
    assert page.locator(".thought p").inner_text() == "Let me see."
    page.get_by_label("drafted tokens").check()
    assert page.locator(".drafted").all_inner_texts() == ["31 degrees"]
    assert page.locator(".pieces").inner_text() == "It is 31 degrees."


def test_a_long_answer_stays_smooth(page: Any):
    word = [chunk({"content": f"word{index} **bold** `code` "}, False) for index in range(1200)]
    streamed(page, *word)
    page.evaluate(
        "() => { window.long = 0; new PerformanceObserver((list) => { for (const it of "
        "list.getEntries()) window.long = Math.max(window.long, it.duration); })"
        ".observe({ entryTypes: ['longtask'] }); }"
    )
    ask(page, "Say much.")
    page.locator(".body", has_text="word1199").wait_for()
    assert page.evaluate("() => window.long") < 2000  # a bound for a machine under load


def test_the_screens(page: Any):
    for name, words in (
        ("Memory", "Planned and measured"), ("Speed", "tokens per second now"),
        ("Model", "From elsewhere"),
    ):  # fmt: skip
        page.get_by_role("link", name=name, exact=True).click()
        page.get_by_text(words).wait_for()
        assert page.get_by_role("link", name=name, exact=True).get_attribute("aria-current")
    page.get_by_role("link", name="Memory", exact=True).click()
    before = page.locator(".verdict").inner_text()
    page.get_by_label("Context to plan for").fill("0")
    page.locator("output", has_text="256").wait_for()
    page.wait_for_timeout(600)
    assert page.locator(".verdict").inner_text() != before


def test_light_dark_and_keys(page: Any):
    theme = "() => document.documentElement.dataset.theme"
    before = page.evaluate(theme)
    page.get_by_label("Light or dark").click()
    assert page.evaluate(theme) != before
    page.reload()
    page.locator(".compose textarea").wait_for()
    assert page.evaluate(theme) != before
    page.locator("h1").click()
    page.keyboard.press("/")
    assert page.evaluate("() => document.activeElement.tagName") == "TEXTAREA"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.locator(".compose textarea").input_value() == "one\ntwo"


@pytest.mark.parametrize("width", [360, 390, 768, 1200])
def test_nothing_is_wider_than_the_window(page: Any, width: int):
    page.set_viewport_size({"width": width, "height": 740})
    streamed(page, chunk({"content": "```\n" + "x" * 300 + "\n```\n" + "y" * 300}, False))
    ask(page, "z" * 200)
    page.locator(".code").wait_for()
    for name in ("chat", "memory", "speed", "model"):
        page.goto(f"{page.url.split('#')[0]}#{name}")
        page.wait_for_timeout(150)
        wide = page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, name


def test_on_a_phone_the_conversations_come_and_go(page: Any):
    page.set_viewport_size({"width": 390, "height": 740})
    opens = page.get_by_role("button", name="Conversations", exact=True)
    side = page.locator(".side")
    for leave in (
        lambda: page.mouse.click(350, 200),
        lambda: page.keyboard.press("Escape"),
        lambda: page.get_by_role("button", name="New conversation").click(),
    ):
        assert not side.is_visible()
        opens.click()
        page.locator(".side.open").wait_for()
        leave()
        side.wait_for(state="hidden")


def test_every_control_has_a_name(page: Any):
    for name in ("chat", "memory", "speed", "model"):
        page.goto(f"{page.url.split('#')[0]}#{name}")
        page.wait_for_timeout(150)
        nameless = page.evaluate(
            "() => [...document.querySelectorAll('button, input, textarea, select, a')].filter("
            "(it) => !(it.getAttribute('aria-label') || it.textContent.trim() || "
            "it.closest('label')?.textContent.trim())).map((it) => it.outerHTML)"
        )
        assert nameless == []


def test_a_key_is_asked_for(browser: Any):
    with serving(LLM("demo", LoadOptions(context=256, threads=1)), keys=("sk-1",)) as served:
        page = browser.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(served.url)
        page.locator("#key-input").fill("wrong")
        page.keyboard.press("Enter")
        page.wait_for_timeout(300)
        page.locator("#key-input").fill("sk-1")
        page.keyboard.press("Enter")
        page.locator(".compose textarea").wait_for()
        assert "sk-1" not in page.url
        page.close()
