"""Pages that need nothing but themselves: one list of parts becomes Markdown with pictures beside it, or one HTML file.

The HTML has its pictures, styles and scripts inside, so it opens from a disk, a mail or a server, without a network.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.files import atomic_write

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem; margin: 2rem auto;
       padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #999; font-weight: 600; } td.number, th.number { text-align: right; }
img { max-width: 100%; height: auto; } figure { margin: .5rem 0 1rem; } figcaption { color: #555; font-size: .9rem; }
pre { background: #f5f5f5; padding: .75rem; overflow-x: auto; white-space: pre-wrap; font-size: .85rem; }
details > summary { cursor: pointer; color: #333; } .box { overflow-x: auto; }
.warn { background: #fff4d6; border-left: 4px solid #d99a00; padding: .5rem .75rem; }
"""


@dataclasses.dataclass
class Page:
    """A page under construction. Each method adds a part; `markdown` and `html` render them all."""

    title: str
    parts: list[tuple[str, Any]] = dataclasses.field(default_factory=list)

    def text(self, text: str) -> None:
        """A paragraph; `code` in backticks and **bold** are rendered."""
        self.parts.append(("text", text))

    def warn(self, text: str) -> None:
        """A paragraph that should not be missed."""
        self.parts.append(("warn", text))

    def heading(self, text: str, level: int = 2) -> None:
        self.parts.append(("heading", (text, level)))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; columns whose cells are all numbers (or empty) stand at the right."""
        self.parts.append(("table", ([str(h) for h in header], [[show(cell) for cell in row] for row in rows])))

    def values(self, values: Mapping[str, Any], header: Sequence[str] = ("", "")) -> None:
        """A table of names and values."""
        if values:
            self.table(header, list(values.items()))

    def picture(self, name: str, png: bytes, caption: str) -> None:
        """A PNG: `name`.png beside the Markdown, inside the HTML."""
        self.parts.append(("picture", (name, png, caption)))

    def code(self, text: str, summary: str = "") -> None:
        """Preformatted text, in HTML folded away under `summary` if there is one."""
        self.parts.append(("code", (text, summary)))

    def markdown(self) -> str:
        return "\n\n".join([f"# {self.title}", *(_MARKDOWN[kind](value) for kind, value in self.parts)]) + "\n"

    def html(self) -> str:
        return document(self.title, "\n".join(_HTML[kind](value) for kind, value in self.parts))

    def write(self, folder: pathlib.Path, name: str) -> dict[str, pathlib.Path]:
        """Writes name.md, its pictures and name.html; returns {"markdown": path, "html": path}."""
        for kind, value in self.parts:
            if kind == "picture":
                atomic_write(folder / f"{value[0]}.png", value[1])
        paths = {"markdown": folder / f"{name}.md", "html": folder / f"{name}.html"}
        atomic_write(paths["markdown"], self.markdown())
        atomic_write(paths["html"], self.html())
        return paths


def document(title: str, body: str, script: str = "", data: Any = None, style: str = "") -> str:
    """A whole HTML document. `data` is what `script` reads as the constant DATA."""
    scripts = ""
    if script:
        # '</' inside a string would end the script element.
        encoded = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
        scripts = f"<script>\nconst DATA = {encoded};\n{script}\n</script>"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}{style}</style></head>\n'
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n{scripts}</body></html>\n"
    )


def show(value: Any) -> str:
    """A value as a table shows it: four significant decimals, thousands separated."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "n/a"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.4f}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:.3g}"


def new_figure(width: float = 8.0, height: float = 4.5, rows: int = 1, columns: int = 1, **options: Any) -> tuple:
    """(figure, axes) of matplotlib without its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def png_of(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"(n/a|[<>+~−-]?\s?[\d.,]+(e[+-]?\d+)?%?)?", text.replace("*", "")))


def _table_markdown(table: tuple[list[str], list[list[str]]]) -> str:
    header, rows = table
    right = _right_columns(table)
    cells = [[c.replace("|", "\\|").replace("\n", " ") for c in row] for row in [header, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("---:" if r else "---" for r in right) + "|", *lines[1:]])


def _right_columns(table: tuple[list[str], list[list[str]]]) -> list[bool]:
    header, rows = table
    return [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]


def _table_html(table: tuple[list[str], list[list[str]]]) -> str:
    header, rows = table
    kinds = [' class="number"' if r else "" for r in _right_columns(table)]

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}{k}>{_inline(c)}</{tag}>" for c, k in zip(cells, kinds, strict=True)) + "</tr>"

    head = f"<thead>{line(header, 'th')}</thead>" if any(header) else ""
    return f'<div class="box"><table>{head}<tbody>{"".join(line(row, "td") for row in rows)}</tbody></table></div>'


def _picture_html(value: tuple[str, bytes, str]) -> str:
    _name, png, caption = value
    source = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{source}">'
        f"<figcaption>{_inline(caption)}</figcaption></figure>"
    )


def _code_markdown(value: tuple[str, str]) -> str:
    text, summary = value
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return (f"{summary}:\n\n" if summary else "") + f"{fence}text\n{text}\n{fence}"


def _code_html(value: tuple[str, str]) -> str:
    text, summary = value
    block = f"<pre>{html.escape(text, quote=False)}</pre>"
    return f"<details><summary>{html.escape(summary)}</summary>{block}</details>" if summary else block


_MARKDOWN = {
    "text": lambda text: text,
    "warn": lambda text: f"> {text}",
    "heading": lambda value: f"{'#' * value[1]} {value[0]}",
    "table": _table_markdown,
    "picture": lambda value: f"![{value[2]}]({value[0]}.png)",
    "code": _code_markdown,
}
_HTML = {
    "text": lambda text: f"<p>{_inline(text)}</p>",
    "warn": lambda text: f'<p class="warn">{_inline(text)}</p>',
    "heading": lambda value: f"<h{value[1]}>{_inline(value[0])}</h{value[1]}>",
    "table": _table_html,
    "picture": _picture_html,
    "code": _code_html,
}
