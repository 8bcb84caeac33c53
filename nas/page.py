"""One self-contained HTML file: page, cards, tables. Everything is escaped but what is Markup."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from search_spaces.common.files import atomic_write


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


STYLE = """
:root { color-scheme: light dark; --page: #f4f6f8; --card: #ffffff; --ink: #1f2933; --soft: #5b6673; --line: #dfe4ea;
  --accent: #0b62a8; --code: #eef1f5; --warn: #fff4dc; --warn-line: #d9971a; --mark: #eaf3fc; }
@media (prefers-color-scheme: dark) { :root { --page: #12161b; --card: #1b2129; --ink: #e4e8ed; --soft: #9fabb8;
  --line: #323b46; --accent: #6db5f2; --code: #262e38; --warn: #3a2f16; --warn-line: #d9971a; --mark: #1f2f40; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 48px; }
header p.kind { margin: 0; color: var(--soft); font-size: 13px; }
h1 { font-size: 27px; line-height: 1.25; margin: 4px 0 10px; letter-spacing: -0.01em; text-wrap: balance; }
h2 { font-size: 17px; margin: 0 0 10px; }
p { margin: 0 0 10px; max-width: 76ch; text-wrap: pretty; }
p.lead { font-size: 17px; margin-bottom: 18px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px 22px;
  margin: 18px 0 0; }
.soft { color: var(--soft); }
.warning { background: var(--warn); border-left: 4px solid var(--warn-line); border-radius: 6px; padding: 10px 14px;
  margin: 0 0 16px; max-width: none; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; }
.tile { flex: 1 1 128px; background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 12px 16px; }
.tile b { display: block; font-size: 21px; font-weight: 650; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile span { color: var(--soft); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(430px, 100%), 1fr)); gap: 18px; }
figure { margin: 0; min-width: 0; }
section > figure { margin-bottom: 12px; }
figure .sheet { background: #ffffff; border-radius: 8px; padding: 8px; overflow-x: auto; text-align: center; }
figure svg { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td, tr:last-child th { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; font-size: 13px; vertical-align: bottom; }
tbody th { font-weight: 500; color: var(--soft); white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; padding-right: 0;
  padding-left: 16px; }
tr.marked td, tr.marked th { background: var(--mark); }
th.number { white-space: normal; }
.widest { width: 100%; }
table code { font-size: 11.5px; }
table.pairs code { font-size: 12.5px; }
.aside { color: var(--soft); font-size: 12px; }
.unbroken { white-space: nowrap; }
.wide + p, .plots + p { margin-top: 12px; }
section > :last-child { margin-bottom: 0; }
table.pairs th { width: 1%; padding-right: 28px; }
code { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
pre { background: var(--code); border-radius: 8px; padding: 11px 14px; margin: 0 0 12px; white-space: pre-wrap; }
p code, li code { background: var(--code); border-radius: 4px; padding: 1px 5px; }
footer { color: var(--soft); font-size: 13px; margin-top: 22px; }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
"""


def escape(text: object) -> Markup:
    """`text` as HTML; Markup stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(str(text)))


def page(title: str, kind: str, body: Iterable[Markup], footer: object = "") -> str:
    """A whole document: `kind` stands small above the title."""
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="kind">{escape(kind)}</p>\n<h1>{escape(title)}</h1></header>\n'
    )
    return head + "\n".join(body) + f"\n<footer>{escape(footer)}</footer>\n</main>\n</body>\n</html>\n"


def join(*parts: object) -> Markup:
    """Several pieces as one."""
    return Markup("\n".join(escape(part) for part in parts))


def paragraph(*text: object, style: str = "") -> Markup:
    """A paragraph of pieces with spaces between."""
    name = f' class="{style}"' if style else ""
    return Markup(f"<p{name}>{' '.join(escape(t) for t in text if t)}</p>")


def section(heading: str, *content: object) -> Markup:
    """A card with a heading."""
    return Markup(f"<section>\n<h2>{escape(heading)}</h2>\n{join(*content)}\n</section>")


def code(text: object) -> Markup:
    """A piece of code in a line."""
    return Markup(f"<code>{escape(text)}</code>")


def small(text: object) -> Markup:
    """A softer aside in a line."""
    return Markup(f'<span class="aside">{escape(text)}</span>')


def unbroken(text: object) -> Markup:
    """A name that stays on one line."""
    return Markup(f'<span class="unbroken">{escape(text)}</span>')


def block(text: object) -> Markup:
    """Code on lines of its own."""
    return Markup(f"<pre><code>{escape(text)}</code></pre>")


def tiles(values: Mapping[str, str]) -> Markup:
    """{what: value} as a row of large figures."""
    cells = (f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in values.items())
    return Markup(f'<div class="tiles">{"".join(cells)}</div>')


def figure(svg: str, caption: object = "") -> Markup:
    """An SVG drawing (trusted text) on white, so that it reads the same in dark mode."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Markup(f'<figure><div class="sheet">{svg}</div>{below}</figure>')


def plots(figures: Sequence[Markup]) -> Markup:
    """Figures side by side where there is room."""
    return Markup(f'<div class="plots">{"".join(figures)}</div>')


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    numbers: Iterable[int] = (),
    widest: int | None = None,
    marked: int | None = None,
) -> Markup:
    """A table; columns in `numbers` stand right, column `widest` takes what room there is, row `marked` is tinted."""
    classes = {**dict.fromkeys(numbers, ' class="number"'), **({} if widest is None else {widest: ' class="widest"'})}

    def cells(tag: str, row: Sequence[object]) -> str:
        styles = (classes.get(k, "") for k in range(len(row)))
        return "".join(f"<{tag}{style}>{escape(c)}</{tag}>" for c, style in zip(row, styles, strict=True))

    head = f"<thead><tr>{cells('th', headings)}</tr></thead>"
    tints = {marked: ' class="marked"'} if marked is not None else {}
    body = "".join(f"<tr{tints.get(k, '')}>{cells('td', row)}</tr>\n" for k, row in enumerate(rows))
    return Markup(f'<div class="wide"><table>{head}\n<tbody>{body}</tbody></table></div>')


def pairs(values: Mapping[str, object]) -> Markup:
    """{name: value} as a table of two columns."""
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>\n" for k, v in values.items())
    return Markup(f'<div class="wide"><table class="pairs"><tbody>{rows}</tbody></table></div>')


def write(out: str | os.PathLike[str], text: str) -> Path:
    """Write a page to a file at once. Errors: UserError, RunError if it cannot be written."""
    with atomic_write(out) as file:
        file.write(text)
    return Path(out)
