"""Pages of results: plain HTML with its figures embedded, no script, nothing fetched. Figures are drawn by matplotlib."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1e293b;max-width:66rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin:2.2rem 0 .6rem}
.small,figcaption{color:#64748b;font-size:.9rem}figure{margin:0 0 1rem}img{max-width:100%}
table{border-collapse:collapse;font-size:.92rem;margin-bottom:1rem}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #e2e8f0;font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left}details{font-size:.9rem}
table.sentences td,table.sentences th{text-align:left;vertical-align:top;white-space:pre-line}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(27rem,1fr));gap:1rem}
.row.beside{grid-template-columns:10.5rem 1fr}
code{background:#f1f5f9;padding:.1rem .35rem;border-radius:4px;font-size:.9em}
"""
SVG: dict[RcKeyType, str] = {"svg.hashsalt": "rode", "svg.fonttype": "none"}
"""matplotlib's settings with which the same figure gives the same SVG."""


def require_matplotlib() -> None:
    """Raises ImportError in one line, with the mend: to be called before any long work."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'rode[plots]'") from error


def new_figure(*, figsize: tuple[float, float] | None = None) -> Figure:
    """An empty figure; without pyplot, so that no window system or global state is involved.

    Raises:
        ImportError: matplotlib is not installed; names the pip command.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(layout="constrained", figsize=figsize)


def svg(figure: Figure) -> str:
    """The same text for the same figure."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(SVG):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The same bytes for the same figure and matplotlib."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page; `title` as text, `sections` as HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def table(
    rows: Sequence[Sequence[str]], *, bold: Container[tuple[int, int]] = (), sentences: bool = False
) -> str:
    """Cells as text; the first row is the heading.

    Args:
        rows: of cells.
        bold: (row, column) of cells to emphasise.
        sentences: cells are read as text, not compared as numbers.
    """
    kind = ' class="sentences"' if sentences else ""
    lines = []
    for y, row in enumerate(rows):
        tag = "td" if y else "th"
        cells = (f"<b>{html.escape(c)}</b>" if (y, x) in bold else html.escape(c) for x, c in enumerate(row))
        lines.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>")
    return f"<table{kind}>{''.join(lines)}</table>"


def image(data: bytes, kind: str, alt: str = "") -> str:
    """A picture of media type `kind` ("image/png", "image/svg+xml"), embedded.

    As a picture even if it is SVG: two of matplotlib's in one page would share their ids.
    """
    source = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(alt)}" src="data:{kind};base64,{source}">'


def picture(data: bytes, kind: str, caption: str) -> str:
    """An `image` with its caption."""
    return f"<figure>{image(data, kind, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def drawing(figure: Figure, caption: str) -> str:
    """A matplotlib figure as an embedded SVG with its caption."""
    return picture(svg(figure).encode(), "image/svg+xml", caption)


def bullets(items: Iterable[str]) -> str:
    """A list; items as HTML."""
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"
