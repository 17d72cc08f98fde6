"""One HTML page without outside references: its tables, its images, its look on screens and on paper."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any


def page(title: str, blocks: Sequence[str], style: str = "") -> str:
    """The whole page; of `blocks`, which are HTML, empty ones are left out. `style` is CSS that has the last word."""
    body = "\n".join(block for block in blocks if block)
    return _PAGE.format(title=html.escape(title), body=body, style=style)


def html_table(head: Sequence[Sequence[Any]], rows: Sequence[Sequence[Any]], kind: str = "texts") -> str:
    """Rows of cells, which are no HTML; `kind` is texts, which are broken anywhere, or numbers, which stay whole."""

    def cells(row: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"

    lines = [*(cells(row, "th") for row in head), *(cells(row, "td") for row in rows)]
    return f'<table class="{kind}">{"".join(lines)}</table>'


def png(figure: Any) -> bytes:
    """A matplotlib figure as an image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return buffer.getvalue()


def images(shown: Sequence[tuple[str, bytes]]) -> str:
    """PNG images, each with what it shows, side by side where there is room."""
    tags = [
        f'<img alt="{html.escape(what)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for what, data in shown
    ]
    return f'<div class="plots">{"".join(tags)}</div>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ padding: .25rem .7rem; border-bottom: 1px solid #8884; text-align: left; vertical-align: top; }}
.numbers td {{ font-variant-numeric: tabular-nums; white-space: nowrap; }}
.texts td {{ overflow-wrap: anywhere; min-width: 7rem; }}
.plots {{ display: flex; flex-wrap: wrap; gap: .5rem; }}
img {{ max-width: 100%; max-height: 22rem; background: white; border-radius: 4px; }}
{style}
</style></head><body>
{body}
</body></html>
"""
