import json
import re
from collections.abc import Iterator
from xml.etree.ElementTree import Element

import html5lib
import pytest
from markdown_it import MarkdownIt

from tests.server.page.hostile import cases
from thinkstack.server.page.documents import Entry, html_page, markdown_page
from thinkstack.server.page.formulas import MATHML_ATTRIBUTES, MATHML_ELEMENTS
from thinkstack.server.page.markdown import URL_SCHEMES, render

CASES = list(cases())
HTML, MATHML = "http://www.w3.org/1999/xhtml", "http://www.w3.org/1998/Math/MathML"
# Written down once more, so that a change of the sanitizer's list is noticed here.
BLOCK_ELEMENTS = set(
    "div p br hr h3 h4 h5 h6 ul ol li blockquote pre code em strong s table thead tbody tr th td a span".split()  # noqa: SIM905
)
PAGE_ELEMENTS = BLOCK_ELEMENTS | set(
    "html head meta title link style body main h1 h2 article details summary bdi".split()  # noqa: SIM905
)
BLOCK_ATTRIBUTES = {
    "a": {"href", "title", "rel", "target"},
    "ol": {"start"},
    "th": {"align"},
    "td": {"align"},
    **{name: {"class"} for name in ("div", "code", "span")},
}
PAGE_ATTRIBUTES = {
    **BLOCK_ATTRIBUTES,
    "div": {"class", "tabindex"},
    "html": {"lang"},
    "meta": {"charset", "name", "content", "http-equiv"},
    "link": {"rel", "href"},
    "ul": {"class", "aria-label"},
    "pre": {"class", "dir"},
    "h1": {"dir"},
    **{name: {"class"} for name in ("body", "article", "details")},
}
CLASSES = re.compile("block|formula|scrolls|share|user|assistant|thinking|files|text|language-[A-Za-z0-9_+-]{1,20}")
VIEWER = MarkdownIt("commonmark", {"html": True}).enable("table")  # as a hostile reader of an exported file


def split_name(tag: str) -> tuple[str, str]:
    namespace, _, name = tag.removeprefix("{").rpartition("}")
    return namespace, name


def check_element(element: Element, elements: set[str], attributes: dict[str, set[str]]) -> None:
    assert isinstance(element.tag, str), "a comment"
    namespace, name = split_name(element.tag)
    if namespace == MATHML:
        assert name in MATHML_ELEMENTS
        assert set(element.attrib) <= set(MATHML_ATTRIBUTES)
        assert not any(re.search(r"[:;()&<>]|\d{3}", value) for value in element.attrib.values())
        return
    assert (namespace, name in elements) == (HTML, True), element.tag
    assert set(element.attrib) <= attributes.get(name, set()), (name, element.attrib)
    assert all(CLASSES.fullmatch(word) for word in element.get("class", "").split())
    if name == "a" and "href" in element.attrib:
        assert re.match(rf"(?:{'|'.join(URL_SCHEMES)}):", element.attrib["href"])
        assert (element.get("rel"), element.get("target")) == ("noopener noreferrer nofollow", "_blank")
    if name == "link":
        assert element.attrib == {"rel": "stylesheet", "href": "/ui/share.css"}
    if name == "meta" and "http-equiv" in element.attrib:
        assert element.attrib["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    if name == "style":
        assert element.text == "body { margin: 0 }"


def check_fragment(html: str) -> None:
    """Only allowed elements, attributes and schemes, in HTML that a strict parser finds no error in."""
    for element in html5lib.HTMLParser(strict=True).parseFragment(html).iter():
        if element.tag != "DOCUMENT_FRAGMENT":
            check_element(element, BLOCK_ELEMENTS, BLOCK_ATTRIBUTES)


def check_page(html: str, num_articles: int) -> Element:
    root = html5lib.HTMLParser(strict=True).parse(html)
    for element in root.iter():
        check_element(element, PAGE_ELEMENTS, PAGE_ATTRIBUTES)
    counts = [sum(element.tag == f"{{{HTML}}}{name}" for element in root.iter()) for name in ("h1", "h2", "article")]
    assert counts == [1, num_articles, num_articles]
    return root


def check_markdown(text: str, roles: list[str]) -> None:
    """Nothing runs or loads in a viewer that renders HTML, and names make no headings."""
    tokens = VIEWER.parse(text)
    inner = [child for token in tokens for child in token.children or ()]
    assert not {token.type for token in [*tokens, *inner]} & {"html_block", "html_inline", "image"}
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", *["h2"] * len(roles)]
    check_fragment(render(text))


def strings(value: object) -> Iterator[str]:
    """All strings in a JSON value, its keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, member in value.items():
            yield key
            yield from strings(member)
    elif isinstance(value, list):
        for member in value:
            yield from strings(member)


def parts(kind: str, text: str) -> list[str]:
    """The texts of a case: itself, and for a file to import every string in it."""
    if kind != "import":
        return [text]
    try:
        return [text, *filter(None, strings(json.loads(text)))]
    except ValueError:
        return [text]


def test_there_are_enough_cases_with_names_of_their_own():
    assert len(CASES) >= 120
    assert len({name for name, _, _ in CASES}) == len(CASES)
    assert {kind for _, kind, _ in CASES} == {"html", "link", "formula", "code", "name", "import"}


@pytest.mark.parametrize(("kind", "text"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_nothing_in_a_rendered_block_loads_or_runs(kind, text):
    for part in parts(kind, text):
        check_fragment(render(part))


@pytest.mark.parametrize(("kind", "text"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_nothing_in_the_share_page_and_its_download_loads_or_runs(kind, text):
    for part in parts(kind, text):
        entries = [
            Entry(role="user", text=part, files=(part, "b.txt")),
            Entry(role="assistant", text=part, reasoning=part, model=part),
        ]
        for css in (None, "body { margin: 0 }"):
            root = check_page(html_page(part, entries, css=css), len(entries))
            summaries = [element for element in root.iter() if element.tag == f"{{{HTML}}}summary"]
            assert len(summaries) == 1


@pytest.mark.parametrize(("kind", "text"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_nothing_in_the_exported_markdown_loads_or_runs(kind, text):
    for part in parts(kind, text):
        names = [
            Entry(role="user", text="a", files=(part,)),
            Entry(role="assistant", text="b", reasoning=part, model=part),
        ]
        check_markdown(markdown_page(part, names), ["user", "assistant"])
        texts = [Entry(role="user", text=f"a {part}"), Entry(role="assistant", text=part), Entry(role="user", text="b")]
        tokens = VIEWER.parse(markdown_page("a", texts))
        inner = [child for token in tokens for child in token.children or ()]
        assert not {token.type for token in [*tokens, *inner]} & {"html_block", "html_inline", "image"}
        assert [token.content for token in tokens if token.type == "inline"][-1] == "b"


@pytest.mark.parametrize(
    "html",
    [
        *("<script>x</script>", "<img>", "<p onclick='x'>a</p>", "<a href='javascript:x'>a</a>", "<p style='a'>a</p>"),
        *(
            "<math><mi href='https://a'>x</mi></math>",
            "<svg></svg>",
            "<p id='a'>a</p>",
            "<!-- a -->",
            "<b>a",
            "<div class='x'></div>",
        ),
        *("<math><maction>x</maction></math>", "<a href='https://a' target='_self'>a</a>", "<iframe></iframe>"),
    ],
)
def test_the_check_itself_refuses(html):
    with pytest.raises((AssertionError, html5lib.html5parser.ParseError)):
        check_fragment(html)
