"""Conversations as trees of messages, in the database. Methods are synchronous, like those of `Accounts`."""

import json
import secrets
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Connection, RowMapping, and_, delete, func, insert, or_, select, update

from thinkstack.server.accounts import Accounts
from thinkstack.server.database import processes
from thinkstack.server.page.errors import NotFound
from thinkstack.server.page.tables import conversations, messages

PAGE_SIZE = 50
"""Conversations in one part of the list."""
TITLE_LENGTH = 60
MAX_TITLE = 200
INTERRUPTED = "the server stopped in the middle of this answer"


@dataclass(frozen=True, kw_only=True)
class File:
    """A text file that a message has attached."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What an answer took."""

    prompt_cache_hit_tokens: int = 0
    prompt_cache_miss_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    seconds: float = 0.0
    thinking_seconds: float | None = None
    first_token_seconds: float | None = None
    cost_pico: int | None = None
    """None: this server costs nothing."""


@dataclass(frozen=True, kw_only=True)
class StoredMessage:
    """A row of the table of messages."""

    id: str
    conversation_id: str
    parent_id: str | None
    role: str
    content: str = ""
    reasoning: str = ""
    files: tuple[File, ...] = ()
    model: str = ""
    thinking: bool = False
    group_id: str | None = None
    status: str = ""
    error: str = ""
    stats: Stats = Stats()
    html: str = ""
    created_ms: int = 0
    process_id: str | None = None

    def values(self) -> dict[str, Any]:
        """The columns, without `number`."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found["files"] = json.dumps([asdict(file) for file in self.files], ensure_ascii=False)
        return found | {"stats": json.dumps(asdict(self.stats))}


def message_of(row: RowMapping) -> StoredMessage:
    """A row as a message."""
    values = {name: row[name] for name in StoredMessage.__dataclass_fields__}
    files = tuple(File(**file) for file in json.loads(row["files"]))
    return StoredMessage(**values | {"files": files, "stats": Stats(**json.loads(row["stats"]))})


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation and the branch that is shown."""

    id: str
    title: str
    updated_ms: int
    share_token: str | None
    messages: Sequence[StoredMessage]
    """From the root to the leaf."""
    compared: Sequence[StoredMessage] = ()
    """Answers that were made side by side with the leaf, if it is one of them."""
    siblings: Mapping[str | None, Sequence[str]] = field(default_factory=dict)
    """Ids of all messages by parent, in the order of their creation."""


def new_id() -> str:
    """A random id."""
    return secrets.token_hex(12)


