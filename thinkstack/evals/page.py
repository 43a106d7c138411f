"""The report as one self-contained HTML page: no scripts, no requests, light and dark color schemes."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2


@dataclass(frozen=True, kw_only=True)
class ReportTable:
    """A table of a report."""

    title: str
    columns: Sequence[str]
    """Headings of the columns after the labels of the rows."""
    rows: Sequence[tuple[str, Sequence[str]]]
    """Label and cells of each row."""
    corner: str = ""
    """Heading of the labels."""
    note: str = ""
    """Explanation below the table."""
    is_first_bold: bool = False
    """Whether the first row has the main figures."""
    is_folded: bool = False
    """Whether the table is shown after a click alone."""


WIDE_CELL = 36
"""Cells with more characters are text: aligned to the left and wrapped."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59606a; --line: #e2e5ea; --page: #f7f8fa; --card: #fff;
  --accent: #0a66a8; --good: #1a7f4b; --bad: #b3372b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --soft: #a2a9b3; --line: #343a43; --page: #15181c;
  --card: #1d2126; --accent: #6cb8f0; --good: #5fd39a; --bad: #f08a7e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.25rem; }
h3 { margin: 1.25rem 0 .5rem; font-size: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.25rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; }
thead th { color: var(--soft); font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
tr.first td { font-weight: 650; }
td.text { text-align: left; white-space: normal; min-width: 22rem; }
thead th { white-space: normal; vertical-align: bottom; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 6px; background: #fff; }
figcaption, .note { color: var(--soft); font-size: .9rem; }
figcaption { margin-top: .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.25rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .5rem 0; } summary { cursor: pointer; }
pre { margin: .5rem 0 0; padding: .75rem 1rem; border-radius: 8px; background: var(--page);
  border: 1px solid var(--line); white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.5 ui-monospace, "Cascadia Mono", Menlo, monospace; }
.right { color: var(--good); } .wrong { color: var(--bad); }
/* Plots are dark on white. The dark scheme inverts them, keeps the hues and blends black into the card. */
@media (prefers-color-scheme: dark) {
  figure img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; background: #fff; } }
/* Phones: labels wrap so that all columns fit; plots keep a readable size and scroll. */
@media (max-width: 40rem) {
  body { padding: 1.25rem .75rem 3rem; font-size: 15px; } h1 { font-size: 1.5rem; }
  .card { padding: .75rem; }
  th, td { padding: .4rem .35rem; font-size: .875rem; } th:first-child { white-space: normal; }
  figure { overflow-x: auto; } figure img { min-width: 36rem; } figcaption { position: sticky; left: 0; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="note">{{ setting }}</p>
{% macro render(table) %}<div class="card scroll"><table>
<thead><tr><th>{{ table.corner }}</th>
{%- for name in table.columns %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for label, cells in table.rows %}<tr{% if loop.first and table.is_first_bold %} class="first"{% endif %}>
{%- if label %}<th scope="row">{{ label }}</th>{% else %}<td></td>{% endif %}
{%- for cell in cells %}<td{% if cell|length > wide %} class="text"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% if table.note %}<p class="note">{{ table.note }}</p>
{% endif %}{% endmacro %}<h2>{{ tables[0].title }}</h2>
{{ render(tables[0]) }}{% if plots %}<h2>Plots</h2>
<div class="plots">
{% for caption, image in plots %}<figure class="card"><img alt="{{ caption }}" src="data:image/png;base64,{{ image }}">
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}</div>{% endif %}
{% for table in tables[1:] %}{% if table.is_folded %}<details><summary>{{ table.title }}</summary>
{{ render(table) }}</details>
{% else %}<h2>{{ table.title }}</h2>
{{ render(table) }}{% endif %}{% endfor %}<h2>Answers</h2>
<div class="card">
{% for name, tasks in answers.items() %}<h3>{{ name }}</h3>
{% for task, shown in tasks.items() %}<details{% if loop.first %} open{% endif %}><summary>{{ task }}</summary>
{% for answer in shown %}<p><strong>{{ answer.question }}</strong>
<span class="note">reference answer: {{ answer.reference }};</span>
{% if answer.correct is none %}<span class="note">not scored</span>
{% elif answer.correct %}<span class="right">correct</span>{% else %}<span class="wrong">wrong</span>{% endif %}</p>
<pre>{{ answer.text }}</pre>
{% endfor %}</details>
{% endfor %}{% endfor %}</div>
<h2>Provenance</h2>
<div class="card"><dl>
{% for name, value in facts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}</dl></div>
</body>
</html>
"""


def render_page(
    folder: Path,
    title: str,
    setting: str,
    tables: Sequence[ReportTable],
    plots: Mapping[str, str],
    answers: Mapping[str, Mapping[str, Sequence[object]]],
    facts: Mapping[str, str],
) -> str:
    """Return the page. Model output is escaped; the plots in `folder` are embedded.

    plots: file name -> caption. answers: column -> task -> results.ShownAnswer.
    """
    images = [
        (caption, base64.b64encode((folder / name).read_bytes()).decode("ascii")) for name, caption in plots.items()
    ]
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    return template.render(
        title=title, setting=setting, tables=tables, plots=images, answers=answers, facts=facts, wide=WIDE_CELL
    )
