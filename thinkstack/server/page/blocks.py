"""Split growing Markdown into its top-level blocks while it is written.

The rules are those of markdown-it as `markdown.py` configures it. A line is looked at once, when it is complete (a
formula that opens on it is looked for in the lines behind it, once). Where two readings of the text are
possible, no block ends before both agree. So rendering block by block equals rendering the whole.
"""

import re
from collections import deque
from enum import Enum, auto

from thinkstack.server.page.formulas import MAX_FORMULA_SPAN, Delimiter, match_display_opening, search_event

_LINE = re.compile(r"\r\n|\n|\r(?!\Z)")  # a \r at the end may be half of a \r\n
_FENCE = re.compile(r"`{3,}(?=[^`]*$)|~{3,}")
_HEADING = re.compile(r"#{1,6}(?:[ \t]|$)")
_RULE = re.compile(r"([-*_])(?:[ \t]*\1){2,}[ \t]*$")
_MARKER = re.compile(r"(?:[-*+]|[0-9]{1,9}[.)])(?=[ \t]|$)")
_INTERRUPTING_MARKER = re.compile(r"(?:[-*+]|0{0,8}1[.)])[ \t]+[^ \t]")
_UNDERLINE = re.compile(r"(?:-+|=+)[ \t]*$")
_DELIMITER_ROW = re.compile(r"[-:|][-:| \t]*$")
_DELIMITERS: tuple[Delimiter, ...] = ("\\[", "$$")


class _State(Enum):
    START = auto()
    PARAGRAPH = auto()
    QUOTE = auto()
    LIST = auto()
    CODE = auto()  # indented by four columns
    FENCE = auto()
    STUCK = auto()  # two readings would end blocks at different places: the rest is one block


