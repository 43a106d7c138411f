"""The chat page in Chromium: how fast a long thread opens, what a stream costs, the first load, and what moves.

    python bench/page.py measure [--speed 650] [--short]
    python bench/page.py open | stream | load | shift
    python bench/page.py pictures --out docs/images

The server is the real one over the scripted engine. Needs the extra `page` and a Chromium of the system (or its path in
THINKSTACK_CHROMIUM). `stream` takes 8 minutes; --short writes a tenth of the text.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Row, machine, print_table, write_json
from page_pictures import take_pictures
from page_server import CSRF, PROSE, Answer, PageServer, long_answer, ordinary_thread, page_server, thought
from playwright.sync_api import Browser, CDPSession, Page, sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SIZE = {"width": 1200, "height": 800}
SAMPLE_SECONDS = 2.0
WATCH = """
window.bench = { tasks: [], shift: 0 };
new PerformanceObserver((list) => bench.tasks.push(...list.getEntries()))
  .observe({ type: 'longtask', buffered: true });
new PerformanceObserver((list) => {
  for (const each of list.getEntries()) if (!each.hadRecentInput) bench.shift += each.value;
}).observe({ type: 'layout-shift', buffered: true });
"""
DURATIONS = "bench.tasks.map((each) => each.duration)"
TASKS = "bench.tasks.map((each) => [Math.round(each.startTime), each.duration])"
OPENED = """
window.bench.opened = new Promise((resolve) => {
  const messages = document.getElementsByClassName('message');
  const look = () => {
    if (messages.length < %d) requestAnimationFrame(look);
    else requestAnimationFrame(() => setTimeout(() => resolve(performance.now())));
  };
  requestAnimationFrame(look);
});
"""
RECORD_MOVES = """(toggle) => {
  const top = document.querySelector('#messages').getBoundingClientRect().top;
  const above = toggle.closest('.message').previousElementSibling.querySelector('.user-text');
  const seen = [toggle, above].filter((each) => each.getBoundingClientRect().bottom > top);
  const before = seen.map((each) => each.getBoundingClientRect().top);
  bench.moved = 0;
  let frames = 40;
  const look = () => {
    seen.forEach((each, place) => {
      bench.moved = Math.max(bench.moved, Math.abs(each.getBoundingClientRect().top - before[place]));
    });
    if (frames -= 1) requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
}"""


@dataclass(frozen=True)
class Sample:
    """The state of the page's main thread."""

    at: float
    """Wall time in seconds."""
    busy: float
    """Seconds in tasks so far."""
    word: str
    """What the status line says."""


def rows_of(name: str, n: int, values: list[tuple[str, float, str]]) -> list[Row]:
    """The figures of one part."""
    return [Row(name=f"{name}: {what}", value=value, unit=unit, n=n, machine=machine()) for what, value, unit in values]


@contextlib.contextmanager
def tab_of(browser: Browser, script: str = WATCH, **options: Any) -> Iterator[Page]:
    """A tab with an empty cache."""
    context = browser.new_context(**({"locale": "en-US", "viewport": SIZE} | options))
    tab = context.new_page()
    tab.add_init_script(script)
    tab.set_default_timeout(60_000)
    try:
        yield tab
    finally:
        context.close()


def ask(tab: Page, text: str) -> None:
    """Send a message with Deep Think."""
    tab.locator("#model option").first.wait_for(state="attached")
    if tab.locator("#deep-think").get_attribute("aria-pressed") != "true":
        tab.locator("#deep-think").click()
    tab.fill("#composer-text", text)
    tab.press("#composer-text", "Enter")


def open_thread(browser: Browser, server: PageServer, given: argparse.Namespace) -> list[Row]:
    """From the navigation to all messages of a thread painted, each time with an empty cache."""
    times, tasks = [], []
    with tab_of(browser) as tab:
        reply = tab.request.post(f"{server.url}/page/import", data=ordinary_thread(given.messages), headers=CSRF)
        assert reply.ok, reply.text()
        address = f"{server.url}/#/c/{reply.json()['id']}"
    for _ in range(given.rounds):
        with tab_of(browser, WATCH + OPENED % given.messages) as tab:
            tab.goto(address, wait_until="commit")
            times.append(tab.evaluate("bench.opened") / 1000)
            tasks.append(max(tab.evaluate(DURATIONS), default=0.0))
    values = [("median", statistics.median(times), "s"), ("longest", max(times), "s")]
    values.append(("longest task, median", statistics.median(tasks), "ms"))
    return rows_of(f"a thread of {given.messages} messages opens", given.rounds, values)


def sample(tab: Page, cdp: CDPSession) -> Sample:
    """The main thread's time in tasks, and the status line."""
    metrics = {each["name"]: each["value"] for each in cdp.send("Performance.getMetrics")["metrics"]}
    return Sample(metrics["Timestamp"], metrics["TaskDuration"], tab.locator("#status").inner_text())


def busy_share(samples: list[Sample], first: float = 0.0, last: float = 1.0) -> float:
    """Share of a part of the time in which the main thread was in a task, in %."""
    begin, span = samples[0].at, samples[-1].at - samples[0].at
    inside = [each for each in samples if first <= (each.at - begin) / span <= last]
    return 100 * (inside[-1].busy - inside[0].busy) / (inside[-1].at - inside[0].at)


def stream(browser: Browser, server: PageServer, given: argparse.Namespace) -> list[Row]:
    """A long thought, open and followed, and a long answer."""
    server.speed.characters_per_second = given.speed
    samples: list[Sample] = []
    with tab_of(browser) as tab:
        tab.goto(server.url)
        cdp = tab.context.new_cdp_session(tab)
        cdp.send("Performance.enable")
        ask(tab, "a long thought")
        tab.locator(".thinking-toggle").click()
        tab.locator(".thinking-text").wait_for()
        tab.evaluate("document.querySelector('#to-end').click(); bench.tasks.length = 0")
        every = min(SAMPLE_SECONDS, given.size / given.speed / 100)
        while not samples or samples[-1].word in ("thinking", "answering"):
            tab.wait_for_timeout(1000 * every)
            samples.append(sample(tab, cdp))
        tasks = tab.evaluate(DURATIONS)
        if tasks:
            print(
                "tasks above 50 ms: [start, duration] in ms:", tab.evaluate(TASKS), "of", samples[-1].at - samples[0].at
            )
        num_thought = len(tab.locator(".thinking-text").text_content() or "")
        assert num_thought == len(thought(2 * given.size)), num_thought
        assert tab.locator("math[display=block]").count() == given.formulas
        end = tab.locator("#messages").evaluate("box => box.scrollHeight - box.clientHeight - box.scrollTop")
        assert end <= 40, f"the end was not followed: {end} px"
    samples = samples[:-1]
    parts = {word: [each for each in samples if each.word == word] for word in ("thinking", "answering")}
    values = [("time", samples[-1].at - samples[0].at, "s"), ("tasks above 50 ms", len(tasks), "")]
    values += [("longest of them", max(tasks, default=0.0), "ms"), ("busy", busy_share(samples), "%")]
    for name, part in (("", samples), (", thinking", parts["thinking"]), (", answering", parts["answering"])):
        values += [(f"busy{name}", busy_share(part), "%")] if name else []
        values.append((f"busy{name}, first tenth", busy_share(part, 0.0, 0.1), "%"))
        values.append((f"busy{name}, last tenth", busy_share(part, 0.9, 1.0), "%"))
    kilobytes = given.size // 1000
    return rows_of(f"{2 * kilobytes} KB thought, {kilobytes} KB answer at {given.speed:g}/s", 1, values)


def first_load(browser: Browser, server: PageServer, given: argparse.Namespace) -> list[Row]:
    """Requests and bytes, with the heads of replies, until the composer can be used."""
    urls, sizes = [], []
    with tab_of(browser) as tab:
        cdp = tab.context.new_cdp_session(tab)
        cdp.send("Network.enable")
        cdp.on("Network.requestWillBeSent", lambda event: urls.append(event["request"]["url"]))
        cdp.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
        tab.goto(server.url, wait_until="networkidle")
        tab.locator("#model option").first.wait_for(state="attached")
        ready = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    elsewhere = [url for url in urls if not url.startswith((f"{server.url}/", "data:"))]
    values = [("requests", len(urls), ""), ("bytes", sum(sizes) / 1000, "KB")]
    values += [("requests to elsewhere", len(elsewhere), ""), ("first contentful paint", ready, "ms")]
    return rows_of("first load", 1, values)


def shift(browser: Browser, server: PageServer, given: argparse.Namespace) -> list[Row]:
    """How far the row that was clicked moves while a thought is opened and folded, and what moves by itself."""
    server.speed.characters_per_second = 0.0
    moved = []
    with tab_of(browser) as tab:
        tab.goto(server.url)
        for number in range(4):
            ask(tab, f"a short thought, {number}")
            tab.locator(".message.assistant .figures").nth(number).wait_for()
            tab.locator("#status", has_text="done").wait_for()
        tab.wait_for_timeout(600)
        tab.evaluate("bench.shift = 0")
        for place in range(4):
            toggle = tab.locator(".thinking-toggle").nth(place)
            toggle.scroll_into_view_if_needed()
            for down in (0, 0, 0, 300):  # open, fold, open, and fold with the row at the top of a long text
                tab.mouse.move(600, 300)
                tab.mouse.wheel(0, down)
                tab.wait_for_timeout(300)
                toggle.evaluate(RECORD_MOVES)
                toggle.click()
                tab.wait_for_timeout(800)
                moved.append(tab.evaluate("bench.moved"))
        tab.wait_for_timeout(600)
        total = tab.evaluate("bench.shift")
    return rows_of("a thought is opened and folded", len(moved), [("the row moves", max(moved), "px"),
                   ("layout shift of the page", total, "")])  # fmt: skip


def answer_of(given: argparse.Namespace) -> Answer:
    """The texts of the scripted engine."""
    long = f"{thought(2 * given.size)}</think>{long_answer(given.size, given.formulas)}"
    short = f"{thought(6000)}</think>{long_answer(1500, 1)}"
    return lambda prompt, index: long if "long thought" in prompt else short


COMMANDS = {"open": open_thread, "load": first_load, "shift": shift, "stream": stream}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("measure", *COMMANDS, "pictures"))
    parser.add_argument("--messages", type=int, default=500, help="of the thread that is opened")
    parser.add_argument("--rounds", type=int, default=5, help="how often it is opened")
    parser.add_argument("--speed", type=float, default=650.0, help="characters per second of the stream")
    parser.add_argument(
        "--size", type=int, default=100_000, help="characters of the answer; the thought has twice as many"
    )
    parser.add_argument("--formulas", type=int, default=50, help="in the answer")
    parser.add_argument("--short", action="store_true", help="a tenth of the text")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of the pictures")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    given = parser.parse_args()
    if given.short:
        given.size, given.formulas = given.size // 10, max(1, given.formulas // 10)
    program = os.environ.get("THINKSTACK_CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        parser.error("no Chromium: install it, or set THINKSTACK_CHROMIUM to its path")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=OPTIONS)
        if given.command == "pictures":
            take_pictures(browser, Path(folder), given.out)
            return
        with page_server(Path(folder), {"scripted": answer_of(given)}, PROSE + long_answer(4000, 2)) as server:
            wanted = COMMANDS.values() if given.command == "measure" else [COMMANDS[given.command]]
            rows = [row for command in wanted for row in command(browser, server, given)]
        browser.close()
    print_table("page", ("", "value", "n"), [(r.name, f"{r.value:,.2f} {r.unit}".rstrip(), str(r.n)) for r in rows])
    print(f"{machine()}, Chromium {program}, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}")
    write_json(given.json, rows)


if __name__ == "__main__":
    main()
