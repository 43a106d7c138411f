"""A server on a real socket with a scripted engine: the answers are texts, everything else is the real thing."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from thinkstack.engine.scripted import ScriptedEngine
from thinkstack.engine.service import EngineService
from thinkstack.server.accounts import Accounts
from thinkstack.server.app import Server
from thinkstack.server.database import Database, sqlite_url
from thinkstack.server.limits import UNLIMITED, Limits
from thinkstack.server.prices import PriceTable
from thinkstack.server.run import ApiProcess, address_of, listen
from thinkstack.server.served import Member, MemberConfig, ServedModels, config_of_model
from thinkstack.server.settings import ServerSettings
from thinkstack.text.chat import ChatFormat, chat_format
from thinkstack.text.grammar import GrammarCompiler
from thinkstack.text.tokenizer import CONTROL, FIM, TOOLS, train_tokenizer

WORDS = "the sum of 1 and 2 is 3, says the tool. What is the capital of France? Paris 你好 🙂 explain why"
TOKENIZER = train_tokenizer([WORDS] * 4, 420, control=(*CONTROL, *TOOLS, *FIM))
Answer = Callable[[str, int], str]
"""Function (text of the prompt, index of the choice) -> text of the turn after the opening, with control tokens."""


class LiveServer:
    """A running server."""

    def __init__(self, server: Server, url: str, key: str, engine: ScriptedEngine, loop: asyncio.AbstractEventLoop):
        self.server, self.url, self.key, self.engine, self.loop = server, url, key, engine, loop
        self.headers = {"Authorization": f"Bearer {key}"}


class QuickProcess(ApiProcess):
    """Sees at once that it is to end; uvicorn looks every 0.1 s, which is half the time of many a test."""

    async def main_loop(self) -> None:
        await self.on_tick(0)
        while not self.should_exit:
            await asyncio.sleep(0.005)


def written(text: str) -> list[int]:
    """Token ids of a turn's text, in which control tokens are control tokens."""
    return TOKENIZER.encode_pieces(TOKENIZER.split_controls(text))


def scripted(chat: ChatFormat, answer: Answer, **settings: Any) -> ScriptedEngine:
    """An engine that answers by a function."""

    @functools.cache
    def script(prompt: tuple[int, ...], index: int) -> list[int]:
        return written(answer(chat.tokenizer.decode(prompt), index))

    settings = {"max_num_seqs": 16, "max_waiting": 64} | settings
    end = chat.stop_token_ids[0]
    return ScriptedEngine(script, vocab_size=chat.tokenizer.vocab_size, end_id=end, max_model_len=8192, **settings)


@contextlib.contextmanager
def live(
    folder: Path,
    answer: Answer,
    format: str = "v3_1_think",
    settings: ServerSettings | None = None,
    limits: Limits = UNLIMITED,
    prices: PriceTable | None = None,
    no_keys: bool = False,
    database_timeout: float = 5.0,
    member: Member | None = None,
    **engine: Any,
) -> Iterator[LiveServer]:
    """Run a server while the block runs. member: a real model instead. engine: fields of EngineConfig."""
    chat = chat_format(format, TOKENIZER)
    served = scripted(chat, answer, **engine)
    config = config_of_model("scripted")
    if member is None:
        member = Member(MemberConfig(model="scripted"), EngineService(served), chat, GrammarCompiler(chat))
    accounts = Accounts(Database(sqlite_url(folder), database_timeout), prices, limits=limits)
    is_known = any(row["name"] == "ada" for row in accounts.list_users())  # to another server of this folder
    key = accounts.add_key(accounts.user_id("ada") if is_known else accounts.add_user("ada", is_admin=True), "test")
    principal = accounts.authenticate(key) if no_keys else None
    server = Server(ServedModels({"default": member}, config.models), accounts, settings or ServerSettings(), principal)
    listener = listen("127.0.0.1", 0)
    url, running = address_of(listener), QuickProcess(server)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(running.serve([listener]),))
    thread.start()
    try:
        while not running.started:
            assert thread.is_alive(), "the server did not start"
        yield LiveServer(server, url, key, served, loop)
    finally:
        running.should_exit = True
        thread.join()
