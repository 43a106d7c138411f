"""The commands `accounts`, `keys` and `usage`."""

import sys

import pytest

from tests.server.billing import PRICES, ask, end
from thinkstack import cli
from thinkstack.server.accounts import Accounts
from thinkstack.server.database import Database, sqlite_url


@pytest.fixture
def thinkstack(monkeypatch, capsys, tmp_path):
    """Run a command on the database of the test and return what it prints."""

    def run(line):
        monkeypatch.setattr("sys.argv", ["thinkstack", *line.split(), "--data", str(tmp_path)])
        cli.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def accounts(tmp_path):
    database = Database(sqlite_url(tmp_path))
    yield Accounts(database, PRICES)
    database.close()


def cells(shown):
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in shown.splitlines()]


def test_a_user_is_added_listed_changed_and_disabled(thinkstack, accounts):
    assert "thinkstack keys new ann" in thinkstack("accounts add ann --admin --grant 5.00 --limit concurrency=2")
    thinkstack("accounts add bob")
    assert cells(thinkstack("accounts list"))[1:] == [
        ["ann", "admin", "5.00", "0.00", "0.00", "concurrency=2"],
        ["bob", "0.00", "0.00", "0.00"],
    ]
    assert thinkstack("accounts change ann --top-up 2.5 --limit concurrency=0") == "ann: balance 7.50\n"
    thinkstack("accounts disable ann")
    assert cells(thinkstack("accounts list"))[1] == ["ann", "admin disabled", "5.00", "2.50", "0.00", "concurrency=0"]
    thinkstack("accounts change ann --disabled False")
    assert cells(thinkstack("accounts list"))[1][1] == "admin"


def test_a_folder_without_accounts_is_named_and_not_made(monkeypatch, capsys, tmp_path):
    """`usage --data FOLDER` made an empty database in a mistyped folder and showed an empty table."""
    folder = tmp_path / "mistyped"
    for words in ("usage", "accounts list", "accounts change ann", "keys new ann", "keys list", "keys revoke sk-1"):
        monkeypatch.setattr("sys.argv", ["thinkstack", *words.split(), "--data", str(folder)])
        with pytest.raises(SystemExit) as raised:
            cli.main()
        assert raised.value.code == 2
        assert f"{folder} has no accounts; the first start of `thinkstack serve`" in capsys.readouterr().err
    assert not folder.exists()


def test_a_key_is_shown_once_listed_and_revoked(thinkstack, accounts):
    thinkstack("accounts add ann")
    key = thinkstack(
        "keys new ann --name laptop --expires 90d --model deepseek-chat --limit tokens_per_minute=7"
    ).strip()
    principal = accounts.authenticate(key)
    assert (principal.models, principal.key_limits.tokens_per_minute) == (("deepseek-chat",), 7)
    shown = thinkstack("keys list")
    assert key not in shown
    assert cells(shown)[1][:5] == [key[:11], "ann", "laptop", "chat", "deepseek-chat"]
    assert thinkstack(f"keys revoke {key[:11]}") == f"revoked {key[:11]}\n"
    assert cells(thinkstack("keys list"))[1][6] != "-"


def test_usage_is_shown_by_day_model_key_and_user(thinkstack, accounts):
    thinkstack("accounts add ann --grant 1")
    key = thinkstack("keys new ann").strip()
    ann = accounts.authenticate(key)
    accounts.reserve(ann, ask("a", 2000, 2000))
    accounts.settle([end("a", hit=1024, miss=976, completion=1500, reasoning=1000)])
    figures = ["1", "1,024", "976", "1,500", "1,000", "0.0019852"]  # 1024 * 0.07 + 976 * 0.27 + 1500 * 1.10 = 1985.2
    for by, name in (("model", "deepseek-chat"), ("key", key[:11]), ("user", "ann")):
        assert cells(thinkstack(f"usage --by {by}"))[1:] == [[name, *figures]]
    heads, row = cells(thinkstack("usage --user ann --since 2000-01-01"))
    assert heads[-1] == "cost [USD]" and row[1:] == figures
    assert cells(thinkstack("usage --since 2999-01-01"))[1:] == []


RUDE = {
    "accounts": "expected one of {add, list",
    "accounts ad ann": "did you mean add?",
    "accounts add": "NAME",
    "accounts add a/b": "cannot name a user 'a/b'",
    "accounts add ann --grant five": "write it as 5.00",
    "accounts add ann --limit requests_per_minut=5": "did you mean requests_per_minute?",
    "accounts add ann --limit concurrency=-1": "write concurrency=60",
    "accounts disable bob": "no user 'bob'",
    "accounts list --database mysql://x/y": "known: sqlite, postgresql+psycopg",
    "keys new bob": "no user 'bob'",
    "keys new bob --expires soon": "12h, 90d or 4w",
    "keys revoke sk-0": "no key begins with it",
    "keys list --databse x": "did you mean --database?",
    "usage --by week": "'week'",
    "usage --since yesterday": "write it as 2026-11-30",
}


@pytest.mark.parametrize(("line", "message"), RUDE.items(), ids=RUDE)
def test_a_mistake_ends_in_one_line_with_the_way_out(monkeypatch, capsys, tmp_path, line, message):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    (tmp_path / "thinkstack").mkdir()
    Database(sqlite_url(tmp_path / "thinkstack")).close()
    monkeypatch.setattr("sys.argv", ["thinkstack", *line.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and shown.count("\n") == 1 and message.casefold() in shown.casefold(), shown


def test_two_databases_are_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["thinkstack", "usage", "--data", str(tmp_path), "--database", "sqlite:///x"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "leave one of them out" in capsys.readouterr().err


def test_the_default_database_is_in_the_data_folder(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["thinkstack", "accounts", "add", "ann"])
    cli.main()
    assert (tmp_path / "thinkstack" / "accounts.sqlite3").stat().st_size > 0


@pytest.mark.parametrize(("group", "word"), [(group, word) for group in cli.GROUPS for word in cli.GROUPS[group][1]])
def test_every_option_is_named_for_what_it_takes(monkeypatch, capsys, group, word):
    monkeypatch.setattr("sys.argv", ["thinkstack", group, word, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert not {"STR", "INT", "FLOAT", "PATH"} & set(shown.replace("|", " ").split())
    assert "Args:" not in shown


def test_an_unavailable_database_ends_in_one_line(monkeypatch, capsys):
    pytest.importorskip("psycopg")
    url = "postgresql+psycopg://ann:secret@127.0.0.1:1/name"
    monkeypatch.setattr("sys.argv", ["thinkstack", "usage", "--database", url])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr().err
    assert ended.value.code == 1 and shown.count("\n") == 1 and "secret" not in shown
    assert "sqlalchemy" in sys.modules  # only commands on a database import it
