"""Conversations: trees, the list, search, links, export and import."""

import httpx
import pytest

from tests.server.page.client import Browser, Pace
from tests.server.page.conftest import CONTENT
from tests.server.page.hostile import cases
from thinkstack.server.limits import Limits
from thinkstack.server.page import conversations as module
from thinkstack.server.page.conversations import Conversations, StoredMessage, new_id, title_of
from thinkstack.server.page.errors import NotFound
from thinkstack.server.prices import PriceTable
from thinkstack.server.settings import ServerSettings


def place_of(sent):
    return f"/page/conversations/{sent['conversation']['id']}"


def texts(found):
    return [message.get("text") or message["html"] for message in found["messages"]]


@pytest.fixture
def store(open_accounts):
    """An empty store and a user, on each kind of database."""
    accounts = open_accounts()
    return Conversations(accounts), accounts.add_user("ada")


def grow(store, user, conversation, *contents, parent=None, title=None):
    """Add a chain of messages; returns their ids."""
    ids = []
    for content in contents:
        message = StoredMessage(
            id=new_id(), conversation_id=conversation, parent_id=parent, content=content, status="stop",
            role="assistant" if ids else "user",
        )  # fmt: skip
        store.add(user, conversation, [message], title)
        title, parent = None, message.id
        ids.append(message.id)
    return ids


def test_the_branch_that_was_continued_last_is_shown(store):
    store, user = store
    root, first = grow(store, user, "c", "question", "first answer", title="t")
    (second,) = grow(store, user, "c", "second answer", parent=root)
    (deeper,) = grow(store, user, "c", "more", parent=first)
    found = store.load(user, "c")
    assert [message.content for message in found.messages] == ["question", "first answer", "more"]
    assert found.siblings[root] == [first, second]
    found = store.select(user, second)
    assert [message.content for message in found.messages] == ["question", "second answer"]
    assert store.select(user, first).messages[-1].id == deeper
    assert [message.id for message in store.history(user, second)] == [root, second]


def test_answers_that_were_made_side_by_side_are_shown_so_until_one_goes_on(store):
    store, user = store
    (root,) = grow(store, user, "c", "question", title="t")
    pair = [
        StoredMessage(id=name, conversation_id="c", parent_id=root, role="assistant", status="stop", group_id="g")
        for name in ("left", "right")
    ]
    found = store.add(user, "c", pair)
    assert [each.id for each in (found.messages[-1], *found.compared)] == ["left", "right"]
    found = store.select(user, "right")
    assert [each.id for each in (found.messages[-1], *found.compared)] == ["right", "left"]
    grow(store, user, "c", "more", parent="right")
    assert store.load(user, "c").compared == []


def test_the_list_comes_in_parts_the_last_changed_first(store, clock, monkeypatch):
    monkeypatch.setattr(module, "PAGE_SIZE", 3)
    store, user = store
    for number in range(8):
        clock.seconds += number % 2  # two of them at the same time
        grow(store, user, f"c{number}", f"text {number}", title=f"title {number}")
    seen, cursor = [], None
    while True:
        rows, cursor = store.page(user, "", cursor)
        seen += [row["id"] for row in rows]
        if cursor is None:
            break
    assert seen == [f"c{number}" for number in reversed(range(8))]


def test_search_finds_titles_messages_and_thinking_and_takes_wildcards_as_they_are(store):
    store, user = store
    grow(store, user, "a", "the Eiffel tower", title="Paris")
    grow(store, user, "b", "100% sure", title="numbers")
    grow(store, user, "c", "nothing", title="none")

    def found(text):
        return {row["id"] for row in store.page(user, text)[0]}

    assert (found("EIFFEL"), found("paris"), found("0%"), found("%"), found("_")) == (
        {"a"}, {"a"}, {"b"}, {"b"}, set()
    )  # fmt: skip


def test_what_is_deleted_is_gone(store):
    store, user = store
    ids = grow(store, user, "c", "question", "answer", title="t")
    token = store.share(user, "c")
    assert store.delete(user, "c") == []
    for call in (
        lambda: store.load(user, "c"), lambda: store.message(user, ids[0]), lambda: store.shared(token),
        lambda: store.delete(user, "c"), lambda: store.rename(user, "c", "x"),
    ):  # fmt: skip
        with pytest.raises(NotFound):
            call()


def test_titles_are_the_first_line():
    assert title_of("\n  Hello  \nworld", ()) == "Hello"
    assert title_of("x" * 100, ()) == "x" * 57 + "..."
    assert title_of("  ", (module.File(name="a.txt", text=""),)) == "a.txt"


