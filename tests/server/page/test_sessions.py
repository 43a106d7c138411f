"""Signing in, sessions, forged requests, and what one user may see of another."""

import time

import httpx
import pytest

from tests.server.page.client import PASSWORD, Browser
from thinkstack.server.page import sessions as sessions_module
from thinkstack.server.page.page import COOKIE, CSP
from thinkstack.server.page.sessions import Sessions
from thinkstack.server.settings import ServerSettings


def test_a_session_is_a_cookie_that_scripts_and_other_sites_do_not_get(ada):
    server, _ = ada
    body = {"name": "ada", "password": PASSWORD}
    reply = httpx.post(f"{server.url}/page/sign-in", json=body)
    cookie = reply.headers["set-cookie"].lower()
    assert cookie.startswith(f"{COOKIE}=") and "httponly" in cookie and "samesite=lax" in cookie
    assert "secure" not in cookie
    with server.server.accounts.database.read() as connection:
        stored = connection.exec_driver_sql("SELECT token_hash FROM sessions").scalars().all()
    assert all(reply.cookies[COOKIE] not in each for each in stored)


def test_each_sign_in_makes_a_new_session_and_ends_the_old_one(ada):
    server, browser = ada
    old = browser.http.cookies[COOKIE]
    browser.call("POST", "/page/sign-in", {"name": "ada", "password": PASSWORD})
    assert browser.http.cookies[COOKIE] != old
    assert httpx.get(f"{server.url}/page/me", cookies={COOKIE: old}).status_code == 401


def test_a_token_that_the_server_has_not_made_signs_nobody_in(ada):
    server, _ = ada
    chosen = "a" * 43
    reply = httpx.post(
        f"{server.url}/page/sign-in", json={"name": "ada", "password": PASSWORD}, cookies={COOKIE: chosen}
    )
    assert reply.cookies[COOKIE] != chosen
    assert httpx.get(f"{server.url}/page/me", cookies={COOKIE: chosen}).status_code == 401


@pytest.mark.parametrize(("name", "password"), [("ada", "wrong horse"), ("bob", PASSWORD), ("ada", ""), ("", "")])
def test_a_wrong_name_and_a_wrong_password_are_one_error(page, name, password):
    browser = Browser(page())
    found = browser.error("POST", "/page/sign-in", {"name": name, "password": password})
    assert found == (401, "wrong_password", "wrong user name or password")


def test_the_first_user_signs_in_with_the_api_key_and_sets_a_password(page):
    server = page()
    server.server.accounts.add_user("eve")
    key = server.server.accounts.add_key(server.server.accounts.user_id("eve"))
    assert Browser(server).error("POST", "/page/sign-in", {"name": "ada", "password": key})[0] == 401
    browser = Browser(server, "eve", key)
    assert not browser.call("GET", "/page/me")["has_password"]
    assert browser.error("POST", "/page/password", {"old": "", "new": "short"})[:2] == (400, "invalid")
    browser.call("POST", "/page/password", {"old": "", "new": "a new password"})
    assert browser.error("POST", "/page/password", {"old": "x", "new": "another one"})[:2] == (401, "wrong_password")
    Browser(server, "eve", "a new password")


def test_a_new_password_ends_all_other_sessions(ada):
    server, browser = ada
    other = Browser(server, "ada")
    assert len(browser.call("GET", "/page/sessions")["sessions"]) == 2
    browser.call("POST", "/page/password", {"old": PASSWORD, "new": "a new password"})
    assert other.error("GET", "/page/sessions")[:2] == (401, "signed_out")
    (left,) = browser.call("GET", "/page/sessions")["sessions"]
    assert left["is_this"]


def test_a_session_can_be_revoked_and_signed_out(ada):
    server, browser = ada
    other = Browser(server, "ada")
    found = {row["is_this"]: row["id"] for row in browser.call("GET", "/page/sessions")["sessions"]}
    browser.call("DELETE", f"/page/sessions/{found[False]}")
    assert other.error("GET", "/page/conversations")[:2] == (401, "signed_out")
    token = browser.http.cookies[COOKIE]
    browser.call("POST", "/page/sign-out")
    assert httpx.get(f"{server.url}/page/me", cookies={COOKIE: token}).status_code == 401


def test_a_disabled_user_is_signed_out(ada):
    server, browser = ada
    accounts = server.server.accounts
    accounts.change_user(accounts.user_id("ada"), disabled=True)
    assert browser.error("GET", "/page/conversations")[:2] == (401, "signed_out")


