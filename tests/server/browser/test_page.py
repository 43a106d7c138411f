"""What users do on the page."""

import json

import pytest

from tests.server.browser.conftest import CONTENT, THOUGHT, ask, body_of, thought, wait_done
from tests.server.page.client import PASSWORD
from tests.server.requests import ledger_rows, until
from thinkstack.server.limits import Limits
from thinkstack.server.settings import ServerSettings

pytestmark = pytest.mark.page
WHOLE = "The sum is"


def squeezed(text):
    return " ".join(text.split())


def test_sign_up_think_and_answer(start, browse):
    server = start(settings=ServerSettings(sign_up="open"), seconds=0.002)
    tab = browse(server, sign_in=False)
    tab.locator("#sign-in-switch").click()
    tab.get_by_label("User name").fill("bob")
    tab.get_by_label("Password").fill("long enough")
    tab.locator("#sign-in-submit").click()
    ask(tab, "What is 1 + 2?")
    wait_done(tab, "thinking")
    wait_done(tab)
    assert squeezed(thought(tab)) == squeezed(THOUGHT)
    message = tab.locator(".message.assistant")
    assert message.locator("math").count() == 1
    assert message.locator("strong").inner_text() == "sum"
    assert "$5 and $10" in body_of(tab)
    assert "tokens/s" in message.locator(".figures").inner_text()
    assert tab.locator(".message.user").inner_text().strip().endswith("What is 1 + 2?")


def test_the_thinking_is_counted_whole_when_the_answer_begins(start, browse):
    """The label showed what had been thought at the last progress event, up to a second before the end."""
    server = start(
        answer=lambda prompt, index: f"{'I think. ' * 60}</think>{'Word. ' * 400}", no_keys=True, seconds=0.003
    )
    tab = browse(server)
    ask(tab, "?")
    wait_done(tab, "answering")
    label = tab.locator(".thinking-label")
    tokens = label.inner_text().rpartition(", ")[2]
    server.pace.seconds = 0.0
    wait_done(tab)
    assert label.inner_text().rpartition(", ")[2] == tokens != "0 tokens"


def test_the_thinking_is_in_the_document_only_while_open(start, browse):
    tab = browse(start(no_keys=True))
    ask(tab, "?")
    wait_done(tab)
    assert tab.locator(".thinking-text").count() == 0
    thought(tab)
    tab.locator(".thinking-toggle").click()
    assert tab.locator(".thinking-text").count() == 0
    assert "I look at" not in tab.content()


def test_stop_ends_the_answer_at_the_engine(start, browse):
    server = start(answer=lambda prompt, index: "On and on. " * 600, seconds=0.005)
    tab = browse(server)
    ask(tab, "?")
    wait_done(tab, "thinking")
    tab.locator("#stop").click()
    wait_done(tab, "stopped")
    until(lambda: server.server.models.members["default"].service.status.running == 0)
    until(lambda: ledger_rows(server))
    assert 0 < ledger_rows(server)[0]["completion_tokens"] < 1000


def test_answer_now_closes_the_thinking(start, browse):
    text = "I think. " * 900 + "</think>Late."
    tab = browse(start(answer=lambda prompt, index: text, seconds=0.004))
    ask(tab, "?")
    wait_done(tab, "thinking")
    tab.locator("#answer-now").click()
    wait_done(tab, "answering")
    assert tab.locator("#answer-now").is_hidden()
    tab.locator("#stop").click()
    wait_done(tab, "stopped")


def test_a_reload_in_mid_thought_loses_and_doubles_nothing(start, browse):
    server = start(no_keys=True, seconds=0.02)
    tab = browse(server)
    ask(tab, "?")
    wait_done(tab, "thinking")
    for _ in range(3):
        tab.wait_for_timeout(300)
        tab.reload()
        wait_done(tab, "thinking")
    seen = thought(tab)
    assert squeezed(THOUGHT).startswith(squeezed(seen)[:200])
    server.pace.seconds = 0.0
    wait_done(tab)
    assert squeezed(tab.locator(".thinking-text").inner_text()) == squeezed(THOUGHT)
    assert body_of(tab).count(WHOLE) == 1
    assert len(ledger_rows(server)) == 1


