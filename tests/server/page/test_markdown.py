import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkstack.server.page import markdown
from thinkstack.server.page.markdown import BlockSplitter, render, render_block

FRAGMENTS = [
    *("word", "two words", " ", "  ", "   ", "    ", "\t", "\\", "|", "`", "`code`", "*", "[a]", "<div>", "&amp;"),
    *("# heading\n", "#", "## a|b\n", "---\n", "- - -\n", "***", "===\n", "--", "= \n"),
    *(
        "- ",
        "- item\n",
        "  - nested\n",
        "-\n",
        "-   far\n",
        "* ",
        "+ ",
        "1. ",
        "1. item\n",
        "2. ",
        "10) ",
        "1.   far\n",
    ),
    *("     indented\n", "    code\n", "  more\n", "> ", "> quote\n", ">", ">\n", "> > - $$\n", "> \\[\n", "> \\]\n"),
    *("```", "```py\n", "```\n", "~~~\n", "`````\n", "  ```\n", "   ```sh\n", "a|b\n", "-|-\n", "|-|-|\n", "|a|\n"),
    *("\\[\n", "\\]\n", " \\[\n", " \\]\n", "\\[ x \\]\n", "$$\n", "  $$\n", "$$ x $$", "x$$\n", "\\(x\\)", "$5"),
    *("\n", "\n", "\n", "\n\n", "\r\n", "\r", "\x0b", "\x85", "\u2028"),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=16).map("".join)


def split(text: str, cuts: list[int] | None = None) -> list[str]:
    splitter = BlockSplitter()
    positions = [0, *sorted(cuts or []), len(text)]
    blocks: list[str] = []
    for start, end in pairwise(positions):
        blocks += splitter.feed(text[start:end])
        assert "".join(blocks) + splitter.tail == text[:end]
    return blocks + splitter.finish()


def seconds(function, *args) -> float:
    """Processor time, the best of three."""
    times = []
    for _ in range(3):
        start = time.process_time()
        function(*args)
        times.append(time.process_time() - start)
    return min(times)


