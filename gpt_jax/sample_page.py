"""A self-contained page that shows texts token by token: coloured by probability, with alternatives on hover."""

from __future__ import annotations

import dataclasses
import functools
import html
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gpt_jax.files import atomic_write
from gpt_jax.generation import bucket
from gpt_jax.model import Transformer
from gpt_jax.score import for_any_length

_PIECE = 128  # positions whose logits are held at once


@dataclasses.dataclass(frozen=True)
class Shown:
    """One token of a text.

    Attributes:
      id: of the token. probability: that the model gave it, None for the first. alternatives: the most likely tokens
        there and their probabilities, best first. rank: how many were likelier.
    """

    id: int
    probability: float | None = None
    rank: int = 0
    alternatives: tuple[tuple[int, float], ...] = ()


def look_at(model: Transformer, params: Any, ids: Sequence[int], top: int = 8) -> list[Shown]:
    """Returns what a model thinks of each token of a text, from one forward pass.

    Args:
      ids: at least one token. top: alternatives of each.
    """
    model = for_any_length(model)
    n, config = len(ids), model.config
    T = min(bucket(n, least=16), config.max_positions) if config.positions == "learned" else bucket(n, least=16)
    tokens = np.zeros((1, T), np.int32)
    tokens[0, :n] = ids
    targets = np.zeros(T, np.int32)
    targets[: n - 1] = ids[1:]
    chosen, ranks, best, logps = jax.device_get(_look(model, min(top, config.vocab_size), params, tokens, targets))
    out = [Shown(int(ids[0]))]
    for i in range(n - 1):
        alternatives = tuple((int(t), math.exp(p)) for t, p in zip(best[i], logps[i], strict=True))
        out.append(Shown(int(ids[i + 1]), math.exp(chosen[i]), int(ranks[i]), alternatives))
    return out


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look(model: Transformer, top: int, params: Any, tokens_1xT: Array, targets_T: Array) -> tuple[Array, ...]:
    hidden, _ = model.apply({"params": params}, tokens_1xT, method="encode")

    def one(xs: tuple[Array, Array]) -> tuple[Array, ...]:
        hidden_D, target = xs
        logits = model.apply({"params": params}, hidden_D[None], method="unembed")[0, : model.config.vocab_size]
        logp = jax.nn.log_softmax(logits)
        values, best = lax.top_k(logp, top)
        return logp[target], jnp.sum(logp > logp[target]), best, values

    return lax.map(one, (hidden[0], targets_T), batch_size=_PIECE)


def write_page(
    path: str | pathlib.Path, title: str, texts: Sequence[tuple[Sequence[Shown], int]], tokenizer: Any
) -> None:
    """Writes the page.

    Args:
      texts: (tokens, how many of them are the prompt) of each. tokenizer: of the ids.
    """
    blocks = "\n".join(_block(tokens, prompt, tokenizer) for tokens, prompt in texts)
    page = _PAGE.replace("{title}", html.escape(title)).replace("{blocks}", blocks)
    atomic_write(pathlib.Path(path), page.encode("utf-8"))


def _block(tokens: Sequence[Shown], prompt: int, tokenizer: Any) -> str:
    decoder, out = tokenizer.stream("show"), []
    for number, token in enumerate(tokens):
        text = decoder.push(token.id)
        out.append(_token(token, text, number < prompt, tokenizer))
    new = [t.probability for t in tokens[prompt:] if t.probability]
    mean = -sum(map(math.log, new)) / len(new) if new else 0.0
    about = f"{len(new)} new tokens, perplexity {math.exp(mean):.3g}" if new else "no new tokens"
    return f'<section><p class="about">{about}</p><p class="text">{"".join(out)}</p></section>'


def _token(token: Shown, text: str, is_prompt: bool, tokenizer: Any) -> str:
    shown = html.escape(text).replace("\n", '<i class="nl">⏎</i><br>') or '<i class="nl">·</i>'
    kind = "t prompt" if is_prompt else "t"
    if token.probability is None:
        return f'<span class="{kind}">{shown}</span>'
    # The hue falls with the surprise: 0 bits is green, 10 or more red.
    bits = -math.log2(max(token.probability, 1e-30))
    hue = round(130 * (1 - min(bits, 10.0) / 10.0))
    rows = [_row(t, p, t == token.id, tokenizer) for t, p in token.alternatives]
    if token.id not in [t for t, _ in token.alternatives]:
        rows.append(_row(token.id, token.probability, True, tokenizer))
    head = f"<b>{_percent(token.probability)}</b> · {bits:.1f} bits · rank {token.rank + 1}"
    tip = f'<span class="tip"><span class="head">{head}</span>{"".join(rows)}</span>'
    return f'<span class="{kind}" tabindex="0" style="--h:{hue}">{shown}{tip}</span>'


