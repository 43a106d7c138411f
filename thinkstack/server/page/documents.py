"""A conversation as a document: the static HTML page of a share link or a download, and Markdown."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from markdown_it import MarkdownIt

from thinkstack.server.page.blocks import BlockSplitter
from thinkstack.server.page.markdown import render, replace_non_text

_LABELS = {
    "en": {
        "user": "User",
        "assistant": "Assistant",
        "thinking": "Thinking",
        "files": "Files",
        "untitled": "Conversation",
    },
    "zh": {"user": "用户", "assistant": "助手", "thinking": "思考过程", "files": "文件", "untitled": "对话"},
}
# Characters that reorder the text around them: in a name they make "gpj.exe" look like "exe.jpg".
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_MARKDOWN_CHARACTERS = re.compile(r"[\\`*_#|~$]")
_BACKTICKS = re.compile("`+")
_MARKER_END = re.compile(r"^([0-9]*)([-+.)=])")
_HTML_START = re.compile(r"<(?=[A-Za-z/!?])")
# Other people's viewers render HTML and load images: this parser finds where they would.
_VIEWER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A message of a conversation as a document shows it."""

    role: Literal["user", "assistant"]
    text: str
    """Plain text of a user, Markdown of an assistant."""
    reasoning: str = ""
    """The thinking, plain text."""
    files: tuple[str, ...] = ()
    """Names of attached files."""
    model: str = ""
    """The model that wrote the message; empty: not told."""


def html_page(title: str, entries: Sequence[Entry], language: str = "en", css: str | None = None) -> str:
    """A complete HTML page without scripts that loads nothing but its style sheet.

    css: the style sheet itself, for a page that is downloaded; None: /ui/share.css.
    """
    labels = _labels(language)
    name = escape(_one_line(title) or labels["untitled"])
    if css is None:
        style = '<link rel="stylesheet" href="/ui/share.css">'
    else:
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        sheet = css.replace("</", "<\\/")
        style = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{sheet}</style>'
    articles = "\n".join(_article(entry, labels) for entry in entries)
    return f"""<!DOCTYPE html>
<html lang="{escape(language)}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<meta name="referrer" content="no-referrer">
<title>{name}</title>
{style}
</head>
<body class="share">
<main>
<h1 dir="auto">{name}</h1>
{articles}
</main>
</body>
</html>
"""


def _article(entry: Entry, labels: dict[str, str]) -> str:
    heading = f"<h2>{escape(_role(entry, labels))}</h2>"
    parts = [heading]
    if entry.files:
        names = "".join(f"<li><bdi>{escape(_one_line(name))}</bdi></li>" for name in entry.files)
        parts.append(f'<ul class="files" aria-label="{labels["files"]}">{names}</ul>')
    if entry.reasoning:
        thinking = f"<summary>{labels['thinking']}</summary>{_plain(entry.reasoning)}"
        parts.append(f'<details class="thinking">{thinking}</details>')
    parts.append(_plain(entry.text) if entry.role == "user" else _scrollable(render(entry.text)))
    body = "\n".join(parts)
    return f'<article class="{entry.role}">\n{body}\n</article>'


def _scrollable(html: str) -> str:
    """Rendered Markdown in which wide tables and formulas scroll, by keyboard too, instead of the page. The tags are
    those of the renderer: in text they are escaped."""
    html = html.replace('<div class="formula">', '<div class="formula scrolls" tabindex="0">')
    return html.replace("<table>", '<div class="scrolls" tabindex="0"><table>').replace("</table>", "</table></div>")


def _plain(text: str) -> str:
    # HTML drops a line end right behind <pre>: the one that is written here.
    return f'<pre class="text" dir="auto">\n{escape(replace_non_text(text), quote=False)}</pre>'


def markdown_page(title: str, entries: Sequence[Entry], language: str = "en") -> str:
    """A Markdown document: a heading for the title and one for each message, the thinking in a code fence.

    The texts are as they were written, with two exceptions: raw HTML and images outside of code, which the page shows
    as text and as links, are escaped so that no viewer runs or loads them; and a code fence left open is closed.
    """
    labels = _labels(language)
    parts = [f"# {_escape_markdown(title) or labels['untitled']}"]
    can_refer = any("]:" in entry.text for entry in entries)
    for entry in entries:
        parts.append(f"## {_escape_markdown(_role(entry, labels))}")
        if entry.files:
            parts.append("\n".join(f"- {_escape_item(name)}" for name in entry.files))
        if entry.reasoning:
            parts.append(f"**{labels['thinking']}**\n\n{_fenced(entry.reasoning)}")
        parts.append(_inert(replace_non_text(entry.text), can_refer))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _inert(text: str, can_refer: bool) -> str:
    """Markdown in which no viewer finds HTML or images, and whose last code fence is closed.

    can_refer: the document defines links by name, and may define images so.
    """
    splitter = BlockSplitter()
    blocks = [*splitter.feed(text), *splitter.finish()]
    written = "".join(_escape_live(block) if _is_live(block, can_refer) else block for block in blocks)
    if _is_live(written, can_refer):  # a viewer without formulas sees other blocks
        written = _escape_live(written)
    last = _VIEWER.parse(f"{written}\n\n# end\n")[-1]
    return f"{written}\n{last.markup}" if last.type == "fence" else written


def _is_live(text: str, can_refer: bool) -> bool:
    tokens = _VIEWER.parse(text)
    types = {inner.type for token in tokens for inner in (token, *(token.children or ()))}
    is_cut_off = any(token.level >= _VIEWER.options["maxNesting"] - 1 for token in tokens)
    return bool(types & {"html_block", "html_inline", "image"}) or is_cut_off or (can_refer and "![" in text)


def _escape_live(text: str) -> str:
    return _HTML_START.sub("&lt;", text).replace("![", "&#33;[")


def _fenced(text: str) -> str:
    """The text in a code fence that is longer than any in it."""
    text = replace_non_text(text)
    longest = max((len(run) for run in _BACKTICKS.findall(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _role(entry: Entry, labels: dict[str, str]) -> str:
    model = _one_line(entry.model)
    return f"{labels[entry.role]} ({model})" if model and entry.role == "assistant" else labels[entry.role]


def _labels(language: str) -> dict[str, str]:
    return _LABELS["zh" if language.lower().startswith("zh") else "en"]


def _one_line(name: str) -> str:
    """A name on one line, in the order in which it is written."""
    return _BIDI.sub("\ufffd", replace_non_text(" ".join(name.split())))


def _escape_item(name: str) -> str:
    """A name as the text of a list item: it does not begin a list or a rule in it."""
    return _MARKER_END.sub(lambda found: f"{found[1]}&#{ord(found[2])};", _escape_markdown(name)) or "&nbsp;"


def _escape_markdown(name: str) -> str:
    """A name as text of a heading or list item. Brackets are references: \\[ would begin a formula."""
    text = _MARKDOWN_CHARACTERS.sub(r"\\\g<0>", _one_line(name).replace("&", "&amp;").replace("<", "&lt;"))
    return text.replace("[", "&#91;").replace("]", "&#93;").replace(">", "&gt;")