def title_of(text: str, files: Sequence[File]) -> str:
    """The title of a conversation that begins with this message."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), files[0].name if files else "...")
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 3].rstrip() + "..."


class Conversations:
    """The conversations of one database."""

    def __init__(self, accounts: Accounts):
        self.accounts, self.database = accounts, accounts.database

    def page(
        self, user_id: int, query: str = "", before: tuple[int, str] | None = None
    ) -> tuple[list[dict[str, Any]], tuple[int, str] | None]:
        """A part of the list, the last changed first, and where the next part begins. query: a text that the title or
        a message contains."""
        columns, wanted = conversations.c, [conversations.c.user_id == user_id]
        if query:
            found = messages.c.content.icontains(query, autoescape=True)
            found |= messages.c.reasoning.icontains(query, autoescape=True)
            inside = select(messages.c.conversation_id).where(found)
            mine = select(columns.id).where(columns.user_id == user_id)
            inside = inside.where(messages.c.conversation_id.in_(mine))
            wanted.append(or_(columns.title.icontains(query, autoescape=True), columns.id.in_(inside)))
        if before is not None:
            moment, last = before
            is_older = and_(columns.updated_ms == moment, columns.id < last)
            wanted.append(or_(columns.updated_ms < moment, is_older))
        statement = select(columns.id, columns.title, columns.updated_ms).where(*wanted)
        statement = statement.order_by(columns.updated_ms.desc(), columns.id.desc()).limit(PAGE_SIZE + 1)
        with self.database.read() as connection:
            rows = [dict(row) for row in connection.execute(statement).mappings()]
        last_row = rows[PAGE_SIZE - 1] if len(rows) > PAGE_SIZE else None
        return rows[:PAGE_SIZE], None if last_row is None else (last_row["updated_ms"], last_row["id"])

    def check(self, user_id: int, conversation_id: str) -> None:
        """Raise NotFound if a user has no such conversation."""
        with self.database.read() as connection:
            _conversation(connection, user_id, conversation_id)

    def load(self, user_id: int, conversation_id: str) -> Conversation:
        """A conversation of a user. Raises NotFound."""
        with self.database.read() as connection:
            row = _conversation(connection, user_id, conversation_id)
            found = _branch(connection, row, row["leaf_id"])
        if any(self._is_orphan(message) for message in (*found.messages, *found.compared)):
            self.fail_orphans(conversation_id)
            return self.load(user_id, conversation_id)
        return found

    def message(self, user_id: int, message_id: str) -> StoredMessage:
        """A message of a user. Raises NotFound."""
        with self.database.read() as connection:
            found = _message(connection, user_id, message_id)
        if self._is_orphan(found):
            self.fail_orphans(found.conversation_id)
            return self.message(user_id, message_id)
        return found

    def siblings(self, message: StoredMessage) -> list[str]:
        """The ids of the messages with the same parent."""
        with self.database.read() as connection:
            return _children(connection, message.conversation_id)[message.parent_id]

    def history(self, user_id: int, message_id: str) -> list[StoredMessage]:
        """The messages from the root to this one. Raises NotFound."""
        with self.database.read() as connection:
            row = _conversation(connection, user_id, _message(connection, user_id, message_id).conversation_id)
            return list(_branch(connection, row, message_id).messages)

    def add(
        self, user_id: int, conversation_id: str, wanted: Sequence[StoredMessage], title: str | None = None
    ) -> Conversation:
        """Add messages; the first of the last siblings becomes the leaf. title: of a new conversation.

        Raises NotFound.
        """
        now_ms = self._now_ms()
        with self.database.write() as connection:
            if title is not None:
                values = {"user_id": user_id, "title": title, "created_ms": now_ms, "updated_ms": now_ms}
                connection.execute(insert(conversations).values(id=conversation_id, **values))
            _conversation(connection, user_id, conversation_id)
            is_here = messages.c.conversation_id == conversation_id
            number = connection.scalar(select(func.coalesce(func.max(messages.c.number), 0)).where(is_here)) or 0
            for place, message in enumerate(wanted, number + 1):
                connection.execute(insert(messages).values(number=place, **message.values()))
            same = [message for message in wanted if message.parent_id == wanted[-1].parent_id]
            self._touch(connection, conversation_id, leaf_id=same[0].id)
            return _branch(connection, _conversation(connection, user_id, conversation_id), same[0].id)

    def import_messages(
        self, user_id: int, conversation_id: str, title: str, wanted: Sequence[StoredMessage], leaf_id: str | None
    ) -> None:
        """Make a conversation of these messages, parents first."""
        now_ms = self._now_ms()
        values = {"user_id": user_id, "title": title, "created_ms": now_ms, "updated_ms": now_ms, "leaf_id": leaf_id}
        with self.database.write() as connection:
            connection.execute(insert(conversations).values(id=conversation_id, **values))
            rows = [message.values() | {"number": number} for number, message in enumerate(wanted, 1)]
            if rows:
                connection.execute(insert(messages), rows)

    def select(self, user_id: int, message_id: str) -> Conversation:
        """Show the branch with this message, as far as it was continued last. Raises NotFound."""
        with self.database.write() as connection:
            message = _message(connection, user_id, message_id)
            children = _children(connection, message.conversation_id)
            while children.get(message_id):
                message_id = children[message_id][-1]
            self._touch(connection, message.conversation_id, leaf_id=message_id)
        return self.load(user_id, message.conversation_id)

    def rename(self, user_id: int, conversation_id: str, title: str) -> None:
        """Change the title. Raises NotFound."""
        with self.database.write() as connection:
            _conversation(connection, user_id, conversation_id)
            self._touch(connection, conversation_id, title=title[:MAX_TITLE])

    def delete(self, user_id: int, conversation_id: str) -> list[str]:
        """Delete a conversation and its messages; returns the ids of answers that were running. Raises NotFound."""
        with self.database.write() as connection:
            _conversation(connection, user_id, conversation_id)
            is_here = messages.c.conversation_id == conversation_id
            running = connection.scalars(select(messages.c.id).where(is_here, messages.c.status == "running")).all()
            connection.execute(delete(messages).where(is_here))
            connection.execute(delete(conversations).where(conversations.c.id == conversation_id))
        return list(running)

    def share(self, user_id: int, conversation_id: str) -> str:
        """Share the branch that is shown, up to its end now; returns the token of the link. Raises NotFound."""
        with self.database.write() as connection:
            row = _conversation(connection, user_id, conversation_id)
            token = row["share_token"] or secrets.token_urlsafe(24)
            values = {"share_token": token, "share_leaf_id": row["leaf_id"]}
            connection.execute(update(conversations).where(conversations.c.id == conversation_id).values(values))
        return str(token)

    def unshare(self, user_id: int, conversation_id: str) -> None:
        """Take the link back. Raises NotFound."""
        with self.database.write() as connection:
            _conversation(connection, user_id, conversation_id)
            values = {"share_token": None, "share_leaf_id": None}
            connection.execute(update(conversations).where(conversations.c.id == conversation_id).values(values))

    def shared(self, token: str) -> Conversation:
        """What a link shows. Raises NotFound."""
        with self.database.read() as connection:
            statement = select(conversations).where(conversations.c.share_token == token)
            row = connection.execute(statement).mappings().one_or_none()
            if row is None:
                raise NotFound("there is no such shared conversation; its owner may have taken the link back")
            return _branch(connection, row, row["share_leaf_id"])

    def all_messages(self, user_id: int, conversation_id: str) -> tuple[RowMapping, list[StoredMessage]]:
        """The row of a conversation and all of its messages, in the order of their creation. Raises NotFound."""
        with self.database.read() as connection:
            row = _conversation(connection, user_id, conversation_id)
            statement = select(messages).where(messages.c.conversation_id == conversation_id)
            rows = connection.execute(statement.order_by(messages.c.number)).mappings()
            return row, [message_of(each) for each in rows]

    def save(self, answers: Iterable[StoredMessage]) -> None:
        """Write down answers as far as they are. Deleted ones are left alone."""
        columns = ("content", "reasoning", "status", "error", "stats", "html")
        with self.database.write() as connection:
            for answer in answers:
                values = answer.values()
                changed = {name: values[name] for name in columns}
                connection.execute(update(messages).where(messages.c.id == answer.id).values(changed))

    def signals(self, ids: Sequence[str]) -> dict[str, tuple[str, int]]:
        """By id of a running answer that still exists: the command that another process left, and when it was read."""
        statement = select(messages.c.id, messages.c.command, messages.c.read_ms).where(messages.c.id.in_(ids))
        with self.database.read() as connection:
            return {id_: (command, read_ms) for id_, command, read_ms in connection.execute(statement)}

    def signal(self, message_id: str, command: str = "") -> None:
        """Tell the process of an answer that somebody reads it, and a command."""
        values = {"read_ms": self._now_ms()} | ({"command": command} if command else {})
        with self.database.write() as connection:
            connection.execute(update(messages).where(messages.c.id == message_id).values(values))

    def fail_orphans(self, conversation_id: str) -> None:
        """End the answers of processes that died."""
        oldest_ms = self._now_ms() - int(self.accounts.lapse_seconds * 1000)
        alive = select(processes.c.id).where(processes.c.heartbeat_ms >= oldest_ms)
        is_orphan = (messages.c.conversation_id == conversation_id) & (messages.c.status == "running")
        is_orphan &= messages.c.process_id.is_(None) | messages.c.process_id.not_in(alive)
        with self.database.write() as connection:
            connection.execute(update(messages).where(is_orphan).values(status="failed", error=INTERRUPTED))

    def _is_orphan(self, message: StoredMessage) -> bool:
        if message.status != "running" or message.process_id == self.accounts.process_id:
            return False
        with self.database.read() as connection:
            statement = select(processes.c.heartbeat_ms).where(processes.c.id == message.process_id)
            heartbeat_ms = connection.scalar(statement)
        return heartbeat_ms is None or heartbeat_ms < self._now_ms() - self.accounts.lapse_seconds * 1000

    def _touch(self, connection: Connection, conversation_id: str, **values: Any) -> None:
        values["updated_ms"] = self._now_ms()
        connection.execute(update(conversations).where(conversations.c.id == conversation_id).values(values))

    def _now_ms(self) -> int:
        return int(self.accounts.clock() * 1000)


def _conversation(connection: Connection, user_id: int, conversation_id: str) -> RowMapping:
    is_theirs = (conversations.c.id == conversation_id) & (conversations.c.user_id == user_id)
    row = connection.execute(select(conversations).where(is_theirs)).mappings().one_or_none()
    if row is None:
        raise NotFound("there is no such conversation; it may have been deleted")
    return row


def _message(connection: Connection, user_id: int, message_id: str) -> StoredMessage:
    statement = select(messages).join(conversations, conversations.c.id == messages.c.conversation_id)
    statement = statement.where(messages.c.id == message_id, conversations.c.user_id == user_id)
    row = connection.execute(statement).mappings().one_or_none()
    if row is None:
        raise NotFound("there is no such message; its conversation may have been deleted")
    return message_of(row)


def _children(connection: Connection, conversation_id: str) -> dict[str | None, list[str]]:
    """The ids of all messages by parent, in the order of their creation."""
    statement = select(messages.c.id, messages.c.parent_id).where(messages.c.conversation_id == conversation_id)
    found: dict[str | None, list[str]] = defaultdict(list)
    for id_, parent_id in connection.execute(statement.order_by(messages.c.number)):
        found[parent_id].append(id_)
    return found


def _branch(connection: Connection, row: RowMapping, leaf_id: str | None) -> Conversation:
    """The branch that ends with a message."""
    children = _children(connection, row["id"])
    parents = {id_: parent_id for parent_id, ids in children.items() for id_ in ids}
    path: list[str] = []
    while leaf_id is not None and leaf_id in parents:
        path.append(leaf_id)
        leaf_id = parents[leaf_id]
    path.reverse()
    beside = [] if not path else [id_ for id_ in children[parents[path[-1]]] if id_ != path[-1]]
    statement = select(messages).where(messages.c.conversation_id == row["id"])
    if len(path) + len(beside) < len(parents):
        statement = statement.where(messages.c.id.in_([*path, *beside]))
    rows = connection.execute(statement).mappings()
    found = {row["id"]: message_of(row) for row in rows}
    leaf = found[path[-1]] if path else None
    compared = [found[id_] for id_ in beside if leaf and leaf.group_id and found[id_].group_id == leaf.group_id]
    return Conversation(
        id=row["id"], title=row["title"], updated_ms=row["updated_ms"], share_token=row["share_token"],
        messages=[found[id_] for id_ in path], compared=compared, siblings=children,
    )  # fmt: skip