def test_a_network_that_is_cut_for_ten_seconds_loses_and_doubles_nothing(start, browse):
    server = start(no_keys=True, seconds=0.03)
    tab = browse(server)
    ask(tab, "?")
    wait_done(tab, "thinking")
    thought(tab)
    tab.context.set_offline(True)
    tab.wait_for_timeout(10_000)
    tab.context.set_offline(False)
    server.pace.seconds = 0.0
    wait_done(tab)
    assert squeezed(tab.locator(".thinking-text").inner_text()) == squeezed(THOUGHT)
    assert body_of(tab).count(WHOLE) == 1


def test_an_edited_question_is_a_branch(start, browse):
    tab = browse(start(no_keys=True))
    ask(tab, "first question")
    wait_done(tab)
    message = tab.locator(".message.user")
    message.hover()
    message.locator("[data-action=edit]").click()
    tab.get_by_role("textbox", name="Edit the message").fill("second question")
    tab.get_by_role("button", name="Send", exact=True).first.click()
    tab.locator(".message.user").get_by_text("second question").wait_for()
    wait_done(tab)
    count = tab.locator(".message.user .branch-count")
    assert count.inner_text() == "2/2"
    tab.locator(".message.user [data-action=previous]").click()
    tab.locator(".message.user").get_by_text("first question").wait_for()
    assert tab.locator(".message.user .branch-count").inner_text() == "1/2"


def test_an_edited_thought_is_where_a_new_answer_begins(start, browse):
    def answer(prompt, index):
        return " so.</think>Five." if prompt.endswith("2 + 3 =") else "2 + 2</think>Four."

    tab = browse(start(answer=answer, no_keys=True))
    ask(tab, "?")
    wait_done(tab)
    message = tab.locator(".message.assistant")
    message.hover()
    message.locator("[data-action=edit-thinking]").click()
    tab.get_by_role("textbox", name="Edit the thinking").fill("2 + 3 =")
    tab.get_by_role("button", name="Go on from here").click()
    tab.locator(".answer-body").get_by_text("Five.").wait_for()
    wait_done(tab)
    assert squeezed(thought(tab)) == "2 + 3 = so."
    assert tab.locator(".message.assistant .branch-count").inner_text() == "2/2"


def test_two_models_answer_side_by_side_and_one_goes_on(start, browse):
    server = start(no_keys=True)
    server.server.models.get("deepseek-chat").config.__dict__["on_page"] = True
    tab = browse(server)
    tab.locator("#compare").click()
    tab.locator("#second-model").select_option("deepseek-chat")
    ask(tab, "?")
    wait_done(tab)
    answers = tab.locator(".message.assistant")
    assert answers.count() == 2
    left, right = (answers.nth(place).bounding_box() for place in range(2))
    assert left["x"] + left["width"] <= right["x"] + 1 and abs(left["y"] - right["y"]) < 2
    answers.nth(1).locator("[data-action=choose]").click()
    tab.locator("#compare").click()
    ask(tab, "go on", thinking=False)
    wait_done(tab)
    assert tab.locator(".message.assistant").count() == 2
    assert tab.locator(".message.assistant .model-name").first.inner_text() == "deepseek-chat"


def test_a_link_is_shared_and_taken_back(start, browse):
    server = start()
    tab = browse(server)
    ask(tab, "a shared question")
    wait_done(tab)
    tab.locator("#menu-open").click()
    tab.get_by_role("menuitem", name="Share").or_(tab.get_by_role("button", name="Share", exact=True)).first.click()
    link = tab.get_by_role("textbox", name="Link")
    link.wait_for()
    url = link.input_value()
    reader = browse(server, sign_in=False, path=url.removeprefix(server.url))
    assert "a shared question" in reader.inner_text("main")
    assert reader.locator("math").count() == 1
    tab.get_by_role("button", name="Take back").click()
    tab.get_by_text("The link does not work any more.").wait_for()
    assert reader.goto(url).status == 404


