"""The server of bench/page.py: the real one over a scripted engine that writes at a steady speed, and its texts."""

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkstack.engine.scripted import ScriptedEngine
from thinkstack.engine.service import EngineService
from thinkstack.server.accounts import Accounts
from thinkstack.server.app import Server
from thinkstack.server.database import Database, sqlite_url
from thinkstack.server.limits import UNLIMITED
from thinkstack.server.run import ApiProcess, address_of, listen
from thinkstack.server.served import Member, MemberConfig, NameConfig, ServedModels
from thinkstack.server.settings import ServerSettings
from thinkstack.text.chat import chat_format
from thinkstack.text.grammar import GrammarCompiler
from thinkstack.text.tokenizer import CONTROL, FIM, TOOLS, train_tokenizer

MAX_MODEL_LEN = 262_144
VOCAB_SIZE = 2_000
CSRF = {"X-CSRF-Token": "local"}
"""What changes need on a server without keys."""
PROSE = (
    "Let me look at the sum again. The terms fall off quickly, so the first few decide, but the remainder still needs "
    "a bound. Suppose that every term is at most half of the one before it; then the whole tail is at most twice its "
    "first term, and that is small enough. Wait, is this true for the second term as well? I compute it by hand: it "
    "is 3/8, and half of the first is 1/2, so yes. "
)
SECTION = """## Step {n}

The estimate of step {n} uses **one** inequality and [the lemma](https://example.com/lemma) above. {prose}

{formula}

- the first case, where \\(k < {n}\\), is *immediate*
- the second one follows from `bound({n})`

```python
def bound(n: int) -> float:
    return sum(1 / k**2 for k in range(1, n + 1))  # step {n}
```

| k | value | bound |
|---|---|---|
| 1 | 1.0 | 2.0 |
| {n} | 0.5 | 1.0 |

{prose}
"""
FORMULA = "\\[ \\sum_{{k=1}}^{{{n}}} \\frac{{1}}{{k^2}} \\le 2 - \\frac{{1}}{{{n}}}, \\qquad x = \\sqrt{{{n}}} \\]"
Answer = Callable[[str, int], str]
"""Function (text of the prompt, index of the choice) -> text of the turn after the opening, with control tokens."""


def thought(size: int) -> str:
    """A thought of this many characters, in paragraphs."""
    paragraph = PROSE + PROSE[:200] + "\n\n" + PROSE * 3 + "\n\n"
    return (paragraph * (size // len(paragraph) + 1))[:size]


def long_answer(size: int, formulas: int) -> str:
    """Markdown of this many characters, with a displayed formula in each of its equal sections."""
    room, sections = size // formulas, []
    for n in range(1, formulas + 1):
        bare = len(SECTION.format(n=n, prose="", formula=FORMULA.format(n=n)))
        prose = (PROSE * (room // len(PROSE) + 1))[: max(0, room - bare - 1) // 2].rstrip()
        sections.append(SECTION.format(n=n, prose=prose, formula=FORMULA.format(n=n)))
    return "\n".join(sections)


def ordinary_thread(num_messages: int) -> dict[str, Any]:
    """An exported conversation whose answers have 1.5 KB, with a formula, a table and code in each."""
    rows: list[dict[str, Any]] = []
    for number in range(num_messages):
        row: dict[str, Any] = {"id": number, "parent": number - 1 if number else None}
        if number % 2:
            content, reasoning = long_answer(1500, 1), PROSE * 4
            row |= {"role": "assistant", "content": content, "reasoning": reasoning, "thinking": True}
            row |= {"model": "scripted", "status": "stop"}
        else:
            row |= {"role": "user", "content": f"Question {number // 2}: does the sum converge, and how fast?"}
        rows.append(row)
    head = {"format": "thinkstack-conversation", "version": 1, "title": f"{num_messages} messages"}
    return head | {"leaf": num_messages - 1, "messages": rows}


class Speed:
    """How many characters per second engines write; 0: as many as they can."""

    def __init__(self) -> None:
        self.characters_per_second, self.characters_per_token = 0.0, 4.0

    def slow_down(self, engine: ScriptedEngine) -> None:
        """Make the steps of an engine wait until their token is due; a long pause is not made up for."""
        step, due = engine.step, 0.0

        def paced() -> Any:
            nonlocal due
            if self.characters_per_second > 0:
                now = time.perf_counter()
                due = max(due, now - 0.1) + self.characters_per_token / self.characters_per_second
                time.sleep(max(0.0, due - now))
            return step()

        engine.step = paced  # type: ignore[method-assign]


@dataclass(frozen=True)
class PageServer:
    """A running server without keys."""

    url: str
    speed: Speed


def _member(name: str, answer: Answer, speed: Speed, sample: str) -> Member:
    """A model whose answers are given by a function. sample: text on which its tokenizer is trained."""
    tokenizer = train_tokenizer([sample] * 2, VOCAB_SIZE, control=(*CONTROL, *TOOLS, *FIM))
    chat = chat_format("v3_1_think", tokenizer)

    @functools.cache
    def script(prompt: tuple[int, ...], index: int) -> list[int]:
        text = answer(tokenizer.decode(prompt), index)
        tokens = tokenizer.encode_pieces(tokenizer.split_controls(text))
        speed.characters_per_token = len(text) / max(1, len(tokens))
        return tokens

    settings = {"max_num_seqs": 4, "cache_tokens": 2 * MAX_MODEL_LEN}
    engine = ScriptedEngine(script, tokenizer.vocab_size, chat.stop_token_ids[0], MAX_MODEL_LEN, **settings)
    speed.slow_down(engine)
    return Member(MemberConfig(model=name), EngineService(engine), chat, GrammarCompiler(chat))


@contextlib.contextmanager
def page_server(folder: Path, answers: dict[str, Answer], sample: str) -> Iterator[PageServer]:
    """Serve models by name while the block runs. sample: text like that of the answers."""
    speed, size = Speed(), MAX_MODEL_LEN // 2
    members = {name: _member(name, answer, speed, sample) for name, answer in answers.items()}
    names = {
        name: NameConfig(member=name, max_tokens=size, default_max_tokens=size, efforts={"max": size})
        for name in answers
    }
    accounts = Accounts(Database(sqlite_url(folder)), None, limits=UNLIMITED)
    principal = accounts.authenticate(accounts.add_key(accounts.add_user("ada", is_admin=True), "bench"))
    process = ApiProcess(Server(ServedModels(members, names), accounts, ServerSettings(), principal))
    listener = listen("127.0.0.1", 0)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(process.serve([listener]),))
    thread.start()
    try:
        while not process.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield PageServer(address_of(listener), speed)
    finally:
        process.should_exit = True
        thread.join()