def _row(token: int, probability: float, chosen: bool, tokenizer: Any) -> str:
    name = html.escape(_name(token, tokenizer))
    width = f"{100 * probability:.1f}%"
    kind = "row chosen" if chosen else "row"
    return (
        f'<span class="{kind}"><span class="bar" style="width:{width}"></span>'
        f'<span class="name">{name}</span><span class="p">{_percent(probability)}</span></span>'
    )


def _name(token: int, tokenizer: Any) -> str:
    """A token in one line: blanks visible, bytes of a part of a character in hexadecimal."""
    data = tokenizer.token_bytes(token)
    if not data:
        return tokenizer.decode([token], specials="show") or f"<{token}>"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return " ".join(f"{byte:02X}" for byte in data)
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _percent(p: float) -> str:
    return f"{100 * p:.1f} %" if p >= 0.001 else f"{100 * p:.1g} %"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --back: #fff; --fore: #1b1f24; --quiet: #6b7280; --line: #d7dbe0; --panel: #fff;
  --light: 86%; --bar: #b9d5f5; }
@media (prefers-color-scheme: dark) { :root { --back: #15181c; --fore: #e6e8ea; --quiet: #9aa2ad; --line: #353b43;
  --panel: #1f242a; --light: 26%; --bar: #2b4a6f; } }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: var(--back); color: var(--fore);
  font: 16px/1.75 system-ui, sans-serif; }
h1 { font-size: 1.2rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
.about, .legend { color: var(--quiet); font-size: .85rem; margin: .2rem 0; }
section { border-top: 1px solid var(--line); padding: .6rem 0 1rem; }
.text { margin: .3rem 0; font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .92rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.t { position: relative; border-radius: 3px; }
.t[style] { background: hsl(var(--h) 70% var(--light)); cursor: default; }
.t.prompt { background: none; border-bottom: 2px solid hsl(var(--h) 60% 55%); border-radius: 0; }
.t:hover, .t:focus { outline: 2px solid var(--quiet); outline-offset: -1px; z-index: 2; }
.nl { color: var(--quiet); font-style: normal; opacity: .6; }
.tip { display: none; position: absolute; left: 0; top: 1.6em; z-index: 3; min-width: 15rem; padding: .4rem .5rem;
  background: var(--panel); color: var(--fore); border: 1px solid var(--line); border-radius: 6px;
  box-shadow: 0 4px 16px rgb(0 0 0 / .25); white-space: nowrap; font-size: .82rem; line-height: 1.5; }
.t:hover > .tip, .t:focus > .tip { display: block; }
.head, .row { display: flex; position: relative; gap: 1rem; }
.head { gap: .4rem; padding-bottom: .2rem; }
.row { justify-content: space-between; padding: 0 .25rem; }
.row.chosen { font-weight: 700; }
.bar { position: absolute; inset: 1px auto 1px 0; background: var(--bar); border-radius: 3px; }
.name, .p { position: relative; }
.scale { display: inline-block; width: 12rem; height: .8rem; vertical-align: middle; border-radius: 3px;
  margin: 0 .4rem;
  background: linear-gradient(90deg, hsl(130 70% var(--light)), hsl(65 70% var(--light)), hsl(0 70% var(--light))); }
</style></head><body>
<h1>{title}</h1>
<p class="legend">expected (0 bits)<span class="scale"></span>surprising (10 bits or more) · prompts are underlined ·
hover a token for the most likely ones in its place</p>
{blocks}
<script>
// A tip that would leave the page on the right is moved left.
document.querySelectorAll('.t').forEach(token => token.addEventListener('mouseenter', () => {
  const tip = token.querySelector('.tip');
  if (!tip) return;
  tip.style.left = '0';
  const over = tip.getBoundingClientRect().right - document.documentElement.clientWidth + 8;
  if (over > 0) tip.style.left = -over + 'px';
}));
</script>
</body></html>
"""