def test_export_and_import_are_equal(start, browse, tmp_path):
    tab = browse(start(no_keys=True))
    ask(tab, "exported")
    wait_done(tab)

    def export():
        tab.locator("#menu-open").click()
        with tab.expect_download() as download:
            tab.get_by_text("Export as JSON").click()
        download.value.save_as(tmp_path / "export.json")
        return json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))

    first = export()
    tab.set_input_files("#import-file", tmp_path / "export.json")
    tab.locator("#conversations li").nth(1).wait_for()
    tab.locator(".message.assistant").get_by_text("That costs").wait_for()
    assert export() == first
    tab.set_input_files("#import-file", [{"name": "x.json", "mimeType": "text/json", "buffer": b"{nonsense"}])
    tab.get_by_text("x.json is not JSON").wait_for()


def test_the_51st_thinking_message_says_when_the_next_ones_come(start, browse):
    server = start(limits=Limits())
    accounts = server.server.accounts
    today = int(accounts.clock()) // 86_400
    with accounts.database.write() as connection:
        connection.exec_driver_sql(f"UPDATE users SET deep_think_day = {today}, deep_think_used = 49")
    tab = browse(server)
    tab.get_by_text("1 left").wait_for()
    ask(tab, "the fiftieth")
    wait_done(tab)
    tab.get_by_text("0 left, new ones at").wait_for()
    ask(tab, "one more", is_sent=False)
    error = tab.locator("#composer-error")
    error.get_by_text("limit").first.wait_for()
    assert tab.input_value("#composer-text") == "one more"
    ask(tab, "one more", thinking=False)
    wait_done(tab)


def test_two_tabs_show_one_conversation(start, browse):
    server = start(no_keys=True, seconds=0.01)
    first = browse(server)
    ask(first, "?")
    wait_done(first, "thinking")
    second = browse(
        server, context=first.context, path=f"/{first.url.partition('/#')[2] and '#' + first.url.partition('#')[2]}"
    )
    wait_done(second, "thinking")
    second.locator("#stop").click()
    wait_done(first, "stopped")
    wait_done(second, "stopped")


def test_a_conversation_that_is_deleted_in_another_tab(start, browse):
    server = start(no_keys=True)
    first = browse(server)
    ask(first, "?")
    wait_done(first)
    place = first.url.rpartition("/")[2]
    first.request.delete(f"{server.url}/page/conversations/{place}", headers={"X-CSRF-Token": "local"})
    first.fill("#composer-text", "the draft")
    first.press("#composer-text", "Enter")
    first.get_by_text("This conversation was deleted").wait_for()
    assert first.input_value("#composer-text") == "the draft"


def test_a_session_that_ends_keeps_the_draft(start, browse):
    server = start(seconds=0.01)
    tab = browse(server)
    ask(tab, "?")
    wait_done(tab, "thinking")
    with server.server.accounts.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM sessions")
    tab.fill("#composer-text", "my draft")
    tab.locator("#stop").click()
    tab.get_by_text("The session has ended").wait_for()
    tab.get_by_label("User name").fill("ada")
    tab.get_by_label("Password").fill(PASSWORD)
    tab.locator("#sign-in-submit").click()
    tab.locator("#messages .message.user").wait_for()
    assert tab.input_value("#composer-text") == "my draft"
    server.pace.seconds = 0.0
    wait_done(tab)
    assert body_of(tab).count(WHOLE) == 1