def test_an_edited_question_is_a_new_branch(ada):
    _, browser = ada
    first = browser.send("What is 1 + 1?")
    browser.read(first["answers"][0]["id"])
    second = browser.send("What is 2 + 2?", conversation=first["conversation"]["id"], parent=None)
    browser.read(second["answers"][0]["id"])
    assert second["user"]["siblings"] == [first["user"]["id"], second["user"]["id"]]
    found = browser.call("GET", place_of(first))
    assert texts(found)[0] == "What is 2 + 2?"
    found = browser.call("POST", f"/page/messages/{first['user']['id']}/select")
    assert texts(found)[0] == "What is 1 + 1?"


def test_the_history_of_a_branch_is_the_prompt(page):
    prompts = []

    def answer(prompt, index):
        prompts.append(prompt)
        return "Thought.</think>Answer." if not prompt.endswith("</think>") else "Answer."

    browser = Browser(page(answer), "ada")
    first = browser.send("one", files=[{"name": "a.txt", "text": "inside"}])
    browser.read(first["answers"][0]["id"])
    browser.ask("two", conversation=first["conversation"]["id"], parent=first["answers"][0]["id"])
    assert "[file name]: a.txt\n[file content begin]\ninside\n[file content end]\none" in prompts[0]
    assert prompts[-1].startswith(prompts[0].removesuffix("<think>")) and "Thought." not in prompts[-1]
    assert "Answer." in prompts[-1] and "two" in prompts[-1]


def test_an_edited_question_keeps_its_files(page):
    prompts = []
    browser = Browser(page(lambda prompt, index: prompts.append(prompt) or "Read."), "ada")
    first = browser.send("one", files=[{"name": "a.txt", "text": "inside"}], thinking=False)
    browser.read(first["answers"][0]["id"])
    edited = browser.send(
        "two", conversation=first["conversation"]["id"], files_of=first["user"]["id"], thinking=False
    )  # fmt: skip
    assert edited["user"]["files"] == first["user"]["files"] == [{"name": "a.txt", "chars": 6}]
    browser.read(edited["answers"][0]["id"])
    assert "[file content begin]\ninside\n[file content end]\ntwo" in prompts[-1]


def test_an_edited_thought_is_where_a_new_answer_begins(page):
    prompts = []

    def answer(prompt, index):
        prompts.append(prompt)
        return " so.</think>Five." if prompt.endswith("2 + 3 =") else "2 + 2</think>Four."

    browser = Browser(page(answer), "ada")
    sent = browser.send("?")
    old = browser.read(sent["answers"][0]["id"]).message
    new = browser.call("POST", f"/page/messages/{old['id']}/continue", {"reasoning": "2 + 3 ="})["answers"][0]
    assert new["siblings"] == [old["id"], new["id"]]
    browser.read(new["id"])
    assert prompts[-1].endswith("<think>2 + 3 =")
    source = browser.call("GET", f"/page/messages/{new['id']}/source")
    assert (source["reasoning"].split(), source["content"]) == (["2", "+", "3", "=", "so."], "Five.")
    assert browser.error("POST", f"/page/messages/{old['id']}/continue", {"reasoning": " "})[:2] == (400, "invalid")


def test_an_answer_that_was_cut_off_goes_on(page):
    def answer(prompt, index):
        return " and three." if prompt.endswith("one, two") else "one, two"

    server = page(answer)
    browser = Browser(server, "ada")
    sent = browser.send("?", thinking=False)
    id_ = sent["answers"][0]["id"]
    assert browser.read(id_).message["status"] == "stop"
    new = browser.call("POST", f"/page/messages/{id_}/continue", {"reasoning": None})["answers"][0]
    browser.read(new["id"])
    assert browser.call("GET", f"/page/messages/{new['id']}/source")["content"] == "one, two and three."


def test_two_models_answer_side_by_side(ada):
    _, browser = ada
    sent = browser.send("?", models=["scripted", "deepseek-chat"])
    left, right = (browser.read(answer["id"]).message for answer in sent["answers"])
    assert (left["model"], right["model"]) == ("scripted", "deepseek-chat")
    found = browser.call("GET", place_of(sent))
    assert [found["messages"][-1]["id"], found["compared"][0]["id"]] == [left["id"], right["id"]]
    found = browser.call("POST", f"/page/messages/{right['id']}/select")
    assert found["messages"][-1]["id"] == right["id"]