class BlockSplitter:
    """Markdown in, sources of finished top-level blocks out; together with the tail they are the text.

    The blocks depend on the text alone, not on how it is cut into feeds.
    """

    def __init__(self) -> None:
        self._state = _State.START
        self._block: list[str] = []  # lines of the unfinished block
        self._finished: list[str] = []
        self._waiting: list[str] = []  # complete lines behind a formula's opening whose end has not been seen
        self._partial: list[str] = []  # pieces of the incomplete last line
        self._num_lines = 0  # lines taken from _waiting since the beginning
        self._ends = [0]  # characters up to each waiting line, line ends excluded
        self._events: dict[Delimiter, deque[int]] = {delimiter: deque() for delimiter in _DELIMITERS}
        self._fence = ""
        self._content_indent = 0  # of the present list item: lines indented less are not in it
        self._is_marker_alone = False  # the last line is a marker with nothing behind it
        self._is_item_over = False  # ... and was followed by a blank line
        self._is_after_blank = False
        self._is_ambiguous = False  # the last line may belong to a list or quote, or to a paragraph behind it
        self._last = ""  # the line before, without its indentation
        self._last_indent = 0
        self._handlers = {
            _State.START: self._start,
            _State.PARAGRAPH: self._continue_paragraph,
            _State.QUOTE: self._continue_quote,
            _State.LIST: self._continue_list,
            _State.CODE: self._continue_code,
            _State.FENCE: self._continue_fence,
            _State.STUCK: self._append,
        }

    @property
    def tail(self) -> str:
        """The text after the finished blocks (built on demand, linear in its length)."""
        return "".join([*self._block, *self._waiting, *self._partial])

    def feed(self, text: str) -> list[str]:
        """Add text; returns the blocks that it finishes."""
        if self._partial and self._partial[-1].endswith("\r") and text:
            text = self._partial.pop() + text
        start = 0
        for end in _LINE.finditer(text):
            self._partial.append(text[start : end.end()])
            self._add_line("".join(self._partial))
            self._partial.clear()
            start = end.end()
        if start < len(text):
            self._partial.append(text[start:])
        return self._run(is_final=False)

    def finish(self) -> list[str]:
        """The last blocks: the text ends here. A last block may be white space only."""
        if self._partial:
            self._add_line("".join(self._partial))
            self._partial.clear()
        self._run_into_finished(is_final=True)
        self._cut_block()
        return self._take()

    def _add_line(self, line: str) -> None:
        index = self._num_lines + len(self._waiting)
        self._waiting.append(line)
        self._ends.append(self._ends[-1] + len(line.rstrip("\r\n")))
        for delimiter in _DELIMITERS:
            if search_event(delimiter, line) is not None:
                self._events[delimiter].append(index)

    def _run(self, is_final: bool) -> list[str]:
        self._run_into_finished(is_final)
        return self._take()

    def _take(self) -> list[str]:
        finished, self._finished = self._finished, []
        return finished

    def _run_into_finished(self, is_final: bool) -> None:
        position = 0
        while position < len(self._waiting):
            taken = self._step(position, is_final)
            if taken == 0:
                break
            position += taken
        if position:
            del self._waiting[:position], self._ends[:position]
            self._num_lines += position

    def _step(self, position: int, is_final: bool) -> int:
        """Handle the waiting line at this position; returns how many lines are done, 0: more text is needed."""
        line = self._waiting[position]
        content = line.rstrip("\r\n")
        body = content.lstrip(" \t")
        indent = _indent(line)
        can_open = self._state not in (_State.FENCE, _State.STUCK) and indent < 4
        if can_open and not self._is_in_item(indent) and (delimiter := match_display_opening(body)):
            length = self._formula_length(position, delimiter, len(content) - len(body) + 2, is_final)
            if length is None:
                return 0
            if length:
                self._begin_block()
                self._block += self._waiting[position : position + length]
                self._cut_block()
                return length
        self._handlers[self._state](line, body, indent)
        self._last, self._last_indent = body, indent
        return 1

    def _is_in_item(self, indent: int) -> bool:
        return self._state is _State.LIST and indent >= self._content_indent and not self._is_item_over

    def _formula_length(self, position: int, delimiter: Delimiter, start: int, is_final: bool) -> int | None:
        """Lines of the display maths that opens at this position; 0: it is not one; None: not known yet."""
        event, length = search_event(delimiter, self._waiting[position], start), 1
        if event is None:
            events = self._events[delimiter]
            while events and events[0] <= self._num_lines + position:
                events.popleft()
            if not events:
                is_over = is_final or self._ends[-1] - self._ends[position] > MAX_FORMULA_SPAN
                return 0 if is_over else None
            length = events[0] - self._num_lines - position + 1
            event = search_event(delimiter, self._waiting[position + length - 1])
        if event is None or self._ends[position + length] - self._ends[position] > MAX_FORMULA_SPAN:
            return 0
        lines = self._waiting[position : position + length]
        at, closes = event
        if not closes or lines[-1][at + 2 :].strip(" \t\r\n"):
            return 0
        indent = _indent(lines[0])
        return 0 if any(line.strip(" \t\r\n") and _indent(line) < indent for line in lines[1:]) else length

    # What a line does, by the block that it follows.

    def _start(self, line: str, body: str, indent: int) -> None:
        """The line begins a block."""
        self._is_ambiguous = self._is_after_blank = False
        self._block.append(line)
        if not body:
            return
        if indent >= 4:
            self._state = _State.CODE
        elif fence := _FENCE.match(body):
            self._state, self._fence = _State.FENCE, fence[0]
        elif body[0] == ">":
            self._state = _State.QUOTE
        elif _RULE.match(body) or _HEADING.match(body):
            self._cut_block()
        elif marker := _MARKER.match(body):
            self._start_item(body, indent, marker.end())
        else:
            self._state = _State.PARAGRAPH
            self._is_ambiguous = body[0] == "["  # perhaps the definition of a link, and no paragraph

    def _start_item(self, body: str, indent: int, marker_length: int) -> None:
        self._state = _State.LIST
        self._is_ambiguous = self._is_after_blank = self._is_item_over = False
        rest = body[marker_length:]
        self._is_marker_alone = not rest.strip(" \t")
        after = indent + marker_length
        spaces = _columns(rest[: len(rest) - len(rest.lstrip(" \t"))], after)
        self._content_indent = after + (1 if self._is_marker_alone or spaces > 4 else spaces)

    def _end_at_blank(self, line: str) -> None:
        self._block.append(line)
        if self._is_ambiguous and self._last_indent >= 4:
            self._state = _State.CODE  # perhaps: then further indented lines belong to it
        else:
            self._cut_block()

    def _continue_paragraph(self, line: str, body: str, indent: int) -> None:
        if not body:
            self._end_at_blank(line)
        elif indent >= 4:
            self._block.append(line)
        elif _UNDERLINE.match(body):
            self._underline(line, body)
        elif self._interrupts(body) or _INTERRUPTING_MARKER.match(body):
            self._begin_block()
            self._start(line, body, indent)
        else:
            self._block.append(line)
            if _DELIMITER_ROW.match(body) and "|" in self._last:
                self._is_ambiguous = True  # perhaps a table, which other lines end than a paragraph
            elif self._is_ambiguous and _MARKER.match(body):
                self._state = _State.STUCK

    def _underline(self, line: str, body: str) -> None:
        """A line of - or = under a paragraph: a heading, a row of a table, or a rule under a link's definition."""
        self._block.append(line)
        self._is_ambiguous |= "|" in self._last
        if self._is_ambiguous and _MARKER.match(body):
            self._state = _State.STUCK
        elif not self._is_ambiguous or (body.startswith("---") and "|" not in self._last):
            self._cut_block()

    def _continue_quote(self, line: str, body: str, indent: int) -> None:
        if not body:
            self._end_at_blank(line)
        elif indent >= 4:
            self._block.append(line)
            self._is_ambiguous = True
        elif body[0] == ">":
            self._block.append(line)
            self._is_ambiguous = False
        else:
            self._leave_or_continue(line, body, indent)

    def _continue_list(self, line: str, body: str, indent: int) -> None:
        is_marker_alone, self._is_marker_alone = self._is_marker_alone, False
        if not body:
            self._block.append(line)
            self._is_item_over = self._is_item_over or is_marker_alone
            self._is_after_blank = True
        elif self._is_in_item(indent):
            self._block.append(line)
            self._is_after_blank = False
            is_special = self._interrupts(body) or _MARKER.match(body) or match_display_opening(body)
            if self._is_ambiguous and indent < 4 and is_special:
                self._state = _State.STUCK
        elif indent >= 4:
            if self._is_after_blank and not self._is_ambiguous:
                self._begin_block()
                self._start(line, body, indent)
            else:
                self._block.append(line)
                self._is_ambiguous = True
        elif self._is_after_blank and not (_MARKER.match(body) and not _RULE.match(body)):
            self._begin_block()
            self._start(line, body, indent)
        else:
            self._leave_or_continue(line, body, indent)

    def _leave_or_continue(self, line: str, body: str, indent: int) -> None:
        """A line outside of the list item or quote before it, indented by less than four columns."""
        is_dashes = _UNDERLINE.match(body) and body.startswith("---")
        if self._is_ambiguous and is_dashes and not self._is_after_blank:
            self._block.append(line)  # a rule, or the underline of a heading: the end of a block in both readings
            if "|" in self._last:
                self._state = _State.STUCK  # or a row of a table
            else:
                self._cut_block()
        elif self._interrupts(body):
            self._begin_block()
            self._start(line, body, indent)
        elif marker := _MARKER.match(body):
            if self._is_ambiguous and not self._is_after_blank and not _INTERRUPTING_MARKER.match(body):
                self._block.append(line)
                self._state = _State.STUCK
                return
            if self._state is _State.QUOTE:
                self._begin_block()
            self._block.append(line)
            self._start_item(body, indent, marker.end())
        else:
            self._block.append(line)
            self._is_ambiguous = True

    def _continue_code(self, line: str, body: str, indent: int) -> None:
        if body and indent < 4:
            self._begin_block()
            self._start(line, body, indent)
        else:
            self._block.append(line)

    def _continue_fence(self, line: str, body: str, indent: int) -> None:
        self._block.append(line)
        marks = body.rstrip(" \t")
        if indent < 4 and len(marks) >= len(self._fence) and marks == self._fence[0] * len(marks):
            self._cut_block()

    def _append(self, line: str, body: str, indent: int) -> None:
        self._block.append(line)

    def _interrupts(self, body: str) -> bool:
        """Whether the line begins a block that ends any other block (but for code and formulas)."""
        return bool(body[0] == ">" or _FENCE.match(body) or _HEADING.match(body) or _RULE.match(body))

    def _begin_block(self) -> None:
        """Finish what is before this line, unless it is blank lines only."""
        if self._state is not _State.START:
            self._cut_block()

    def _cut_block(self) -> None:
        if self._block:
            self._finished.append("".join(self._block))
            self._block = []
        self._state = _State.START
        self._is_ambiguous = self._is_after_blank = False


def _indent(line: str) -> int:
    return _columns(line[: len(line) - len(line.lstrip(" \t"))])


def _columns(white: str, start: int = 0) -> int:
    """Columns of white space that begins at a column; tab stops are four columns apart."""
    if "\t" not in white:
        return len(white)
    column = start
    for character in white:
        column += 4 - column % 4 if character == "\t" else 1
    return column - start
