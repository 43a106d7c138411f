"""The README's pictures of the chat page: `python bench/page.py pictures`. The conversations are scripted."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from page_server import CSRF, PageServer, page_server
from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, expect

DESKTOP, PHONE = ViewportSize(width=1200, height=800), ViewportSize(width=400, height=800)
SPEED = 250.0
MAX_BYTES = 150_000

STAIRS = "In how many ways can I climb 10 stairs, one or two at a time?"
STAIRS_THOUGHT = """The last move takes one stair or two, so w(n) = w(n-1) + w(n-2), as Fibonacci's numbers: 1, 1, 2, \
3, 5, 8, 13, 21, 34, 55, 89. Wait, let me check this: k double moves among 10 - k moves have C(10 - k, k) orders, and \
1 + 9 + 28 + 35 + 15 + 1 = 89. Both agree."""
STAIRS_ANSWER = """There are **89 ways**. The last move takes one stair or two, so

\\[ w_n = w_{n-1} + w_{n-2}, \\qquad w_0 = w_1 = 1, \\qquad w_{10} = \\sum_{k=0}^{5} \\binom{10-k}{k} = 89. \\]

- The recurrence counts by the **last** move.
- The sum counts by the number \\(k\\) of double moves.

```python
ways = lambda n: 1 if n < 2 else ways(n - 1) + ways(n - 2)  # ways(10) == 89
```"""
DICE = "I roll two dice. Which sum is the most likely, and how likely is it?"
DICE_THOUGHT = """There are 6 * 6 = 36 outcomes, all equally likely. The sum s can be written as a + b with a and b \
from 1 to 6. For s = 7 every a works: 1+6, 2+5, 3+4, 4+3, 5+2, 6+1. For any other s some a are impossible."""
DICE_ANSWER = """The most likely sum is **7**:

\\[ P(7) = \\frac{6}{36} = \\frac{1}{6} \\approx 16.7\\,\\%. \\]

For 7, each value of the first die leaves exactly one value for the second:

| sum | 6 | 7 | 8 |
|---|---|---|---|
| outcomes | 5 | 6 | 5 |"""
DICE_SHORT = """**Seven**, with probability \\(\\frac{1}{6}\\).

1. There are \\(6 \\cdot 6 = 36\\) equally likely outcomes.
2. Six of them sum to 7; every other sum has at most five.

\\[ P(s) = \\frac{6 - |s - 7|}{36}, \\qquad s = 2, \\dots, 12 \\]"""
GAUSS = "从 1 加到 100 等于多少？请说明理由。"
GAUSS_THOUGHT = """把首尾两个数配成一对：1 + 100 = 101，2 + 99 = 101，依此类推。
一共有 50 对，所以总和是 50 × 101 = 5050。
再用公式验证一下：n(n + 1)/2，其中 n = 100，得到 100 × 101 / 2 = 5050。两种方法结果一致。"""
GAUSS_ANSWER = """结果是 **5050**。

\\[ \\sum_{k=1}^{100} k = \\frac{100 \\cdot 101}{2} = 5050 \\]

- 首尾配对，每一对的和都是 101；
- 一共有 50 对，所以总和为 \\(50 \\times 101\\)。

```python
print(sum(range(1, 101)))  # 5050
```"""
TURNS = {
    STAIRS: (STAIRS_THOUGHT, STAIRS_ANSWER),
    DICE: (DICE_THOUGHT, DICE_ANSWER),
    GAUSS: (GAUSS_THOUGHT, GAUSS_ANSWER),
}
OTHER = "demo-large"
TITLES = {
    "en-US": ("Proof that there are infinitely many primes", "A regular expression for dates", "Plan a week in Lisbon"),
    "zh-CN": ("证明素数有无穷多个", "解释快速排序", "周末去哪里徒步"),
}


def demo(prompt: str, index: int) -> str:
    """The turn after a prompt."""
    thinking, answer = next(turn for question, turn in TURNS.items() if question in prompt)
    return f"{thinking}</think>{answer}"


def demo_large(prompt: str, index: int) -> str:
    """The turn of the other model, about the dice."""
    return f"{DICE_THOUGHT[:128]}</think>{DICE_SHORT}"


@contextmanager
def chat(browser: Browser, server: PageServer, size: ViewportSize, **options: Any) -> Iterator[Page]:
    """A tab with a few conversations in its list."""
    context = browser.new_context(viewport=size, **({"locale": "en-US", "color_scheme": "light"} | options))
    tab = context.new_page()
    for each in tab.request.get(f"{server.url}/page/conversations").json()["conversations"]:
        tab.request.delete(f"{server.url}/page/conversations/{each['id']}", headers=CSRF)
    for title in reversed(TITLES[options.get("locale", "en-US")]):
        head = {"format": "thinkstack-conversation", "version": 1, "title": title, "messages": []}
        assert tab.request.post(f"{server.url}/page/import", data=head, headers=CSRF).ok
    tab.goto(server.url)
    tab.locator("#model option").first.wait_for(state="attached")
    yield tab
    context.close()


def ask(tab: Page, text: str, opens: bool = True) -> None:
    """Ask with Deep Think, and open the thinking."""
    if tab.locator("#deep-think").get_attribute("aria-pressed") != "true":
        tab.locator("#deep-think").click()
    tab.fill("#composer-text", text)
    tab.press("#composer-text", "Enter")
    tab.locator("#stop").wait_for()
    if opens:
        tab.locator(".thinking-toggle").first.click()


def wait_done(tab: Page) -> None:
    """Wait for the end of all answers, then show the conversation from its beginning."""
    expect(tab.locator("#stop")).to_be_hidden(timeout=60_000)
    tab.locator("#messages").evaluate("box => { box.scrollTop = 0; }")
    tab.mouse.move(1195, 400)
    tab.wait_for_timeout(500)


def save(tab: Page, path: Path) -> None:
    """A picture with 256 colours."""
    picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}: {picture.width}x{picture.height}, {size / 1000:.0f} KB")
    assert size < MAX_BYTES, path


def take_pictures(browser: Browser, folder: Path, out: Path) -> None:
    """Write all pictures."""
    out.mkdir(parents=True, exist_ok=True)
    sample = " ".join(part for question, turn in TURNS.items() for part in (question, *turn)) + DICE_SHORT
    with page_server(folder, {"demo": demo, OTHER: demo_large}, sample) as server:
        server.speed.characters_per_second = SPEED
        with chat(browser, server, DESKTOP) as tab:
            ask(tab, STAIRS)
            wait_done(tab)
            save(tab, out / "page-light.png")
        with chat(browser, server, DESKTOP, color_scheme="dark") as tab:
            server.speed.characters_per_second = 50.0
            ask(tab, STAIRS)
            tab.locator(".answer-body math").first.wait_for()
            server.speed.characters_per_second = 2.0
            tab.mouse.move(1195, 400)
            tab.wait_for_timeout(1200)
            save(tab, out / "page-dark.png")
            server.speed.characters_per_second = SPEED
            wait_done(tab)
        with chat(browser, server, PHONE, has_touch=True, is_mobile=True) as tab:
            ask(tab, DICE)
            wait_done(tab)
            save(tab, out / "page-phone.png")
        with chat(browser, server, DESKTOP, locale="zh-CN") as tab:
            ask(tab, GAUSS)
            wait_done(tab)
            save(tab, out / "page-chinese.png")
        with chat(browser, server, DESKTOP) as tab:
            tab.locator("#compare").click()
            tab.locator("#second-model").select_option(OTHER)
            ask(tab, DICE, opens=False)
            wait_done(tab)
            save(tab, out / "page-compare.png")