def test_a_share_link_shows_what_was_there_and_can_be_taken_back(ada):
    server, browser = ada
    sent = browser.send("the question")
    browser.read(sent["answers"][0]["id"])
    url = server.url + browser.call("POST", place_of(sent) + "/share")["url"]
    browser.ask("later", conversation=sent["conversation"]["id"], parent=sent["answers"][0]["id"])
    reply = httpx.get(url)
    assert (reply.status_code, reply.headers["x-robots-tag"]) == (200, "noindex")
    assert "the question" in reply.text and "<strong>Paris</strong>" in reply.text and "later" not in reply.text
    assert "<script" not in reply.text
    assert browser.call("GET", place_of(sent))["share"] == url.removeprefix(server.url)
    browser.call("DELETE", place_of(sent) + "/share")
    assert httpx.get(url).status_code == 404
    assert httpx.get(server.url + "/s/guess").status_code == 404
    assert server.url + browser.call("POST", place_of(sent) + "/share")["url"] != url


def test_export_then_import_gives_the_same_file(ada):
    _, browser = ada
    sent = browser.send("one", files=[{"name": "a.txt", "text": "inside \U0001f642"}], models=["scripted"] * 2)
    for answer in sent["answers"]:
        browser.read(answer["id"])
    parent = sent["answers"][1]["id"]
    browser.ask("two", conversation=sent["conversation"]["id"], parent=parent)
    browser.call("POST", f"/page/messages/{sent['answers'][0]['id']}/select")
    exported = browser.call("GET", place_of(sent) + "/export?format=json")
    new = browser.call("POST", "/page/import", exported)["id"]
    assert browser.call("GET", f"/page/conversations/{new}/export?format=json") == exported
    assert len(exported["messages"]) == 5
    found = browser.call("GET", f"/page/conversations/{new}")
    assert texts(found) == texts(browser.call("GET", place_of(sent)))
    assert len(found["compared"]) == 1
    for format, mark in (("markdown", f"{CONTENT}"), ("html", "<strong>Paris</strong>")):
        reply = browser.request("GET", place_of(sent) + f"/export?format={format}")
        assert mark in reply.text
        assert reply.headers["content-disposition"].startswith('attachment; filename="one.')


def change(tree, path, value):
    *path, last = path
    for key in path:
        tree = tree[key]
    tree[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["format"], "chatgpt"), (["version"], 2), (["title"], ""), (["title"], 5), (["title"], "x" * 201),
        (["leaf"], 7), (["leaf"], -1), (["messages"], {}), (["messages", 0, "id"], 1), (["messages", 1, "parent"], 1),
        (["messages", 1, "parent"], None), (["messages", 0, "role"], "system"), (["messages", 0, "content"], None),
        (["messages", 0, "status"], "stop"), (["messages", 1, "status"], "running"), (["messages", 1, "stats"], []),
        (["messages", 1, "stats", "seconds"], -1), (["messages", 0, "files"], [{"name": "a"}]), (["extra"], 1),
        (["messages", 1, "stats", "cost_pico"], 2**63), (["messages", 0, "content"], "\ud800"),
    ],
)  # fmt: skip
def test_an_import_of_nonsense_is_refused_and_nothing_is_left(ada, path, value):
    _, browser = ada
    sent = browser.send("one")
    browser.read(sent["answers"][0]["id"])
    exported = browser.call("GET", place_of(sent) + "/export?format=json")
    change(exported, path, value)
    status, code, message = browser.error("POST", "/page/import", exported)
    assert (status in (400, 422), code) == (True, "invalid"), message
    assert len(browser.call("GET", "/page/conversations")["conversations"]) == 1


def test_the_51st_thinking_message_of_a_day_is_refused_and_the_draft_costs_nothing(page):
    server = page(limits=Limits())
    browser = Browser(server, "ada")
    today = int(server.server.accounts.clock()) // 86_400
    with server.server.accounts.database.write() as connection:
        connection.exec_driver_sql(f"UPDATE users SET deep_think_day = {today}, deep_think_used = 48")
    for _ in range(2):
        browser.send("?")
    found = browser.call("GET", "/page/me")["deep_think"]
    assert (found["limit"], found["used"], found["resets_ms"] % 86_400_000) == (50, 50, 0)
    body = {"text": "?", "models": ["scripted"], "thinking": True}
    assert browser.error("POST", "/page/send", body)[:2] == (429, "rate_limited")
    assert len(browser.call("GET", "/page/conversations?before=")["conversations"]) == 2
    browser.send("?", thinking=False)


