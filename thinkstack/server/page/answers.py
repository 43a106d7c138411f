"""Answers belong to the server: they go on without a reader, and any process can show them.

The process that makes an answer writes it down once a second. Another process that is asked for it reads these rows;
it leaves commands, and the time at which somebody last read, in the row. An answer that nobody reads for a while ends.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from thinkstack.engine.interface import Overloaded
from thinkstack.server.api_errors import api_error
from thinkstack.server.errors import DatabaseUnavailable
from thinkstack.server.keys import Principal
from thinkstack.server.page.conversations import Conversations, Stats, StoredMessage
from thinkstack.server.page.errors import Conflict, NotFound
from thinkstack.server.page.live import LiveAnswer, Position
from thinkstack.server.page.shapes import message_json
from thinkstack.server.schema import TurnRequest
from thinkstack.server.turns import Turn
from thinkstack.types import RequestError

if TYPE_CHECKING:
    from thinkstack.server.app import Server

log = logging.getLogger(__name__)
SAVE_SECONDS = 1.0
"""How often running answers are written down."""
POLL_SECONDS = 0.5
"""How often an answer of another process is read."""
CHUNK_SECONDS = 0.05
"""Shortest time between two parts of an answer."""
UNREAD = "nobody was reading this answer any more"


@dataclass(eq=False)
class RunningAnswer:
    """An answer that this process makes."""

    live: LiveAnswer
    turn: Turn
    last_read: float
    """When somebody last read it, by time.monotonic."""
    task: "asyncio.Task[None] | None" = None
    error: str = ""
    """Why it was ended early."""


class Answers:
    """The running answers of this process, and those of others that somebody reads here."""

    def __init__(self, server: "Server", store: Conversations, unread_seconds: float):
        """unread_seconds: time without a reader after which an answer ends."""
        self._server, self._store, self._unread_seconds = server, store, unread_seconds
        self._running: dict[str, RunningAnswer] = {}
        self._mirrors: dict[str, LiveAnswer] = {}
        self._unsaved: dict[str, StoredMessage] = {}
        """Complete answers that are not written down yet."""
        self._saving = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Write answers down while the server runs; at the end they end with the engines."""
        saver = asyncio.create_task(self._save_repeatedly())
        try:
            yield
        finally:
            await self._server.drain()
            tasks = [running.task for running in self._running.values() if running.task is not None]
            await asyncio.gather(*tasks, return_exceptions=True)
            saver.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(saver, *self._tasks, return_exceptions=True)
            await self._save()

    async def start_turns(self, principal: Principal, wanted: Sequence[TurnRequest]) -> list[Turn]:
        """Admit and queue turns, all or none. Raises like `Turn.start`."""
        turns: list[Turn] = []
        try:
            for request in wanted:
                turn = await self._server.make_turn(principal, request, "page-")
                turn.min_seconds = CHUNK_SECONDS
                await turn.start(principal, self._server.settings.max_wait)
                turns.append(turn)
        except BaseException:
            for turn in turns:
                turn.close()
            raise
        return turns

    async def open(self, message: StoredMessage, siblings: Sequence[str]) -> LiveAnswer:
        """A message as a running answer; a long one is rendered in a thread."""
        return await asyncio.to_thread(LiveAnswer, replace(message, status="running"), siblings, self.describe)

    def launch(self, live: LiveAnswer, turn: Turn) -> None:
        """Read a turn that was started into its message, which is in the database."""
        running = self._running[live.message.id] = RunningAnswer(live, turn, time.monotonic())
        self._server.turns[turn.id] = turn
        running.task = asyncio.create_task(self._run(running))

    def describe(self, live: LiveAnswer) -> dict[str, Any]:
        """A running answer, or one that has just ended, as JSON."""
        return message_json(live.message, live.siblings, live)

    def find(self, message_id: str) -> LiveAnswer | None:
        """A running answer of this process."""
        running = self._running.get(message_id)
        return None if running is None else running.live

    async def events(self, user_id: int, message_id: str, after: Position) -> AsyncIterator[bytes]:
        """What comes after a position of an answer of a user. Raises NotFound."""
        message = await asyncio.to_thread(self._store.message, user_id, message_id)
        live = self.find(message_id) or self._mirrors.get(message_id)
        if live is None:
            siblings = await asyncio.to_thread(self._store.siblings, message)
            live = await self.open(message, siblings)
            if message.status != "running":
                await live.finish(message)
            elif message_id in self._mirrors:  # another reader was faster
                live = self._mirrors[message_id]
            else:
                self._follow_soon(user_id, live)
        return live.events(after)

    async def command(self, user_id: int, message_id: str, command: str) -> None:
        """Stop an answer ("stop") or close its thinking ("answer_now"), wherever it is made. Raises NotFound, and
        Conflict if it is complete."""
        message = await asyncio.to_thread(self._store.message, user_id, message_id)
        running = self._running.get(message_id)
        if running is not None:
            await _obey(running, command)
        elif message.status == "running":
            await asyncio.to_thread(self._store.signal, message_id, command)
        else:
            raise Conflict("this answer is complete")

    def end(self, message_ids: Sequence[str]) -> None:
        """End answers whose conversation was deleted."""
        for message_id in message_ids:
            if message_id in self._running:
                self._running[message_id].turn.abort()

    async def _run(self, running: RunningAnswer) -> None:
        """Read a turn to its end."""
        live, turn = running.live, running.turn
        status, error = "failed", ""
        try:
            async for index, event in turn.events():
                usage = turn.usage
                live.num_tokens, live.num_reasoning_tokens = usage.completion_tokens, usage.reasoning_tokens
                if index < 0:
                    continue
                if event.kind == "reasoning":
                    live.add_reasoning(event.text)
                elif event.kind == "content":
                    await live.add_content(event.text)
            status = {"abort": "stopped", "error": "failed"}.get(turn.status, turn.status)
        except Exception as found:
            described = api_error(found)
            error = described.message
            if described.status == 500:
                log.exception("an answer failed")
        finally:
            turn.close()
            self._server.turns.pop(turn.id, None)
        if status == "failed":
            error = error or "the engine failed; regenerate the answer"
        message = replace(live.message, status=status, error=error or running.error, stats=turn_stats(live, turn))
        await live.finish(message)
        self._unsaved[message.id] = live.message
        await self._save()
        del self._running[message.id]

    async def _save_repeatedly(self) -> None:
        """Write running answers down, obey other processes, and end what nobody reads."""
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            try:
                await self._save()
                signals = await asyncio.to_thread(self._store.signals, list(self._running))
            except DatabaseUnavailable as error:
                log.warning("%s", error)
                continue
            for message_id, running in list(self._running.items()):
                if message_id not in signals:
                    running.turn.abort()  # deleted by another process
                    continue
                command, read_ms = signals[message_id]
                await _obey(running, command)
                self._end_if_unread(running, read_ms)

    def _end_if_unread(self, running: RunningAnswer, read_ms: int) -> None:
        elsewhere = self._store.accounts.clock() - read_ms / 1000
        if running.live.num_readers or elsewhere < self._unread_seconds:
            running.last_read = time.monotonic()
        elif time.monotonic() - running.last_read > self._unread_seconds:
            running.error = UNREAD
            running.turn.abort()

    async def _save(self) -> None:
        """Write down complete answers, and running ones as far as they are. Complete ones stay until they are
        written."""
        async with self._saving:  # so that an older state is never written after a newer one
            await self._save_now()

    async def _save_now(self) -> None:
        complete = dict(self._unsaved)
        unfinished = [each.live.snapshot() for each in self._running.values() if not each.live.is_ended]
        if not complete and not unfinished:
            return
        try:
            await asyncio.to_thread(self._store.save, [*unfinished, *complete.values()])
        except DatabaseUnavailable as error:
            log.warning("%d answers wait for the database: %s", len(complete), error)
            return
        for message_id in complete:
            self._unsaved.pop(message_id, None)

    def _follow_soon(self, user_id: int, live: LiveAnswer) -> None:
        """Read an answer of another process while it has readers."""
        self._mirrors[live.message.id] = live
        task = asyncio.create_task(self._follow(user_id, live))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, user_id: int, live: LiveAnswer) -> None:
        message_id, told_at = live.message.id, 0.0
        try:
            while True:
                await asyncio.sleep(POLL_SECONDS)
                if not live.num_readers:
                    return
                try:
                    if time.monotonic() - told_at > self._unread_seconds / 4:
                        told_at = time.monotonic()
                        await asyncio.to_thread(self._store.signal, message_id)
                    message = await asyncio.to_thread(self._store.message, user_id, message_id)
                except DatabaseUnavailable as error:
                    log.warning("%s", error)
                    continue
                except NotFound as error:
                    await live.finish(replace(live.message, status="failed", error=str(error)))
                    return
                await _catch_up(live, message)
                if live.is_ended:
                    return
        finally:
            self._mirrors.pop(message_id, None)