@settings(max_examples=700, deadline=None)
@given(text=TEXTS, data=st.data())
def test_blocks_are_the_text_for_every_cut_and_render_as_the_whole(text, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    blocks = split(text)
    assert "".join(blocks) == text
    assert split(text, cuts) == blocks
    assert split(text, list(range(len(text)))) == blocks
    parse = markdown._PARSER.render
    assert "".join(parse(block) for block in blocks) == parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "> a\n> \\[\n\nx\n\\]",  # display maths does not reach out of a quote
        "- - b\n  $$\n\n$$",  # nor out of a list item
        "- a\n \\[\n x\n\\]\n\nb",  # nor to lines indented less
        ">\n    \\\n\n    >",  # the code behind an empty quote goes on after the blank line
        "a||\n-|-\n-\n- b",  # a list behind a table, not the underline of a heading
        "a|b\n-|-\n2. c\n   ```\n\nd",  # a table is ended by a list that would not end a paragraph
        "2. a|b\n-|-\n   ```\n\nc",  # the marker of a list is no header of a table
        "- # a\nb\n  ```\n\nc\n  ```\n\nd",  # b may go on with the item, and the fence be in it
        "> # a\nb\n2. c\n\n   d",  # the list may end the quote, or go on with the paragraph b
        "-\n\n  a\n---",  # an item without content ends at the blank line
        "1.   a\n\n    code\n\n     b",
        "-\ta\n\n    b\n\n  c",
        "1. \ta\n\n    ```\n\nb",
        "-      a\n\n  ```\n\n  b\n\nc",  # five spaces behind a marker: the content is indented by one
        "[a]: /b\n===\nc",  # a definition is no paragraph, and no heading
        "|a|\n---\n|b|\n",  # a table of one column, not a heading
        "[a]: /b\n- c",
        "[a]: /b\n2. c\n   ```\n\nd",
    ],
)
def test_blocks_render_as_the_whole_where_two_readings_are_possible(text):
    parse = markdown._PARSER.render
    blocks = split(text)
    assert "".join(parse(block) for block in blocks) == parse(text)
    assert split(text, list(range(len(text)))) == blocks


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("a\n\nb\n\nc", ["a\n\n", "b\n\n", "c"]),
        ("# h\ntext\n## i", ["# h\n", "text\n", "## i"]),
        ("```\na\n\nb\n```\nc\n\n", ["```\na\n\nb\n```\n", "c\n\n"]),
        ("````\n```\n~~~~\n\n`````\nx", ["````\n```\n~~~~\n\n`````\n", "x"]),
        ("a\n\\[\nx\n\n= y\n\\]\nb", ["a\n", "\\[\nx\n\n= y\n\\]\n", "b"]),
        ("$$ x $$\nb", ["$$ x $$\n", "b"]),
        ("- a\n\n- b\n\n  more\n\nc", ["- a\n\n- b\n\n  more\n\n", "c"]),
        ("1. a\n   ```\n   x\n\n   y\n   ```\n2. b\n# h\n", ["1. a\n   ```\n   x\n\n   y\n   ```\n2. b\n", "# h\n"]),
        ("1. a\n  ```\n\nx\n  ```\n2. b", ["1. a\n", "  ```\n\nx\n  ```\n", "2. b"]),
        ("> a\nlazy\n\nb", ["> a\nlazy\n\n", "b"]),
        ("head\n---\nb", ["head\n---\n", "b"]),
        ("a|b\n-|-\n1|2\n\nc", ["a|b\n-|-\n1|2\n\n", "c"]),
        ("    a\n\n    b\nc", ["    a\n\n    b\n", "c"]),
        ("a\r\n\r\nb\rc\r\rd", ["a\r\n\r\n", "b\rc\r\r", "d"]),
    ],
)
def test_blocks_by_hand(text, blocks):
    assert split(text) == blocks


def test_a_paragraph_a_heading_a_fence_and_a_formula_are_finished_at_their_last_line_end():
    splitter = BlockSplitter()
    fed = [splitter.feed(line) for line in ("a\n", "\n", "# h\n", "```\n", "x\n", "```\n", "\\[\n", "y\n", "\\]\n")]
    assert fed == [[], ["a\n\n"], ["# h\n"], [], [], ["```\nx\n```\n"], [], [], ["\\[\ny\n\\]\n"]]
    assert splitter.tail == ""


def test_display_maths_that_never_closes_does_not_hold_the_rest_back():
    assert len(BlockSplitter().feed("\\[\n" + "text\n\n" * 4_000)) == 4_000


def test_display_maths_that_closes_too_late_is_none_however_it_is_fed():
    text = "\\[\n" + "xx\n\n" * 6_000 + "\\]\n"
    blocks = split(text)
    assert len(blocks) > 6_000
    assert split(text, [20_000, 23_000]) == blocks
    assert "<math" not in markdown._PARSER.render(text)


def test_html_is_text():
    assert render_block("<b onclick=x>hi</b> &lt;") == (
        '<div class="block"><p>&lt;b onclick=x&gt;hi&lt;/b&gt; &lt;</p>\n</div>'
    )


def test_links_open_elsewhere_and_tell_nothing():
    html = render_block('[a](https://b.c/?d=1&e=2 "t")')
    assert 'href="https://b.c/?d=1&amp;e=2"' in html
    assert 'target="_blank"' in html
    assert 'rel="noopener noreferrer nofollow"' in html


@pytest.mark.parametrize(
    "url", ["javascript:a", "data:text/html,a", "file:///a", "/a", "#a", "//a.b/c", "ftp://a", "a"]
)
def test_other_links_are_text(url):
    assert "<a" not in render_block(f"[a]({url}) <{url}>")


