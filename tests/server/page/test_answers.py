"""Answers belong to the server: streams, rejoining, stopping, and what is written down."""

import time

import httpx
import pytest

from tests.server.page.client import Browser, Pace, Seen
from tests.server.page.conftest import CONTENT, THOUGHT
from tests.server.requests import ledger_rows, until
from thinkstack.server.page.markdown import render
from thinkstack.server.settings import ServerSettings


def test_an_answer_is_streamed_written_down_and_charged_once(ada):
    server, browser = ada
    sent = browser.send("What is the capital of France?")
    seen = browser.read(sent["answers"][0]["id"])
    assert seen.reasoning == THOUGHT.rstrip() or seen.reasoning == THOUGHT
    assert "".join(seen.blocks) == render(CONTENT) == seen.message["html"]
    assert (seen.message["status"], seen.message["thinking"]) == ("stop", True)
    stored = browser.call("GET", f"/page/conversations/{sent['conversation']['id']}")
    assert [message["role"] for message in stored["messages"]] == ["user", "assistant"]
    assert stored["messages"][1]["html"] == seen.message["html"]
    (row,) = ledger_rows(server)
    usage = seen.message["usage"]
    assert row["completion_tokens"] == usage["completion_tokens"]
    assert 0 < row["reasoning_tokens"] == usage["reasoning_tokens"]
    assert browser.call("GET", "/page/me")["deep_think"] is None


def test_what_an_answer_took_is_told_again_to_who_reads_it_later(ada):
    _, browser = ada
    id_ = browser.send("?")["answers"][0]["id"]
    first = browser.read(id_).message
    assert first["thinking_seconds"] is not None
    for key in ("thinking_seconds", "seconds", "usage", "status", "html", "at"):
        assert browser.read(id_).message[key] == first[key], key


def test_a_process_that_joins_knows_how_long_an_answer_takes_already(page):
    first = page(answer=lambda prompt, index: "I think on and on. " * 400)
    Pace(first, 0.01)
    second = page()
    browser, other = Browser(first, "ada"), Browser(second, "ada")
    id_ = browser.send("?")["answers"][0]["id"]
    sent = time.monotonic()
    until(lambda: other.call("GET", f"/page/messages/{id_}/source")["reasoning"] and time.monotonic() - sent > 0.3)
    found = next(body for _, name, body in other.events(id_) if name == "progress")
    assert found["state"] == "thinking" and found["seconds"] > 0.3 and found["thinking_seconds"] > 0.3
    browser.call("POST", f"/page/answers/{id_}/stop")


@pytest.mark.parametrize(("format", "modes"), [("v3", [False]), ("r1", [True]), ("v3_1_think", [False, True])])
@pytest.mark.parametrize("thinking", [False, True])
def test_a_model_without_this_mode_of_thinking_answers_in_the_one_it_has(page, format, modes, thinking):
    """A page with two models sends one switch for both; a model without a switch was refused."""
    browser = Browser(page(format=format), "ada")
    assert browser.call("GET", "/page/me")["models"][0]["modes"] == modes
    message = browser.ask("?", thinking=thinking)
    assert message["status"] == "stop"
    assert message["thinking"] == (thinking if thinking in modes else modes[0])


def test_a_model_that_does_not_tell_how_it_thinks_answers_directly(page, monkeypatch):
    """The template of SmolLM2 has no switch and starts no thinking: the page offered Deep Think, and refused it."""
    server = page(format="v3")
    monkeypatch.setattr(type(server.server.models.members["default"]), "can_start", lambda self, thinking: False)
    browser = Browser(server, "ada")
    found = browser.call("GET", "/page/me")["models"][0]
    assert (found["modes"], found["thinking"]) == ([False], False)
    for thinking in (False, True):
        assert browser.ask("?", thinking=thinking)["status"] == "stop"


def test_a_reader_that_comes_back_loses_nothing_and_gets_nothing_twice(page):
    server = page()
    pace, browser = Pace(server, 0.002), Browser(server, "ada")
    id_ = browser.send("?")["answers"][0]["id"]
    seen = Seen()
    for count in (1, 3, 2, 1, 5):
        browser.read(id_, seen, count)
    pace.seconds = 0.0
    browser.read(id_, seen)
    whole = browser.read(id_)
    assert (seen.reasoning, "".join(seen.blocks), seen.tail) == (whole.reasoning, render(CONTENT), "")
    assert "reset" not in seen.events


def test_a_position_that_is_not_known_begins_anew(ada):
    _, browser = ada
    id_ = browser.ask("?")["id"]
    seen = Seen(at="99999.99999")
    browser.read(id_, seen)
    assert seen.events == ["reset", "end"]
    assert "".join(seen.blocks) == render(CONTENT)


def test_stop_ends_the_answer_at_the_engine_and_what_was_delivered_is_charged(page):
    server = page(answer=lambda prompt, index: "I think on and on. " * 400)
    Pace(server, 0.002)
    browser = Browser(server, "ada")
    id_ = browser.send("?")["answers"][0]["id"]
    browser.read(id_, count=3)
    browser.call("POST", f"/page/answers/{id_}/stop")
    message = browser.read(id_).message
    assert message["status"] == "stopped"
    until(lambda: server.server.models.members["default"].service.status.running == 0)
    until(lambda: ledger_rows(server))
    assert ledger_rows(server)[0]["completion_tokens"] == message["usage"]["completion_tokens"] > 0
    assert browser.error("POST", f"/page/answers/{id_}/stop")[:2] == (409, "conflict")


