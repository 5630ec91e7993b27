"""Mistakes of the person at the keyboard, told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake a user can mend: `gpt-jax` prints the message without a traceback and exits with 1.

    The message is one sentence: what was wrong, the value, what is allowed.
    """

    exit_code = 1


class Unavailable(UserError):
    """Something that may well be there the next time (a host that is still starting): exits with 75, 'run me again'."""

    exit_code = 75


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns ' (did you mean X?)' for the closest allowed name, or '' if none is close."""
    close = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def choose(what: str, value: str, allowed: Iterable[str]) -> str:
    """Returns `value` if it is allowed; else raises a UserError naming it and the choices."""
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"{what} is {value!r}{nearest(value, allowed)}; allowed: {', '.join(map(str, allowed))}.")
    return value
