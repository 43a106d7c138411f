"""Users and keys: who may do what."""

import hashlib
import re

import pytest
from sqlalchemy import select

from tests.server.billing import PRICES, add_customer
from thinkstack.server.accounts import Accounts
from thinkstack.server.database import keys, users
from thinkstack.server.errors import AuthenticationError, PermissionDenied
from thinkstack.server.keys import parse_expiry
from thinkstack.server.limits import Limits
from thinkstack.server.prices import PriceTable
from thinkstack.types import ConfigError


def test_a_key_is_stored_as_its_hash_alone(open_accounts):
    accounts = open_accounts()
    key = accounts.add_key(accounts.add_user("ann"))
    assert re.fullmatch(r"sk-[0-9a-f]{48}", key)  # 192 bits, 160 of them not in the prefix
    with accounts.database.read() as connection:
        row = connection.execute(select(keys)).mappings().one()
    assert row["hash"] == hashlib.sha256(key.encode()).hexdigest() and row["prefix"] == key[:11]
    assert key not in str(dict(row))


def test_a_key_names_its_user_scopes_models_and_limits(open_accounts):
    accounts = open_accounts(limits=Limits(requests_per_minute=7))
    user_id = accounts.add_user("ann", is_admin=True)
    accounts.change_user(user_id, concurrency=3)
    key = accounts.add_key(user_id, "ci", ("chat", "admin"), ("deepseek-chat",), limits={"tokens_per_minute": 5})
    found = accounts.authenticate(key)
    assert (found.user_id, found.user_name, found.is_admin) == (user_id, "ann", True)
    assert (found.limits.requests_per_minute, found.limits.concurrency) == (7, 3)
    assert (found.key_limits.tokens_per_minute, found.key_limits.concurrency) == (5, 0)
    found.check_scope("admin")
    found.check_model("deepseek-chat")
    with pytest.raises(PermissionDenied, match="deepseek-reasoner"):
        found.check_model("deepseek-reasoner")


@pytest.mark.parametrize("key", ["", "sk-", "sk-" + "0" * 48, "\0", "sk-\ud800", "' OR 1=1 --", "x" * 100_000])
def test_an_unknown_key_is_refused(open_accounts, key):
    accounts = open_accounts()
    add_customer(accounts)
    with pytest.raises(AuthenticationError, match="is unknown") as refused:
        accounts.authenticate(key)
    assert not key or len(key) < 5 or key not in str(refused.value)


def test_a_key_ends_when_it_expires_or_is_revoked_or_its_user_is_disabled(open_accounts, clock):
    accounts = open_accounts()
    user_id = accounts.add_user("ann")
    short, long = accounts.add_key(user_id, expires_seconds=parse_expiry("1h")), accounts.add_key(user_id)
    clock.seconds += 3599.9
    accounts.authenticate(short)
    clock.seconds += 0.1
    with pytest.raises(AuthenticationError, match="has expired"):
        accounts.authenticate(short)
    accounts.change_user(user_id, disabled=True)
    with pytest.raises(AuthenticationError, match="is disabled"):
        accounts.authenticate(long)
    accounts.change_user(user_id, disabled=False)
    assert accounts.revoke_key(long[:11]) == long[:11]
    with pytest.raises(AuthenticationError, match="is revoked"):
        accounts.authenticate(long)


def test_the_last_use_of_a_key_is_written_once_a_minute(open_accounts, clock):
    accounts = open_accounts()
    key = accounts.add_key(accounts.add_user("ann"))
    start, found = clock.seconds, []
    for seconds in (0, 59, 60, 61):
        clock.seconds = start + seconds
        accounts.authenticate(key)
        found.append(accounts.list_keys()[0]["last_used_ms"] / 1000 - start)
    assert found == [0, 0, 60, 60]


