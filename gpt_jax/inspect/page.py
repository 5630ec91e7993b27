"""The page of an inspection: one HTML file, with its numbers and script inside, to hover over and choose from."""

from __future__ import annotations

import html
import importlib.resources
import math
from collections.abc import Mapping
from typing import Any

from gpt_jax.pages import document

_STYLE = """
body { max-width: 80rem; } .about { color: #555; margin: .25rem 0 .5rem; }
.tip { position: absolute; display: none; background: #222; color: #fff; padding: .35rem .6rem; border-radius: 4px;
       font-size: .8rem; white-space: pre; pointer-events: none; z-index: 9; }
.text { line-height: 1.9; } .text span { padding: .1rem .15rem; border-radius: 2px; margin-right: 1px;
       font-family: ui-monospace, monospace; font-size: .82rem; display: inline-block; }
.side { display: flex; gap: 1.5rem; flex-wrap: wrap; align-items: flex-start; }
.maps { display: flex; flex-wrap: wrap; gap: .4rem; max-width: 26rem; } .maps figure { margin: 0; text-align: center; }
.maps figcaption { font-size: .72rem; } canvas.small { width: 72px; height: 72px; border: 1px solid #ccc;
       cursor: pointer; image-rendering: pixelated; } canvas.on { outline: 2px solid #d99a00; }
       canvas#map { border: 1px solid #bbb; }
.axis { font-size: .85rem; color: #555; } table.grid td, table.grid th { padding: .25rem; text-align: center;
       border: 1px solid #eee; font-size: .78rem; font-weight: 400; } td.click { cursor: pointer; }
table.lens td, table.lens th { padding: .1rem .25rem; border: 1px solid #eee; font-size: .7rem; white-space: nowrap;
       font-family: ui-monospace, monospace; font-weight: 400; text-align: center; }
table.bars td, table.bars th { padding: .05rem .5rem; font-weight: 400; font-size: .82rem; border: 0; }
.bar { height: .8rem; }
"""


def inspection_page(title: str, intro: str, data: Mapping[str, Any]) -> str:
    """Returns the page; `data` is what script.js draws (see `gpt_jax/inspect/command.py`)."""
    script = importlib.resources.files("gpt_jax.inspect").joinpath("script.js").read_text(encoding="utf-8")
    body = f'<p>{html.escape(intro)}</p>\n<div id="page"></div>'
    return document(title, body, script, finite(data), _STYLE)


def finite(node: Any) -> Any:
    """Numbers, lists and mappings as JSON has them: arrays as lists, what is not finite as null."""
    if hasattr(node, "tolist"):
        node = node.tolist()
    if isinstance(node, Mapping):
        return {str(key): finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [finite(value) for value in node]
    if isinstance(node, float):
        return round(node, 6) if math.isfinite(node) else None
    return node
