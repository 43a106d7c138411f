"""The tables of the page, in the database of the accounts.

Times are milliseconds since 1970 (UTC). Ids are random: who knows one still needs its owner's session.
"""

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Index, String, Table, Text, text

from thinkstack.server.database import BigId, metadata

sessions = Table(
    "sessions", metadata,
    Column("id", BigId, primary_key=True),
    Column("user_id", BigInteger, ForeignKey("users.id"), nullable=False, index=True),
    Column("token_hash", String, nullable=False, unique=True),
    Column("agent", String, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("last_seen_ms", BigInteger, nullable=False),
)  # fmt: skip
"""Who is signed in. agent: the browser, as it calls itself."""

invitations = Table(
    "invitations", metadata,
    Column("token_hash", String, primary_key=True),
    Column("user_id", BigInteger, ForeignKey("users.id"), nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
)  # fmt: skip
"""Invitations that are not used. user_id: the administrator who made it."""

conversations = Table(
    "conversations", metadata,
    Column("id", String, primary_key=True),
    Column("user_id", BigInteger, ForeignKey("users.id"), nullable=False),
    Column("title", String, nullable=False),
    Column("leaf_id", String),
    Column("share_token", String, unique=True),
    Column("share_leaf_id", String),
    Column("created_ms", BigInteger, nullable=False),
    Column("updated_ms", BigInteger, nullable=False),
    Index("ix_conversations_user_id_updated_ms", "user_id", "updated_ms"),
)  # fmt: skip
"""leaf_id: the end of the branch that is shown. share_leaf_id: the end of what the share link shows."""

messages = Table(
    "messages", metadata,
    Column("id", String, primary_key=True),
    Column("conversation_id", String, ForeignKey("conversations.id", ondelete="CASCADE"), nullable=False),
    Column("parent_id", String),
    Column("number", BigInteger, nullable=False),
    Column("role", String, nullable=False),
    Column("content", Text, nullable=False),
    Column("reasoning", Text, nullable=False),
    Column("files", Text, nullable=False),
    Column("model", String, nullable=False),
    Column("thinking", Boolean, nullable=False),
    Column("group_id", String),
    Column("status", String, nullable=False),
    Column("error", String, nullable=False),
    Column("stats", Text, nullable=False),
    Column("html", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("process_id", String),
    Column("command", String, nullable=False, server_default=text("''")),
    Column("read_ms", BigInteger, nullable=False, server_default=text("0")),
    Index("ix_messages_conversation_id_number", "conversation_id", "number", unique=True),
)  # fmt: skip
"""A tree per conversation. number: order of creation within the conversation. files and stats are JSON; html is the
rendered content of a finished answer. group_id: shared by answers that were made side by side. status: "" for the
user's messages, else "running", "stop", "length", "stopped" or "failed". A running answer belongs to the process
`process_id`; others leave it a `command` ("stop", "answer_now") and the time at which somebody last read it."""
