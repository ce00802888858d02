"""Pieces of a report page: HTML in one file, with no scripts and nothing fetched."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .8rem; text-align: left;
       border-bottom: 1px solid #ddd } td.number { text-align: right;
       font-variant-numeric: tabular-nums } img { max-width: 100% }
figure { margin: 1.5rem 0 } figcaption { color: #555; font-size: .9rem }
"""


def document(title: str, body: Iterable[str]) -> str:
    """A whole page of pieces that are HTML already."""
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style>{''.join(body)}</html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first cell of a row is a name, the others are numbers as text."""
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in head)]
    for name, *numbers in rows:
        cells = [f"<td class='number'>{html.escape(number)}</td>" for number in numbers]
        lines.append(f"<td>{html.escape(name)}</td>{''.join(cells)}")
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def figure(source: str, caption: str) -> str:
    """A picture at an address, relative to the page or with its data in it."""
    text = html.escape(caption)
    return f"<figure><img src='{source}' alt='{text}'><figcaption>{text}</figcaption></figure>"


def heading(level: int, text: str) -> str:
    """Of a page with 1, of a part with 2."""
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{html.escape(text)}</p>"


def preformatted(text: str) -> str:
    """Plain text with its line ends."""
    return f"<pre>{html.escape(text)}</pre>"


def embedded(picture) -> str:
    """A matplotlib figure as an address that holds all of it."""
    file = io.BytesIO()
    picture.savefig(file, format="png", dpi=130)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
