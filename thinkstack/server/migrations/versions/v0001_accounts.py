"""Users, keys, reservations, and the append-only ledger and deposits."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

BigId = sa.BigInteger().with_variant(sa.Integer, "sqlite")
LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency", "deep_think_per_day")
USED = ("limits_ms", "requests_used", "tokens_used", "deep_think_day", "deep_think_used")
PRICES = ("hit_pico", "miss_pico", "output_pico")
TOKENS = ("prompt_cache_hit_tokens", "prompt_cache_miss_tokens", "completion_tokens", "reasoning_tokens")
APPEND_ONLY = {"ledger": "request_id", "deposits": "id"}
"""Tables and what identifies a row in them."""


def upgrade() -> None:
    """Create all tables."""
    create_accounts()
    create_requests()
    op.create_table(
        "deposits",
        sa.Column("id", BigId, primary_key=True),
        sa.Column("user_id", sa.BigInteger, sa.ForeignKey("users.id"), nullable=False),
        text("kind"),
        number("amount_pico"),
        number("created_ms"),
    )
    op.create_table("settings", sa.Column("name", sa.String, primary_key=True), text("value"))
    for table, key in APPEND_ONLY.items():
        forbid_changes(table, key)


def create_accounts() -> None:
    """Users, their keys, and the processes of the server."""
    op.create_table(
        "users",
        sa.Column("id", BigId, primary_key=True),
        sa.Column("name", sa.String, nullable=False, unique=True),
        sa.Column("password_hash", sa.String),
        sa.Column("is_admin", sa.Boolean, nullable=False),
        sa.Column("disabled", sa.Boolean, nullable=False, server_default=sa.text("false")),
        number("created_ms"),
        *(number(name, "0") for name in ("granted_pico", "topped_up_pico", "reserved_pico")),
        *limits(),
        sa.CheckConstraint(
            "granted_pico >= 0 AND topped_up_pico >= 0 AND reserved_pico >= 0"
            " AND granted_pico + topped_up_pico >= reserved_pico",
            name="balance_is_never_negative",
        ),
    )
    op.create_table(
        "keys",
        sa.Column("id", BigId, primary_key=True),
        sa.Column("user_id", sa.BigInteger, sa.ForeignKey("users.id"), nullable=False, index=True),
        sa.Column("hash", sa.String, nullable=False, unique=True),
        sa.Column("prefix", sa.String, nullable=False, index=True),
        *(text(name) for name in ("name", "scopes", "models")),
        number("created_ms"),
        *(sa.Column(name, sa.BigInteger) for name in ("expires_ms", "revoked_ms", "last_used_ms")),
        *limits(),
    )
    op.create_table("processes", sa.Column("id", sa.String, primary_key=True), number("heartbeat_ms"))


def create_requests() -> None:
    """Reservations of running requests, and the ledger of settled ones."""
    op.create_table(
        "reservations",
        sa.Column("request_id", sa.String, primary_key=True),
        sa.Column("process_id", sa.String, nullable=False, index=True),
        number("reserved_pico"),
        *request(),
        sa.Index("ix_reservations_user_id", "user_id"),
        sa.Index("ix_reservations_key_id", "key_id"),
    )
    op.create_table(
        "ledger",
        sa.Column("id", BigId, primary_key=True),
        sa.Column("request_id", sa.String, nullable=False, unique=True),
        *request(),
        number("cost_pico"),
        text("status"),
        number("settled_ms"),
        text("day"),
        sa.Index("ix_ledger_user_id_day", "user_id", "day"),
    )


def number(name: str, default: str | None = None) -> sa.Column[Any]:
    """A column of 64-bit integers."""
    return sa.Column(name, sa.BigInteger, nullable=False, server_default=None if default is None else sa.text(default))


def text(name: str) -> sa.Column[Any]:
    """A column of text."""
    return sa.Column(name, sa.String, nullable=False)


def limits() -> list[sa.Column[Any]]:
    """Limits and what is used of them."""
    columns: list[sa.Column[Any]] = [sa.Column(name, sa.Integer) for name in LIMITS]
    return [*columns, *(number(name, "0") for name in USED)]


def request() -> list[sa.Column[Any]]:
    """The columns that reservations and ledger share."""
    return [
        sa.Column("user_id", sa.BigInteger, sa.ForeignKey("users.id"), nullable=False),
        sa.Column("key_id", sa.BigInteger, sa.ForeignKey("keys.id"), nullable=False),
        text("model"),
        text("price_id"),
        *(number(name) for name in (*PRICES, *TOKENS, "admitted_ms")),
    ]


def forbid_changes(table: str, key: str) -> None:
    """Triggers that refuse UPDATE, DELETE and TRUNCATE."""
    message = f"the table {table} is append-only"
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{message}'); END"
            )
        op.execute(  # INSERT OR REPLACE deletes rows without calling the trigger for DELETE
            f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} "
            f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {key} = NEW.{key} OR id = NEW.id) "
            f"BEGIN SELECT RAISE(ABORT, '{message}: this row exists'); END"
        )
        return
    op.execute(
        f"CREATE FUNCTION {table}_is_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{message}'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_is_append_only()"
    )
