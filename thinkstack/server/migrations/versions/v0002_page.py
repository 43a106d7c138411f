"""Sessions, invitations, conversations and messages of the page."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

BigId = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Create the tables of the page."""
    op.create_table(
        "sessions",
        sa.Column("id", BigId, primary_key=True),
        sa.Column("user_id", sa.BigInteger, sa.ForeignKey("users.id"), nullable=False, index=True),
        sa.Column("token_hash", sa.String, nullable=False, unique=True),
        sa.Column("agent", sa.String, nullable=False),
        number("created_ms"),
        number("last_seen_ms"),
    )
    op.create_table(
        "invitations",
        sa.Column("token_hash", sa.String, primary_key=True),
        sa.Column("user_id", sa.BigInteger, sa.ForeignKey("users.id"), nullable=False),
        number("expires_ms"),
    )
    op.create_table(
        "conversations",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("user_id", sa.BigInteger, sa.ForeignKey("users.id"), nullable=False),
        sa.Column("title", sa.String, nullable=False),
        sa.Column("leaf_id", sa.String),
        sa.Column("share_token", sa.String, unique=True),
        sa.Column("share_leaf_id", sa.String),
        number("created_ms"),
        number("updated_ms"),
        sa.Index("ix_conversations_user_id_updated_ms", "user_id", "updated_ms"),
    )
    create_messages()


def create_messages() -> None:
    """The messages."""
    op.create_table(
        "messages",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("conversation_id", sa.String, sa.ForeignKey("conversations.id", ondelete="CASCADE"), nullable=False),
        sa.Column("parent_id", sa.String),
        number("number"),
        *(sa.Column(name, sa.String, nullable=False) for name in ("role", "model", "status", "error")),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("content", "reasoning", "files", "stats", "html")),
        sa.Column("thinking", sa.Boolean, nullable=False),
        sa.Column("group_id", sa.String),
        number("created_ms"),
        sa.Column("process_id", sa.String),
        sa.Column("command", sa.String, nullable=False, server_default=sa.text("''")),
        sa.Column("read_ms", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Index("ix_messages_conversation_id_number", "conversation_id", "number", unique=True),
    )


def number(name: str) -> sa.Column[int]:
    """A column of integers."""
    return sa.Column(name, sa.BigInteger, nullable=False)