def test_prices_are_shown_and_a_balance_that_is_used_up_refuses(page, tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text('currency = "USD"\n[[models.scripted]]\ninput_hit = 1\ninput_miss = 2\noutput = 3\n')
    server = page(prices=PriceTable.read(path))
    accounts = server.server.accounts
    browser = Browser(server, "ada")
    body = {"text": "?", "models": ["scripted"], "thinking": False}
    assert browser.error("POST", "/page/send", body)[:2] == (402, "balance")
    accounts.deposit(accounts.user_id("ada"), 10**12)
    message = browser.ask("?")
    assert float(message["cost"]) > 0
    found = browser.call("GET", "/page/me")
    assert (found["currency"], float(found["balance"]) + float(message["cost"])) == ("USD", pytest.approx(1.0))
    (day,) = browser.call("GET", "/page/usage")["days"]
    assert (day["requests"], day["cost"]) == (1, message["cost"])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"text": " "}, (400, "invalid")),
        ({"text": "?", "models": []}, (422, "invalid")),
        ({"text": "?", "models": ["a", "b", "c"]}, (422, "invalid")),
        ({"text": "?", "models": ["unknown"]}, (400, "invalid")),
        ({"text": "?\0"}, (422, "invalid")),
        ({"text": "?", "files": [{"name": "a.bin", "text": "\0"}]}, (422, "invalid")),
        ({"text": "x" * 4_000_001}, (413, "too_large")),
        ({"text": "word " * 9000}, (400, "invalid")),
        ({"text": "?", "parent": "nothing"}, (404, "not_found")),
        ({"text": "?", "conversation": "nothing"}, (404, "not_found")),
        ({"text": "?", "thinking": "yes"}, (422, "invalid")),
        ({"text": "?", "temperature": 2}, (422, "invalid")),
    ],
)
def test_a_bad_message_is_refused_and_nothing_is_left(ada, body, expected):
    server, browser = ada
    body = {"models": ["scripted"], "thinking": False} | body
    assert browser.error("POST", "/page/send", body)[:2] == expected
    assert browser.call("GET", "/page/conversations")["conversations"] == []
    assert server.server.models.members["default"].service.status.running == 0


def test_a_message_waits_for_the_answer_before_it(page):
    server = page()
    pace = Pace(server, 0.01)
    browser = Browser(server, "ada")
    sent = browser.send("?")
    id_ = sent["answers"][0]["id"]
    body = {"conversation": sent["conversation"]["id"], "text": "?", "models": ["scripted"], "thinking": False}
    assert browser.error("POST", "/page/send", body | {"parent": id_})[:2] == (409, "conflict")
    assert browser.error("POST", "/page/send", body | {"parent": sent["user"]["id"]})[:2] == (409, "conflict")
    assert browser.error("POST", f"/page/messages/{id_}/continue", {})[:2] == (409, "conflict")
    pace.seconds = 0.0
    browser.read(id_)
    browser.call("POST", "/page/send", body | {"parent": id_})


def test_keys_are_made_shown_once_and_revoked(ada):
    server, browser = ada
    key = browser.call("POST", "/page/keys", {"name": "laptop", "expires_days": 30})["key"]
    rows = {row["name"]: row for row in browser.call("GET", "/page/keys")["keys"]}
    assert set(rows) == {"test", "laptop"} and rows["laptop"]["is_active"]
    models = {"Authorization": f"Bearer {key}"}
    assert httpx.get(f"{server.url}/models", headers=models).status_code == 200
    browser.call("DELETE", f"/page/keys/{rows['laptop']['id']}")
    assert httpx.get(f"{server.url}/models", headers=models).status_code == 401
    assert browser.error("POST", "/page/keys", {"name": "page"})[:2] == (400, "invalid")
    assert browser.error("POST", "/page/keys", {"name": "x", "expires_days": 0})[:2] == (422, "invalid")


def test_a_database_that_is_locked_is_a_503_and_nothing_is_left(page):
    server = page(database_timeout=0.1, settings=ServerSettings())
    browser = Browser(server, "ada")
    with server.server.accounts.database.engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")  # begins with the lock
        body = {"text": "?", "models": ["scripted"], "thinking": False}
        assert browser.error("POST", "/page/send", body)[:2] == (503, "overloaded")
        connection.rollback()
    assert browser.call("GET", "/page/conversations")["conversations"] == []
    assert browser.ask("?")["status"] == "stop"


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, kind, text in cases() if kind == "import"])
def test_a_hostile_import_is_refused_or_harmless(ada, text):
    _, browser = ada
    headers = {"X-CSRF-Token": browser.csrf, "Content-Type": "application/json"}
    reply = browser.http.post("/page/import", content=text.encode(errors="surrogatepass"), headers=headers)
    assert reply.status_code in (200, 400, 422), reply.text
    for row in browser.call("GET", "/page/conversations")["conversations"]:
        browser.call("GET", f"/page/conversations/{row['id']}")
        for format in ("json", "markdown", "html"):
            found = browser.request("GET", f"/page/conversations/{row['id']}/export?format={format}")
            assert found.status_code == 200 and "\n" not in found.headers["content-disposition"]
