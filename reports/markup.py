"""HTML from Python values. Every text is escaped on its way in, unless it is `Html` already."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from reports.template import PAGE, SCRIPT, STYLE

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Longer tables say how much they leave out: a page must open quickly with thousands of clients too.
ROWS = 100


class Html(str):
    """Text that is HTML already."""


NO_HTML = Html()


class Cell(Html):
    """A table cell with a style of its own."""


class Section(NamedTuple):
    """A titled card of the page; the navigation links to its anchor."""

    anchor: str
    title: str
    body: Html


def escape(text: object) -> Html:
    """Return the text as HTML; `Html` stays as it is."""
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def element(tag: str, *content: object, **attributes: str) -> Html:
    """Return <tag attributes>content</tag>; class_ is class, aria_label is aria-label, empty ones are left out."""
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    head = "".join(f' {names[name]}="{html.escape(value)}"' for name, value in attributes.items() if value)
    return Html(f"<{tag}{head}>{join(content)}</{tag}>")


def join(parts: Iterable[object]) -> Html:
    """Return the parts one after the other."""
    return Html("".join(escape(part) for part in parts))


def paragraph(*content: object, quiet: bool = False) -> Html:
    """Return a paragraph, in quiet ink for an explanation."""
    return element("p", *content, class_="quiet" if quiet else "")


def tile(title: str, value: str, *notes: object) -> Html:
    """Return a headline figure with small print."""
    return element(
        "div", element("h3", title), element("strong", value), *(element("span", n) for n in notes), class_="tile"
    )


def figure(content: go.Figure, caption: str, legend: Html = NO_HTML) -> Html:
    """Return a figure with its caption and legend; the page's script draws it from the JSON that stands beside it."""
    # "<" in a client's name must not end the script element.
    data = Html(content.to_json().replace("<", "\\u003c"))
    # The space is reserved before the script draws, so that nothing jumps.
    height = f"height: {content.layout.height}px"
    plot = element("div", class_="plot", style=height, role="img", aria_label=caption)
    script = element("script", data, type="application/json")
    return element("figure", element("figcaption", caption), legend, plot, script)


def key(entries: Iterable[tuple[str, str, str]]) -> Html:
    """Return a legend of (mark, colour, name); marks are line, dash, dot, square, circle, diamond, tick, faint."""
    spans = (element("span", element("i", class_=mark, style=f"color: {color}"), name) for mark, color, name in entries)
    return element("div", *spans, class_="key")


def cell(content: object, kind: str = "", style: str = "") -> Cell:
    """Return a table cell; kinds are the style sheet's: text, text wide, text value, share."""
    return Cell(element("td", content, class_=kind, style=style))


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    text: int = 1,
    classes: Sequence[str] = (),
    even: bool = False,
) -> Html:
    """Return a table: the first `text` columns are words, the rest are numbers; a `Cell` is taken as it is.

    `classes` has one CSS class per row; `even` columns are equally wide. More than `ROWS` rows are cut off, and a line
    below says so.
    """
    head = (element("th", heading, class_="text" if i < text else "") for i, heading in enumerate(headings))
    body = []
    for r, row in enumerate(rows[:ROWS]):
        cells = (
            value if isinstance(value, Cell) else cell(value, "text" if i < text else "") for i, value in enumerate(row)
        )
        body.append(element("tr", *cells, class_=classes[r] if classes else ""))
    whole = element(
        "table", element("thead", element("tr", *head)), element("tbody", *body), class_="even" if even else ""
    )
    box = element("div", whole, class_="scroll")
    return join([box, paragraph(f"The first {ROWS} of {len(rows):,} rows.", quiet=True)]) if len(rows) > ROWS else box


def page(title: str, top: object, headline: object, sections: Sequence[Section], foot: str) -> str:
    """Return a whole self-contained page, plotly.js included once."""
    from plotly.offline import get_plotlyjs

    links = (element("a", section.title, href=f"#{section.anchor}") for section in sections)
    cards = (element("section", element("h2", s.title), s.body, id=s.anchor) for s in sections)
    body = [top, element("nav", *links), headline, *cards, element("footer", foot)]
    return PAGE.substitute(title=escape(title), style=STYLE, body=join(body), plotly=get_plotlyjs(), script=SCRIPT)