def test_images_are_links_and_inside_links_their_descriptions():
    assert ">alt</a>" in render_block("![alt](https://a.b/c.png)")
    assert ">https://a.b/c.png</a>" in render_block("![](https://a.b/c.png)")
    nested = render_block("[![alt](https://a.b/c.png)](https://d.e)")
    assert nested.count("<a ") == 1
    assert 'href="https://d.e"' in nested
    assert "<img" not in nested


def test_headings_begin_below_the_pages_own():
    html = render("# a\n# b\n##### c\n\nd\n===\n")
    assert "<h3>a</h3>" in html
    assert "<h6>c</h6>" in html
    assert "<h3>d</h3>" in html


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ("c++", ' class="language-c++"'),
        ("py title=x", ' class="language-py"'),
        ('a"b', ""),
        ("a" * 21, ""),
        ("<b>", ""),
    ],
)
def test_a_fence_keeps_the_name_of_its_language_if_it_is_one(info, expected):
    assert render_block(f"~~~{info}\nx\n~~~") == f'<div class="block"><pre><code{expected}>x\n</code></pre>\n</div>'


def test_tables_have_no_style_attributes():
    html = render_block("a|b\n:-:|-\n1|~~2~~\n")
    assert '<td align="center">1</td>' in html
    assert "<td><s>2</s></td>" in html
    assert "style" not in html


def test_dollars_are_currency():
    assert render_block("costs $5 and $10") == '<div class="block"><p>costs $5 and $10</p>\n</div>'


@pytest.mark.parametrize("text", ["\\(x^2\\)", "\\[x^2\\]", "$$x^2$$", "> \\[\n> x^2\n> \\]", "- a \\(x^2\\)"])
def test_formulas_are_mathml(text):
    html = render_block(text)
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in html
    assert "\\" not in html
    assert "$" not in html


@pytest.mark.parametrize(
    "text", ["`\\(x\\)`", "```\n$$x$$\n```", "    \\[x\\]", "\\( `x \\)`", "\\\\(x\\\\)", "$$$x$$"]
)
def test_code_and_escaped_delimiters_are_not_formulas(text):
    assert "<math" not in render_block(text)


def test_display_maths_ends_a_paragraph_and_may_hold_blank_lines_and_dashes():
    html = render_block("Let\n\\[\na\n\n- b\n\\]\nthen")
    assert html.index("<p>Let</p>") < html.index('<math display="block">') < html.index("<p>then</p>")
    assert "<ul>" not in html


@pytest.mark.parametrize(
    "latex",
    [
        *("\\frac{1}", "x^", "\\begin{matrix} a", "\\left( x", "\\unknown{", "\\newcommand{\\a}{x}\\a", "\\frac{<b>&}"),
        *(
            "{" * 60 + "}" * 60,
            "x" * 5_000,
            "\\sqrt" * 700 + "x",
            "\\sideset{a}{b}\\sideset{a}{b}{c}",
            "a \\\\ \\right)",
        ),
    ],
)
def test_a_formula_that_cannot_be_converted_is_shown_as_its_source(latex):
    html = render_block(f"\\({latex}\\)")
    source = latex.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert html == f'<div class="block"><p><code class="formula">\\({source}\\)</code></p>\n</div>'


def test_text_in_a_formula_stays_escaped():
    """latex2mathml's own serialization writes < of \\text as <."""
    html = render_block("\\[ \\text{<script>alert(1)</script> &lt;img&gt;} a < b \\]")
    assert "<mtext>&lt;script&gt;alert(1)&lt;/script&gt;\u00a0&lt;img&gt;</mtext>" in html.replace("&nbsp;", "\u00a0")
    assert "<mo>&lt;</mo>" in html


def test_commands_that_set_attributes_set_none():
    html = render_block("\\(\\class{a}{x} \\style{color:red}{y} \\href{javascript:alert(1)}{z} \\color{url(x)}{w}\\)")
    assert "<mi>x</mi>" in html
    for name in ('class="a"', "style=", "href", "url"):
        assert name not in html