def test_an_unused_session_ends_after_a_month(open_accounts, clock):
    accounts = open_accounts()
    accounts.set_password(accounts.add_user("ada"), PASSWORD)
    sessions = Sessions(accounts, "off")
    token = sessions.sign_in("ada", PASSWORD, "", "")
    clock.seconds += 29 * 86_400
    sessions.find(token)
    clock.seconds += 29 * 86_400
    sessions.find(token)
    clock.seconds += 31 * 86_400
    with pytest.raises(sessions_module.AuthenticationError):
        sessions.find(token)


def test_many_failed_sign_ins_have_to_wait(page):
    browser = Browser(page())
    body = {"name": "ada", "password": "wrong"}
    found = [browser.error("POST", "/page/sign-in", body)[0] for _ in range(sessions_module.MAX_FAILURES + 1)]
    assert found == [401] * sessions_module.MAX_FAILURES + [429]
    reply = browser.request("POST", "/page/sign-in", {"name": "ada", "password": PASSWORD})
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limited")
    assert 0 < int(reply.headers["retry-after"]) <= sessions_module.FAILURE_SECONDS


def test_many_new_accounts_of_one_address_have_to_wait(page):
    server = page(settings=ServerSettings(sign_up="open"))
    found = []
    for number in range(sessions_module.MAX_FAILURES + 1):
        body = {"name": f"user{number}", "password": "long enough"}
        found.append(Browser(server).request("POST", "/page/sign-up", body).status_code)
    assert found == [200] * sessions_module.MAX_FAILURES + [429]


def test_sign_up_is_off_by_invitation_or_open(page):
    server = page(settings=ServerSettings(sign_up="off"))
    body = {"name": "bob", "password": "long enough"}
    assert Browser(server).error("POST", "/page/sign-up", body)[:2] == (403, "forbidden")
    server = page(settings=ServerSettings(sign_up="invitation"))
    admin = Browser(server, "ada")
    invitation = admin.call("POST", "/page/invitations")["invitation"]
    assert Browser(server).error("POST", "/page/sign-up", body | {"invitation": "guess"})[:2] == (403, "forbidden")
    taken = {"name": "ada", "password": "long enough", "invitation": invitation}
    assert Browser(server).error("POST", "/page/sign-up", taken)[:2] == (400, "invalid")
    bob = Browser(server)
    bob.call("POST", "/page/sign-up", body | {"invitation": invitation})
    assert bob.call("GET", "/page/me")["user"] == "bob"
    again = {"name": "eve", "password": "long enough", "invitation": invitation}
    assert Browser(server).error("POST", "/page/sign-up", again)[:2] == (403, "forbidden")
    bob.csrf = bob.call("GET", "/page/me")["csrf"]
    assert bob.error("POST", "/page/invitations")[:2] == (403, "forbidden")
    server = page(settings=ServerSettings(sign_up="open"))
    Browser(server).call("POST", "/page/sign-up", {"name": "eve", "password": "long enough"})


