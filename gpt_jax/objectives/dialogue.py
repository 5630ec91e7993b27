"""Dialogue: turns of several roles as one sequence, the loss on what the chosen roles say.

A dialogue is EOT marker text EOT marker text EOT ...: `template` makes the marker that opens a role's turn, and EOT
ends it. Of a chosen role's turn the text and the EOT after it are predicted, from the first token to the last: what the
model must say, and when it must stop. Markers and other roles are only read. Generation goes on from all turns before
the last and the last one's marker.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.data.formats import Row, TaskInfo
from gpt_jax.errors import UserError, choose
from gpt_jax.objectives.base import Host, check_options, special_id
from gpt_jax.objectives.supervised import PromptRows, Supervised
from gpt_jax.options import option

_SPECIAL = re.compile(r"<\|([^|]+)\|>")


@dataclasses.dataclass(frozen=True)
class DialogueRows(PromptRows):
    """Rows of dialogues (an ExampleRows).

    Attributes:
      roles: whose turns are predicted. template: of markers, see `marker`. specials: ids of the special tokens by name.
    """

    kind: str = "dialogue"
    roles: tuple[str, ...] = ("assistant",)
    template: str = "\n{role}: "
    specials: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def marker(self, role: str, tokenizer: Any) -> list[int]:
        """Returns the tokens that open a role's turn: '{role}' is its name, '<|name|>' a special token."""
        ids = []
        for number, part in enumerate(_SPECIAL.split(self.template)):  # text, special, text, ...
            filled = part.replace("{role}", role)  # after the split: a role's name makes no special token of text
            if filled:
                ids += [special_id(self.specials, filled)] if number % 2 else tokenizer.encode(filled).tolist()
        return ids

    def prompt(self, example: Any, tokenizer: Any) -> list[int]:
        return self._laid_out(example.turns[:-1], example.turns[-1][0], tokenizer)[0]

    def encode(self, example: Any, task: TaskInfo, tokenizer: Any) -> list[Row]:
        for role in self.roles if task.labels else ():
            choose("a role of objective.roles", role, task.labels)
        role, text = example.turns[-1]
        prompt, wanted = self._laid_out(example.turns[:-1], role, tokenizer)
        target = [*tokenizer.encode(text).tolist(), self.eot]
        return [self.row(prompt, target, [*wanted, *[role in self.roles] * len(target)])]

    def check(self, examples: Sequence[Any]) -> None:
        """Raises UserError for a chosen role that none of the examples has, naming those that they have."""
        found = sorted({role for example in examples for role, _ in example.turns})
        for role in self.roles:
            choose("a role of objective.roles", role, found)

    def _laid_out(self, turns: Sequence[tuple[str, str]], last: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
        """Returns EOT, the turns and the marker of the role `last`; and which of these tokens are predicted."""
        ids, wanted = [self.eot], [False]
        for role, text in turns:
            marker, said = self.marker(role, tokenizer), [*tokenizer.encode(text).tolist(), self.eot]
            ids += [*marker, *said]
            wanted += [False] * len(marker) + [role in self.roles] * len(said)
        marker = self.marker(last, tokenizer)
        return [*ids, *marker], [*wanted, *[False] * len(marker)]


@dataclasses.dataclass(frozen=True)
class Dialogue(Supervised):
    """Cross-entropy of the turns of chosen roles; one term, "lm", and the metric "nll". Batch: as Supervised's."""

    roles: tuple[str, ...] = option(("assistant",), "whose turns are predicted")
    template: str = option("\n{role}: ", "opens a turn; '{role}' is its role, '<|name|>' a special token")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask != "causal":
            raise UserError("objective.mask is 'prefix', under which earlier turns would see what they must predict.")
        if not self.roles or isinstance(self.roles, str):
            raise UserError(f"objective.roles is {self.roles!r}; name one role or more, such as ('assistant',).")
        if "{role}" not in self.template:
            raise UserError(f"objective.template is {self.template!r}, without '{{role}}': turns would look alike.")

    @classmethod
    def rows(cls, options: Mapping[str, Any], host: Host) -> DialogueRows:
        own = cls(model=None, **check_options(cls, options))  # for the defaults
        return DialogueRows(
            eot=host.special("eot"),
            length=host.context_length,
            loss_on=own.loss_on,
            max_new=own.max_new,
            bidirectional=False,
            roles=own.roles,
            template=own.template,
            specials=host.specials,
        )
