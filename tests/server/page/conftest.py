"""A server with the page."""

import contextlib

import pytest

from tests.server.live import live
from tests.server.page.client import PASSWORD, Browser
from thinkstack.server.settings import ServerSettings

THOUGHT = "Let me think. " * 20
CONTENT = "It is **Paris**.\n\n- one\n- two\n\nThat costs $5 and $10."


def answer(prompt, index):
    """Thinking, unless the prompt has ended it."""
    return CONTENT if prompt.endswith("</think>") else f"{THOUGHT}</think>{CONTENT}"


@pytest.fixture
def page(tmp_path):
    """Start servers with the page; the user ada has a password."""
    with contextlib.ExitStack() as stack:

        def start(answer=answer, settings=None, **values):
            server = stack.enter_context(live(tmp_path, answer, settings=settings or ServerSettings(), **values))
            accounts = server.server.accounts
            accounts.set_password(accounts.user_id("ada"), PASSWORD)
            return server

        yield start


@pytest.fixture
def ada(page):
    """A server, and ada's browser."""
    server = page()
    return server, Browser(server, "ada")