@pytest.mark.parametrize(
    "headers",
    [
        {"X-CSRF-Token": ""},
        {"X-CSRF-Token": "0" * 32},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_change_that_another_site_sends_is_refused(ada, headers):
    server, browser = ada
    body = {"text": "?", "models": ["scripted"], "thinking": False}
    assert browser.error("POST", "/page/send", body, **headers)[:2] == (403, "forbidden")
    assert server.server.models.members["default"].service.status.num_sampled == 0


def test_the_token_of_another_session_is_refused(ada):
    server, browser = ada
    other = Browser(server, "ada")
    browser.csrf = other.csrf
    assert browser.error("POST", "/page/sign-out")[:2] == (403, "forbidden")


def test_without_keys_the_page_opens_at_once_and_other_sites_are_refused(page):
    browser = Browser(page(no_keys=True))
    found = browser.call("GET", "/page/me")
    assert (found["is_local"], found["user"], found["models"][0]["name"]) == (True, "ada", "scripted")
    body = {"text": "?", "models": ["scripted"], "thinking": False}
    assert browser.error("POST", "/page/send", body)[:2] == (403, "forbidden")
    browser.csrf = found["csrf"]
    assert browser.error("POST", "/page/send", body, Origin="https://evil.example")[:2] == (403, "forbidden")
    assert browser.ask("?")["status"] == "stop"
    assert browser.error("GET", "/page/sessions")[:2] == (403, "forbidden")
    assert browser.request("GET", "/page/me", Host="evil.example").status_code == 421


def test_users_see_nothing_of_each_other(page):
    server = page(settings=ServerSettings(sign_up="open"))
    ada, bob = Browser(server, "ada"), Browser(server)
    bob.call("POST", "/page/sign-up", {"name": "bob", "password": "long enough"})
    bob.csrf = bob.call("GET", "/page/me")["csrf"]
    sent = ada.send("a secret")
    place, answer = sent["conversation"]["id"], sent["answers"][0]["id"]
    ada.read(answer)
    key = ada.call("GET", "/page/keys")["keys"][0]["id"]
    calls = [
        ("GET", f"/page/conversations/{place}", None),
        ("PATCH", f"/page/conversations/{place}", {"title": "mine"}),
        ("DELETE", f"/page/conversations/{place}", None),
        ("POST", f"/page/conversations/{place}/share", None),
        ("DELETE", f"/page/conversations/{place}/share", None),
        ("GET", f"/page/conversations/{place}/export", None),
        ("GET", f"/page/messages/{answer}/source", None),
        ("POST", f"/page/messages/{answer}/select", None),
        ("POST", f"/page/messages/{answer}/regenerate", {"model": "scripted", "thinking": False}),
        ("POST", f"/page/messages/{answer}/continue", {"reasoning": "x"}),
        ("GET", f"/page/answers/{answer}/events", None),
        ("POST", f"/page/answers/{answer}/stop", None),
        ("POST", f"/page/answers/{answer}/answer-now", None),
        ("DELETE", f"/page/keys/{key}", None),
        ("POST", "/page/send", {"parent": answer, "text": "?", "models": ["scripted"], "thinking": False}),
        ("POST", "/page/send", {"conversation": place, "text": "?", "models": ["scripted"], "thinking": False}),
    ]
    for method, path, body in calls:
        assert bob.error(method, path, body)[:2] == (404, "not_found"), path
    session = ada.call("GET", "/page/sessions")["sessions"][0]["id"]
    bob.call("DELETE", f"/page/sessions/{session}")  # ids of sessions are numbers; it changes nothing
    assert ada.call("GET", f"/page/conversations/{place}")["title"] == "a secret"
    assert bob.call("GET", "/page/conversations?q=secret") == {"conversations": [], "next": None}
    assert bob.call("GET", "/page/usage")["days"] == []


def test_every_document_forbids_what_is_not_its_own(ada):
    server, browser = ada
    for path in ("/", "/ui/style.css"):
        reply = httpx.get(server.url + path)
        assert reply.headers["content-security-policy"] == CSP
        assert reply.headers["x-content-type-options"] == "nosniff"
        again = httpx.get(server.url + path, headers={"If-None-Match": reply.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for path in ("/ui/nothing.js", "/ui/..%2f..%2fapp.py", "/ui/%2e%2e/app.py", "/ui/"):
        assert httpx.get(server.url + path).status_code == 404
    assert browser.request("GET", "/page/me").headers["cache-control"] == "no-store"


def test_a_server_without_the_page_has_none_of_its_routes(page):
    server = page(settings=ServerSettings(page=False))
    for path in ("/", "/ui/index.html", "/page/me", "/s/token"):
        assert httpx.get(server.url + path).status_code == 404


def test_names_that_were_tried_long_ago_are_forgotten(open_accounts, monkeypatch):
    accounts = open_accounts()
    accounts.set_password(accounts.add_user("ada"), PASSWORD)
    sessions = Sessions(accounts, "off")
    monkeypatch.setattr(sessions_module, "MAX_SOURCES", 4)
    monkeypatch.setattr(sessions_module, "FAILURE_SECONDS", -1.0)
    for number in range(6):
        with pytest.raises(sessions_module.AuthenticationError):
            sessions.sign_in("ada", "wrong", f"10.0.0.{number}", "")
    assert len(sessions._failures) <= 4


def test_a_wrong_password_takes_as_long_as_a_wrong_name(open_accounts):
    accounts = open_accounts()
    accounts.set_password(accounts.add_user("ada"), PASSWORD)

    def seconds(name):
        """The shortest of five, as other work on the machine makes some longer."""
        found = []
        for _ in range(5):
            began = time.perf_counter()
            with pytest.raises(sessions_module.AuthenticationError):
                accounts.check_password(name, "wrong")
            found.append(time.perf_counter() - began)
        return min(found)

    assert 1 / 4 < seconds("ada") / seconds("nobody") < 4
