import html5lib
import pytest

from tests.server.page.test_hostile import VIEWER
from thinkstack.server.page.documents import Entry, html_page, markdown_page
from thinkstack.server.page.markdown import render

USER = Entry(role="user", text="<b> **plain**\n  text", files=("notes.txt",))
ASSISTANT = Entry(role="assistant", text="**Bold** \\(x\\)", reasoning="so <i>\n\n# think", model="deepseek-chat")


def test_a_page_shows_users_as_text_and_assistants_as_markdown():
    html = html_page("A & B", [USER, ASSISTANT])
    assert '<pre class="text" dir="auto">\n&lt;b&gt; **plain**\n  text</pre>' in html
    assert '<h1 dir="auto">A &amp; B</h1>' in html
    assert "<title>A &amp; B</title>" in html
    assert "<bdi>notes.txt</bdi>" in html
    assert render(ASSISTANT.text) in html
    assert "<h2>Assistant (deepseek-chat)</h2>" in html
    assert '<details class="thinking"><summary>Thinking</summary><pre' in html
    assert '<pre class="text" dir="auto">\nso &lt;i&gt;\n\n# think</pre></details>' in html


def test_a_page_says_its_encoding_and_is_not_indexed():
    html = html_page("a", [])
    assert html.startswith("<!DOCTYPE html>")
    for tag in ('charset="utf-8"', 'name="robots" content="noindex"', 'name="referrer" content="no-referrer"'):
        assert f"<meta {tag}>" in html


def test_a_shared_page_links_its_style_and_a_download_holds_it():
    assert '<link rel="stylesheet" href="/ui/share.css">' in html_page("a", [])
    html = html_page("a", [], css="p { margin: 0 } /* </style><script> */")
    assert "<link" not in html
    assert "default-src 'none'" in html
    assert html.count("</style>") == 1
    root = html5lib.HTMLParser(strict=True).parse(html)
    assert not [element for element in root.iter() if str(element.tag).endswith("script")]


def test_a_page_is_in_the_readers_language():
    html = html_page("", [ASSISTANT], language="zh-CN")
    assert '<html lang="zh-CN">' in html
    assert '<h1 dir="auto">对话</h1>' in html
    assert "<summary>思考过程</summary>" in html
    assert '"><' not in html_page("a", [], language='"><script>').split("<head>")[0].removesuffix('">\n')


def test_text_that_begins_with_a_line_end_keeps_it():
    """HTML drops the first line end in <pre>."""
    html = html_page("a", [Entry(role="user", text="\n\nx")])
    root = html5lib.HTMLParser(strict=True).parse(html)
    assert [element.text for element in root.iter() if str(element.tag).endswith("pre")] == ["\n\nx"]


def test_markdown_has_a_heading_for_each_message_and_the_thinking_in_a_fence():
    assert markdown_page("Title", [USER, ASSISTANT]) == (
        "# Title\n\n## User\n\n- notes.txt\n\n&lt;b> **plain**\n  text\n\n"
        "## Assistant (deepseek-chat)\n\n**Thinking**\n\n```text\nso <i>\n\n# think\n```\n\n**Bold** \\(x\\)\n"
    )


def test_thinking_cannot_close_its_fence():
    text = markdown_page("a", [Entry(role="assistant", text="b", reasoning="```\n`````\n# c")])
    fences = [token for token in VIEWER.parse(text) if token.type == "fence"]
    assert [fence.content for fence in fences] == ["```\n`````\n# c\n"]


@pytest.mark.parametrize(
    "text", ["```\nx", "~~~~\nx\n~~~", "- a\n  ```\n  x", "> ```\n> x", "- # a\nb\n  ```\nx", "\\[\n```\n"]
)
def test_a_fence_left_open_ends_with_its_message(text):
    tokens = VIEWER.parse(markdown_page("a", [Entry(role="assistant", text=text), Entry(role="user", text="end")]))
    assert [token.content for token in tokens if token.type == "inline"][-2:] == ["User", "end"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`List<int>` <b>", "`List&lt;int>` &lt;b>"),
        ("`List<int>`", "`List<int>`"),
        ("```\n<b> ![a](b)\n```", "```\n<b> ![a](b)\n```"),
        ("![a](https://b.c)", "&#33;[a](https://b.c)"),
        ("![a][b]\n\n[b]: https://c.d", "&#33;[a][b]\n\n[b]: https://c.d"),
        ("1 < 2 <https://a.b>", "1 < 2 <https://a.b>"),
    ],
)
def test_only_live_html_and_images_are_escaped(text, expected):
    assert markdown_page("a", [Entry(role="assistant", text=text)]) == f"# a\n\n## Assistant\n\n{expected}\n"


def test_an_image_that_another_message_defines_is_escaped():
    texts = ("![a][b]", "[b]: https://c.d")
    text = markdown_page("a", [Entry(role="assistant", text=text) for text in texts])
    assert "image" not in {inner.type for token in VIEWER.parse(text) for inner in token.children or ()}


def test_names_are_text_of_one_line():
    text = markdown_page("a\n# b [c](d) #", [Entry(role="user", text="e", files=("- f", "1. g", "---", "\u202eh"))])
    tokens = VIEWER.parse(text)
    assert next(token.content for token in tokens if token.type == "inline") == r"a \# b &#91;c&#93;(d) \#"
    assert [token.type for token in tokens].count("bullet_list_open") == 1
    assert {token.type for token in tokens} & {"ordered_list_open", "hr"} == set()
    assert "\ufffdh" in text
