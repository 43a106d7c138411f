"""A system Chromium, driven by Playwright."""

import contextlib
import os
import re
import shutil

import pytest

from tests.server.live import live
from tests.server.page.client import PASSWORD, Pace
from thinkstack.server.settings import ServerSettings

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
THOUGHT = "I look at the question from all sides. " * 30
CONTENT = "The **sum** is \\(1+2=3\\).\n\n- one\n- two\n\n```python\nprint(1)\n```\n\nThat costs $5 and $10."


def answer(prompt, index):
    """Thinking, unless the prompt has ended it."""
    return CONTENT if prompt.endswith("</think>") else f"{THOUGHT}</think>{CONTENT}"


def find_chromium():
    """The path in THINKSTACK_CHROMIUM, or a program of the system."""
    return os.environ.get("THINKSTACK_CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)


@pytest.fixture(scope="session")
def chromium():
    """The browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: .[page]")
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium: install it, or set THINKSTACK_CHROMIUM to its path")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def start(tmp_path):
    """Start servers with the page; the user ada has a password."""
    with contextlib.ExitStack() as stack:

        def make(answer=answer, seconds=0.0, settings=None, **values):
            server = stack.enter_context(live(tmp_path, answer, settings=settings or ServerSettings(), **values))
            accounts = server.server.accounts
            accounts.set_password(accounts.user_id("ada"), PASSWORD)
            server.pace = Pace(server, seconds)
            return server

        yield make


@pytest.fixture
def browse(chromium):
    """Open tabs: a context each unless one is given; errors of scripts fail the test."""
    opened, errors = [], []

    def open_tab(server, context=None, sign_in=True, path="/", **options):
        if context is None:
            context = chromium.new_context(locale="en-US", viewport={"width": 1200, "height": 800}, **options)
            opened.append(context)
        tab = context.new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.set_default_timeout(20_000)
        tab.goto(server.url + path)
        if sign_in and server.server.needs_keys:
            tab.get_by_label("User name").fill("ada")
            tab.get_by_label("Password").fill(PASSWORD)
            tab.locator("#sign-in-submit").click()
        return tab

    yield open_tab
    for context in opened:
        context.close()
    assert errors == []


def ask(tab, text, thinking=True, is_sent=True):
    """Send a message, and wait until it is among the others. is_sent: False if it is refused."""
    tab.locator("#model option").first.wait_for(state="attached")
    switch = tab.locator("#deep-think")
    if (switch.get_attribute("aria-pressed") == "true") != thinking:
        switch.click()
    place = tab.locator(".message.user").count()
    tab.fill("#composer-text", text)
    tab.press("#composer-text", "Enter")
    if is_sent:
        tab.locator(".message.user").nth(place).wait_for()


def wait_done(tab, word="done"):
    """Wait for the status."""
    tab.locator("#status", has_text=re.compile(f"^{word}$")).wait_for()


def thought(tab, place=-1):
    """Open the thinking of an answer and return its text."""
    message = tab.locator(".message.assistant").nth(place)
    toggle = message.locator(".thinking-toggle")
    if toggle.get_attribute("aria-expanded") != "true":
        toggle.click()
    message.locator(".thinking-text", has_text=re.compile(r"\S")).wait_for()
    return message.locator(".thinking-text").inner_text()


def body_of(tab, place=-1):
    """The text of an answer."""
    return tab.locator(".message.assistant .answer-body").nth(place).inner_text()
