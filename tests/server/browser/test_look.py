"""Accessibility, languages, layout, and what hostile text may do, in Chromium."""

import pytest

from tests.server.browser.conftest import ask, thought, wait_done
from tests.server.page.hostile import cases
from thinkstack.server.settings import ServerSettings

pytestmark = pytest.mark.page
ROW = "| " + " | ".join(["a wide cell"] * 12) + " |"
WIDE = (
    f"I think. {'x' * 200}</think>\n\n{ROW}\n|{'---|' * 12}\n{ROW}\n\n```\n{'long_line ' * 40}\n```\n\n> quoted\n\n"
    f"\\[ x {'+ x_k ' * 60} \\]\n\n[a link](https://example.com) and `code`."
)
"""An answer whose parts are wider than the page."""


@pytest.fixture
def axe():
    """Violations that axe-core finds in a tab."""
    package = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed: .[page]")

    def run(tab):
        found = package.Axe().run(tab).response["violations"]
        return [(each["id"], [node["html"][:120] for node in each["nodes"]]) for each in found]

    return run


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_every_view_is_accessible(start, browse, axe, scheme, width):
    server = start(settings=ServerSettings(sign_up="open"))
    size = {"width": width, "height": 800}
    tab = browse(server, sign_in=False, color_scheme=scheme, bypass_csp=True)
    tab.set_viewport_size(size)
    tab.locator("#sign-in-submit").wait_for()
    assert axe(tab) == []
    tab = browse(server, color_scheme=scheme, bypass_csp=True)
    tab.set_viewport_size(size)
    tab.wait_for_selector("#composer-text")
    assert axe(tab) == []
    ask(tab, "a question")
    wait_done(tab)
    thought(tab)
    assert axe(tab) == []
    tab.locator("#menu-open").click()
    assert axe(tab) == []
    tab.keyboard.press("Escape")
    if width < 700:
        tab.locator("#open-sidebar").click()
        tab.wait_for_timeout(400)
        assert axe(tab) == []
    tab.locator("#settings-open").click()
    dialog = tab.get_by_role("dialog")
    for place in range(dialog.get_by_role("tab").count()):
        dialog.get_by_role("tab").nth(place).click()
        assert axe(tab) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_every_dialog_and_the_shared_page_are_accessible(start, browse, axe, scheme, width):
    tab = browse(start(answer=lambda prompt, index: WIDE, no_keys=True), color_scheme=scheme, bypass_csp=True)
    tab.set_viewport_size({"width": width, "height": 800})
    ask(tab, "a question " * 20)
    wait_done(tab)
    assert axe(tab) == []
    dialog = tab.get_by_role("dialog")
    for action in ("edit", "edit-thinking"):
        tab.locator(f".message [data-action={action}]").first.click()
        dialog.wait_for()
        assert axe(tab) == [], action
        tab.keyboard.press("Escape")
        dialog.wait_for(state="detached")
    for name in ("Rename", "Delete", "Share"):
        tab.locator("#menu-open").click()
        tab.locator(".menu").get_by_text(name, exact=True).click()
        dialog.wait_for()
        assert axe(tab) == [], name
        if name != "Share":
            tab.keyboard.press("Escape")
            dialog.wait_for(state="detached")
    tab.goto(tab.get_by_role("textbox", name="Link").input_value())
    tab.locator("details summary").click()
    assert axe(tab) == []
    assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_running_answers_side_by_side_are_accessible(start, browse, axe, scheme):
    server = start(no_keys=True)
    server.server.models.get("deepseek-chat").config.__dict__["on_page"] = True
    tab = browse(server, color_scheme=scheme, bypass_csp=True)
    tab.locator("#compare").click()
    tab.locator("#second-model").select_option("deepseek-chat")
    server.pace.seconds = 0.02
    ask(tab, "?")
    wait_done(tab, "thinking")
    assert axe(tab) == []
    server.pace.seconds = 0.0
    wait_done(tab)
    assert axe(tab) == []


def test_the_page_speaks_chinese(start, browse, chromium):
    server = start(no_keys=True)
    context = chromium.new_context(locale="zh-CN")
    tab = browse(server, context=context)
    tab.wait_for_selector("#composer-text")
    assert tab.evaluate("document.documentElement.lang").startswith("zh")
    assert tab.locator("#deep-think").inner_text().strip() == "深度思考"
    ask(tab, "你好")
    tab.locator(".message.assistant .figures").wait_for()
    context.close()