def test_the_scope_admin_needs_an_administrator(open_accounts):
    accounts = open_accounts()
    user_id = accounts.add_user("ann")
    with pytest.raises(ConfigError, match="for administrators"):
        accounts.add_key(user_id, scopes=("admin",))
    accounts.change_user(user_id, is_admin=True)
    principal = accounts.authenticate(key := accounts.add_key(user_id, scopes=("chat", "admin")))
    principal.check_scope("admin")
    accounts.change_user(user_id, is_admin=False)
    with pytest.raises(PermissionDenied, match="no scope 'admin'"):
        accounts.authenticate(key).check_scope("admin")
    with pytest.raises(ConfigError, match="did you mean chat"):
        accounts.add_key(user_id, scopes=("chatt",))


def test_a_key_is_revoked_by_a_prefix_of_its_own(open_accounts):
    accounts = open_accounts()
    user_id = accounts.add_user("ann")
    first, second = accounts.add_key(user_id), accounts.add_key(user_id)
    for prefix, message in (("sk-", "2 keys begin with it"), ("sk-zz", "no key begins"), ("", "cannot revoke")):
        with pytest.raises(ConfigError, match=message):
            accounts.revoke_key(prefix)
    accounts.revoke_key(first)  # all of it is fine, too
    assert accounts.authenticate(second)


def test_a_password_is_an_argon2_hash(open_accounts):
    accounts = open_accounts()
    user_id = accounts.add_user("ann")
    wrong = [("ann", "secret"), ("bob", "secret")]
    accounts.set_password(user_id, "secrét 1")
    with accounts.database.read() as connection:
        assert connection.scalar(select(users.c.password_hash)).startswith("$argon2id$")
    assert accounts.check_password("ann", "secrét 1") == user_id
    accounts.change_user(user_id, disabled=True)
    for name, password in (*wrong, ("ann", "secrét 1")):
        with pytest.raises(AuthenticationError, match="wrong user name or password"):
            accounts.check_password(name, password)


@pytest.mark.parametrize("name", ["", " ", "-x", "a b", "ann\n", "é", "a" * 65])
def test_a_malformed_name_is_refused(open_accounts, name):
    with pytest.raises(ConfigError, match="cannot name a user"):
        open_accounts().add_user(name)


def test_a_name_is_given_once_and_found_again(open_accounts):
    accounts = open_accounts()
    user_id = accounts.add_user("ann")
    with pytest.raises(ConfigError, match="exists already"):
        accounts.add_user("ann")
    assert open_accounts().user_id("ann") == user_id
    with pytest.raises(ConfigError, match="did you mean ann"):
        accounts.user_id("anne")


def test_no_row_of_a_list_holds_a_secret(open_accounts):
    accounts = open_accounts()
    add_customer(accounts)
    assert "password_hash" not in accounts.list_users()[0] and "hash" not in accounts.list_keys()[0]


@pytest.mark.parametrize("text", ["", "90", "0d", "-1d", "1y", "1.5h", "123456d"])
def test_a_duration_that_cannot_be_read_is_refused(text):
    with pytest.raises(ConfigError, match="12h, 90d or 4w"):
        parse_expiry(text)
    assert parse_expiry("90d") == 90 * 86_400


def test_the_amounts_of_a_database_have_one_currency(open_accounts):
    assert open_accounts().currency is None
    assert open_accounts(PRICES).currency == "USD"
    assert open_accounts().currency == "USD"
    yuan = PriceTable({"currency": "CNY", "models": {"m": [{"input_hit": 1, "input_miss": 1, "output": 1}]}})
    with pytest.raises(ConfigError, match=r"in CNY and the balances of .* in USD"):
        open_accounts(yuan)


def test_accounts_are_shared_by_processes(open_accounts):
    one, other = open_accounts(), open_accounts()
    assert isinstance(other, Accounts) and one.process_id != other.process_id
    key = one.add_key(one.add_user("ann"))
    assert other.authenticate(key).user_name == "ann"