@pytest.mark.parametrize("latex", ["\\hspace{9999em}x", "\\rule{900em}{900em}", "\\raise{-500em}{x}", "\\kern{-99em}x"])
def test_a_formula_cannot_cover_the_page(latex):
    html = render_block(f"\\({latex}\\)")
    assert "00em" not in html
    assert "99" not in html


@pytest.mark.parametrize("character", ["\x00", "\x01", "\x9f", "\ud800", "\ufffe", "\U0001ffff", "&#0;", "&#xfdd0;"])
def test_what_is_no_text_is_replaced(character):
    assert render_block(f"a{character}b") == '<div class="block"><p>a\ufffdb</p>\n</div>'


@pytest.mark.parametrize(
    "text",
    ["> " * 30 + "deep", "".join("  " * n + "- deep\n" for n in range(30))],
)
def test_what_is_nested_too_deep_is_shown_as_its_source(text):
    """markdown-it drops what is nested deeper than its limit."""
    html = render_block(text)
    assert html.startswith('<div class="block"><pre>')
    assert "deep" in html


def test_images_in_the_descriptions_of_images_lose_no_text():
    html = render_block("![" * 3_000 + "deep" + "](https://a)" * 3_000)
    assert "deep" in html
    assert html.count("https://a") >= 2_980


def test_nothing_visible_renders_to_nothing():
    assert render_block(" \n\n") == ""
    assert render_block("[a]: https://b.c\n") == ""


def feed_in_pieces(text: str) -> None:
    splitter = BlockSplitter()
    for start in range(0, len(text), 8):
        splitter.feed(text[start : start + 8])
    splitter.finish()


@pytest.mark.parametrize(
    "line",
    [
        "```\n" + "code line\n" * 9,
        "words and words\n",
        "words and words ",
        "- item of it\n",
        "> quoted\n",
        "\\[\n",
        "$$ a\n",
        "```",
    ],
)
def test_splitting_is_linear(line):
    text = line * (50_000 // len(line))
    if line.startswith("```\n"):
        text = "```\n" + text.replace("```\n", "")
    # Six times the text: 6x if linear, 36x if quadratic.
    assert seconds(feed_in_pieces, text) < 24 * seconds(feed_in_pieces, text[: len(text) // 6])


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 20_000, "![" * 10_000, "*a " * 13_000, "**a_b" * 4_000, "a**b" * 4_000, "[a](" * 10_000, "<" * 40_000),
        *("\\(" * 20_000, "\\[\n" * 6_000, "$$ a\n" * 8_000, "`a``" * 10_000, "> \\[\n" * 4_000, "a\n" * 8_000),
        *("> \\[\n" * 4_000 + "> \\] x\n", "> " * 18 + "a\n" + "b\n" * 3_000, "<http:" * 7_000, "| a\n" * 10_000),
    ],
)
def test_rendering_hostile_text_is_linear(text):
    assert seconds(render_block, text) < 24 * seconds(render_block, text[: len(text) // 6])


@pytest.mark.parametrize(
    "latex",
    [
        *(
            "x^" * 1_900,
            "\\frac" * 790,
            "a\\over " * 500,
            "\\left(" * 600,
            "\\not" * 900,
            "\\displaystyle" * 300,
            "a&b\\\\" * 600,
        ),
        *(
            "\\operatorname{" + "* " * 1_900,
            "\\text{" * 650,
            "x" + "'" * 3_900,
            "\\verb|a" * 500,
            "\\sideset{}{}{" * 30,
        ),
    ],
)
def test_no_formula_takes_longer_than_fifty_ordinary_ones(latex):
    ordinary = "\\(" + "\\sum_{i=1}^n \\frac{x_i^2}{\\sqrt{1 + e^{-x}}} + " * 10 + "1\\)"
    assert seconds(render_block, f"\\({latex}\\)") < 50 * seconds(render_block, ordinary)