def test_a_server_that_is_gone_keeps_the_draft(start, browse):
    tab = browse(start(no_keys=True))
    tab.wait_for_selector("#composer-text")
    tab.context.set_offline(True)
    ask(tab, "my draft", is_sent=False)
    tab.locator("#composer-error").get_by_text("cannot be reached").wait_for()
    assert tab.input_value("#composer-text") == "my draft"
    tab.context.set_offline(False)
    tab.press("#composer-text", "Enter")
    wait_done(tab)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [("a.bin", b"\x00\x01", "a.bin is not a text file"), ("l.txt", b"\xff\xfe", "l.txt is not a text file"),
     ("big.txt", b"x" * 10_000_000, "big.txt is larger than 1 MB")],
)  # fmt: skip
def test_a_file_that_is_no_text_or_too_large_is_refused(start, browse, name, data, words):
    tab = browse(start(no_keys=True))
    tab.set_input_files("#attach-file", [{"name": name, "mimeType": "text/plain", "buffer": data}])
    tab.get_by_text(words).wait_for()
    assert tab.locator("#attachments li").count() == 0


def test_a_text_file_is_part_of_the_prompt(start, browse):
    prompts = []
    tab = browse(start(answer=lambda prompt, index: prompts.append(prompt) or "</think>Read.", no_keys=True))
    buffer = "inside 你好".encode()
    tab.set_input_files("#attach-file", [{"name": "a.txt", "mimeType": "text/plain", "buffer": buffer}])
    tab.locator("#attachments li").wait_for()
    ask(tab, "What does it say?")
    wait_done(tab)
    assert "[file name]: a.txt\n[file content begin]\ninside 你好\n[file content end]\nWhat does it say?" in prompts[0]
    assert tab.locator(".message.user .files").inner_text().startswith("a.txt")


def test_a_paste_of_a_megabyte_is_refused_with_numbers_and_stays_a_draft(start, browse):
    tab = browse(start(no_keys=True))
    tab.wait_for_selector("#composer-text")
    tab.evaluate(
        "text => { const box = document.querySelector('#composer-text'); box.focus();"
        " document.execCommand('insertText', false, text); }", "word " * 200_000,
    )  # fmt: skip
    tab.press("#composer-text", "Enter")
    error = tab.locator("#composer-error")
    error.get_by_text("tokens").first.wait_for(timeout=60_000)
    assert len(tab.input_value("#composer-text")) == 1_000_000


def test_without_scripts_there_is_a_sentence(start, chromium):
    server = start(no_keys=True)
    context = chromium.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(server.url)
    assert "needs JavaScript" in tab.inner_text("body")
    context.close()


def test_a_model_that_is_gone_is_replaced_by_the_default(start, browse):
    server = start(no_keys=True)
    tab = browse(server)
    tab.wait_for_selector("#composer-text")
    tab.evaluate("localStorage.setItem('thinkstack.model', 'gone')")
    tab.reload()
    ask(tab, "?")
    wait_done(tab)
    assert tab.locator(".model-name").inner_text() == "scripted"


def test_keys_are_made_and_usage_is_shown(start, browse):
    server = start()
    tab = browse(server)
    ask(tab, "?")
    wait_done(tab)
    tab.locator("#settings-open").click()
    dialog = tab.get_by_role("dialog")
    dialog.get_by_text("API keys").first.click()
    dialog.get_by_label("Name").fill("laptop")
    dialog.get_by_role("button", name="Make a key").click()
    dialog.get_by_text("It is shown only now").wait_for()
    assert [row["name"] for row in server.server.accounts.list_keys()] == ["test", "page", "laptop"]
    dialog.get_by_text("Usage").first.click()
    assert str(ledger_rows(server)[0]["completion_tokens"]) in dialog.locator("table").last.inner_text().replace(
        ",", ""
    )


def test_content_is_what_the_model_wrote(start, browse):
    tab = browse(start(no_keys=True), permissions=["clipboard-read", "clipboard-write"])
    ask(tab, "?")
    wait_done(tab)
    message = tab.locator(".message.assistant")
    message.hover()
    message.locator("[data-action=copy]").click()
    tab.wait_for_timeout(300)
    assert tab.evaluate("navigator.clipboard.readText()") == CONTENT