def test_nothing_moves_when_a_thought_is_folded(start, browse):
    tab = browse(start(no_keys=True))
    for number in range(3):
        ask(tab, f"question {number}")
        wait_done(tab)
    tab.evaluate(  # what moves by itself; what a click opens pushes the text below it away
        "window.shift = 0; new PerformanceObserver(list => { for (const entry of list.getEntries())"
        " if (!entry.hadRecentInput) window.shift += entry.value; }).observe({type: 'layout-shift', buffered: false})"
    )
    for place in (1, 2):
        toggle = tab.locator(".message.assistant").nth(place).locator(".thinking-toggle")
        toggle.scroll_into_view_if_needed()
        before = toggle.bounding_box()["y"]
        for _ in range(2):
            toggle.click()
            tab.wait_for_timeout(700)
            assert abs(toggle.bounding_box()["y"] - before) <= 1
    assert tab.evaluate("window.shift") == 0


def test_the_reader_is_followed_only_at_the_end(start, browse):
    server = start(answer=lambda prompt, index: "</think>" + "Word after word. " * 100, no_keys=True)
    tab = browse(server)
    for number in range(3):
        ask(tab, f"question {number}")
        wait_done(tab)
    server.pace.seconds = 0.02
    ask(tab, "the last one", thinking=False)
    wait_done(tab, "answering")
    tab.wait_for_timeout(500)
    end = "box => box.scrollHeight - box.clientHeight - box.scrollTop"
    assert tab.locator("#messages").evaluate(end) <= 40
    tab.evaluate("document.querySelector('#messages').scrollTop = 0")
    tab.wait_for_timeout(800)
    assert tab.evaluate("document.querySelector('#messages').scrollTop") == 0


def hostile_conversations():
    """Exported conversations with hostile text in every field: one with all cases, and one for each hostile title."""
    texts = [(kind, text.replace("\0", "").encode(errors="replace").decode()) for _, kind, text in cases()]
    head = {"format": "thinkstack-conversation", "version": 1}
    rows = []
    for place, (_, text) in enumerate(texts):
        question, parent = 2 * place, 2 * place - 1 if place else None
        files = [{"name": text[:255], "text": text}]
        rows.append({"id": question, "parent": parent, "role": "user", "content": text, "files": files})
        answer = {"id": question + 1, "parent": question, "role": "assistant", "content": text, "reasoning": text}
        rows.append(answer | {"model": text[:255], "status": "failed", "error": text[:1000]})
    yield head | {"title": "all", "leaf": len(rows) - 1, "messages": rows}
    for kind, text in texts:
        if kind == "name" and text:
            yield head | {"title": text[:200], "messages": []}


def test_hostile_text_runs_nothing_and_loads_nothing(start, browse):
    server = start(no_keys=True)
    requests, dialogs = [], []
    tab = browse(server)
    tab.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: requests.append(request.url))
    ids = []
    for each in hostile_conversations():
        reply = tab.request.post(f"{server.url}/page/import", data=each, headers={"X-CSRF-Token": "local"})
        assert reply.ok, reply.text()
        ids.append(reply.json()["id"])
    tab.goto(f"{server.url}/#/c/{ids[0]}")
    tab.reload()
    tab.locator(".message.assistant").nth(len(list(cases())) - 1).wait_for(state="attached")
    tab.locator(".thinking-toggle").evaluate_all("all => all.forEach(each => each.click())")
    count = tab.locator(".thinking-toggle:visible").count()
    tab.locator(".thinking-text").nth(count - 1).wait_for(state="attached")
    share = tab.request.post(f"{server.url}/page/conversations/{ids[0]}/share", headers={"X-CSRF-Token": "local"})
    tab.goto(server.url + share.json()["url"])
    tab.locator("article.assistant").nth(len(list(cases())) - 1).wait_for(state="attached")
    tab.wait_for_timeout(500)
    export = tab.request.get(f"{server.url}/page/conversations/{ids[0]}/export?format=html").text()
    tab.goto("about:blank")
    tab.set_content(export)  # as a file that is opened, without the headers of the server
    tab.wait_for_timeout(500)
    assert dialogs == []
    assert [url for url in requests if not url.startswith((server.url, "data:", "about:"))] == []
    assert tab.evaluate("window.hacked") is None