async def _catch_up(live: LiveAnswer, message: StoredMessage) -> None:
    """Take over what a row has more."""
    num_reasoning, num_content = live.position
    if len(message.reasoning) > num_reasoning:
        live.add_reasoning(message.reasoning[num_reasoning:])
    if len(message.content) > num_content:
        await live.add_content(message.content[num_content:])
    live.num_tokens, live.num_reasoning_tokens = message.stats.completion_tokens, message.stats.reasoning_tokens
    if message.status != "running":
        await live.finish(message)


async def _obey(running: RunningAnswer, command: str) -> None:
    if command == "stop":
        running.turn.abort()
    elif command == "answer_now" and running.live.state != "answering":
        with contextlib.suppress(RequestError, Overloaded):  # it has no thinking, or it ends now
            await running.turn.end_thinking()


def turn_stats(live: LiveAnswer, turn: Turn) -> Stats:
    """What an answer took."""
    usage = turn.usage
    return replace(
        live.message.stats,
        prompt_cache_hit_tokens=usage.prompt_cache_hit_tokens,
        prompt_cache_miss_tokens=usage.prompt_cache_miss_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        draft_tokens=turn.num_draft_tokens,
        accepted_tokens=turn.num_accepted_tokens,
        seconds=round(time.monotonic() - live.began, 3),
        thinking_seconds=live.thinking_seconds,
        first_token_seconds=turn.first_token_seconds,
        cost_pico=turn.cost_pico,
    )