def test_answer_now_closes_the_thinking(page):
    text = "I think. " * 300 + "</think>Late."
    server = page(answer=lambda prompt, index: text)
    Pace(server, 0.001)
    browser = Browser(server, "ada")
    id_ = browser.send("?")["answers"][0]["id"]
    seen = browser.read(id_, count=2)
    browser.call("POST", f"/page/answers/{id_}/answer-now")
    browser.read(id_, seen)
    assert len(seen.reasoning) < len(text) / 2
    assert "".join(seen.blocks)  # the script goes on after the injected tokens


def test_an_answer_goes_on_without_readers_for_a_while_and_then_ends(page):
    server = page(answer=lambda prompt, index: "I think on and on. " * 400, settings=ServerSettings(unread_seconds=0.5))
    Pace(server, 0.01)
    browser = Browser(server, "ada")
    id_ = browser.send("?")["answers"][0]["id"]
    until(lambda: browser.call("GET", f"/page/messages/{id_}/source")["reasoning"])
    until(lambda: ledger_rows(server))
    message = browser.read(id_).message
    assert (message["status"], message["error"]) == ("stopped", "nobody was reading this answer any more")
    assert ledger_rows(server)[0]["completion_tokens"] == message["usage"]["completion_tokens"]


def test_another_process_joins_stops_and_sees_what_the_first_one_makes(page):
    first = page(answer=lambda prompt, index: "I think on and on. " * 400)
    pace = Pace(first, 0.01)
    second = page()
    browser = Browser(first, "ada")
    other = Browser(second, "ada")
    id_ = browser.send("?")["answers"][0]["id"]
    browser.read(id_, count=2)
    seen = other.read(id_, count=2)
    assert seen.reasoning.startswith("I think on")
    other.call("POST", f"/page/answers/{id_}/stop")
    other.read(id_, seen)
    pace.seconds = 0.0
    mine = browser.read(id_)
    assert (mine.message["status"], seen.message["status"]) == ("stopped", "stopped")
    assert mine.reasoning == seen.reasoning


def test_an_answer_of_a_process_that_died_has_failed(page):
    first = page(answer=lambda prompt, index: "I think on and on. " * 400)
    pace = Pace(first, 0.01)
    browser = Browser(first, "ada")
    sent = browser.send("?")
    id_ = sent["answers"][0]["id"]
    until(lambda: browser.call("GET", f"/page/messages/{id_}/source")["reasoning"])
    second = page()
    second.server.accounts.lapse_seconds = 0.0  # as if it had not been heard of for long
    other = Browser(second, "ada")
    message = other.call("GET", f"/page/conversations/{sent['conversation']['id']}")["messages"][1]
    assert (message["status"], message["error"]) == ("failed", "the server stopped in the middle of this answer")
    pace.seconds = 0.0


def test_what_the_engine_cannot_do_is_a_failed_answer_with_its_reason(page):
    server = page()
    browser = Browser(server, "ada")

    def fail():
        raise RuntimeError("broken")

    server.engine.step = fail
    message = browser.read(browser.send("?")["answers"][0]["id"]).message
    assert message["status"] == "failed"
    assert message["error"]


def test_a_locked_database_delays_what_is_written_and_loses_nothing(page):
    server = page(database_timeout=0.2)
    Pace(server, 0.01)
    browser = Browser(server, "ada")
    sent = browser.send("?")
    id_ = sent["answers"][0]["id"]
    with server.server.accounts.database.engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")  # begins with the lock
        seen = browser.read(id_)
        assert seen.message["status"] == "stop"
        connection.rollback()
    place = f"/page/conversations/{sent['conversation']['id']}"
    until(lambda: browser.call("GET", place)["messages"][1]["status"] == "stop")
    assert browser.call("GET", place)["messages"][1]["html"] == seen.message["html"]


def test_deleting_a_conversation_ends_its_answer(page):
    server = page(answer=lambda prompt, index: "I think on and on. " * 400)
    Pace(server, 0.01)
    browser = Browser(server, "ada")
    sent = browser.send("?")
    browser.call("DELETE", f"/page/conversations/{sent['conversation']['id']}")
    until(lambda: server.server.models.members["default"].service.status.running == 0)
    until(lambda: ledger_rows(server))
    assert browser.error("GET", f"/page/answers/{sent['answers'][0]['id']}/events")[:2] == (404, "not_found")


@pytest.mark.parametrize("after", ["", "x", "1", "-1.0", "1.2.3", "9999999999.0"])
def test_a_position_that_is_none_is_refused(ada, after):
    _, browser = ada
    id_ = browser.ask("?")["id"]
    assert browser.error("GET", f"/page/answers/{id_}/events?after={after}")[:2] == (400, "invalid")


def test_a_reader_that_leaves_ends_nothing(page):
    server = page()
    pace = Pace(server, 0.005)
    browser = Browser(server, "ada")
    id_ = browser.send("?")["answers"][0]["id"]
    with httpx.stream("GET", f"{server.url}/page/answers/{id_}/events", cookies=browser.http.cookies) as reply:
        next(reply.iter_raw())
    pace.seconds = 0.0
    time.sleep(0.05)
    assert browser.read(id_).message["status"] == "stop"
