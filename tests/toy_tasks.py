"""Tasks of a few made-up examples, named in configs by import path."""

import os
import signal
import time

from gpt_jax.tasks import Classify, Task, TextToText

COLOURS = ("red", "green", "blue")
CLOSED = ("yes", "no")


def colours(train: int = 24, valid: int = 7) -> Task:
    """Which colour does the text name?"""

    def split(first, count):
        def read():
            for i in range(first, first + count):
                label = COLOURS[(i * 7 + i // 3) % 3]
                yield Classify(f"{'very ' * (i % 4)}{label} no. {i}", label, where=f"colours:{i}")

        return read

    splits = {"train": split(0, train), "valid": split(1000, valid)}
    return Task("colours", "classify", ("accuracy",), splits, labels=COLOURS)


def pairs(train: int = 12, valid: int = 6) -> Task:
    """Are the two words the same?"""

    def split(first, count):
        def read():
            for i in range(first, first + count):
                a, b = f"w{i % 5}", f"w{(i * i) % 5}"
                yield Classify(a, CLOSED[a != b], text_b=b, where=f"pairs:{i}")

        return read

    splits = {"train": split(0, train), "valid": split(100, valid)}
    return Task("pairs", "classify", ("accuracy",), splits, labels=CLOSED)


def unlabelled() -> Task:
    """Classes without names."""
    return Task("unlabelled", "classify", ("accuracy",), {"train": lambda: [Classify("a", "b")]})


def reverse(train: int = 20, valid: int = 5, letters: int = 4) -> Task:
    """Spell a word backwards."""

    def split(first, count):
        def read():
            for i in range(first, first + count):
                word = "".join("abcdefgh"[(i * (j + 3) + j * j) % 8] for j in range(1 + i % letters))
                yield TextToText(f"{word}>", word[::-1], where=f"reverse:{i}")

        return read

    splits = {"train": split(0, train), "valid": split(3, valid)}
    return Task("reverse", "text_to_text", ("exact_match",), splits)


MOODS = {"glad": ("sun", "song", "bright", "smile"), "sad": ("rain", "tears", "dark", "sigh")}


def moods(train: int = 20, valid: int = 8, test: int = 8) -> Task:
    """Four words of one mood, with the small words between them."""

    def split(first, count):
        def read():
            for i in range(first, first + count):
                label = ("glad", "sad")[i % 2]
                words = [MOODS[label][(i * (j + 1) + j * j + i // 3) % 4] for j in range(4)]
                end = " today" if first else ""  # no text is in two splits
                yield Classify(
                    f"the {words[0]} and {words[1]} of {words[2]} {words[3]}{end}", label, where=f"moods:{i}"
                )

        return read

    splits = {"train": split(0, train), "valid": split(100, valid), "test": split(201, test)}
    return Task("moods", "classify", ("accuracy",), splits, labels=("glad", "sad"))


def fatal():
    """A reward of 0 for every answer, whose call number $FATAL_CALL of a process kills it, once $FATAL_AFTER exists."""
    calls = [0]

    def reward(answers, examples):
        calls[0] += 1
        if os.environ.get("FATAL_CALL") == str(calls[0]):
            while not os.path.exists(os.environ["FATAL_AFTER"]):  # a save that goes on in the background
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return [0.0] * len(answers)

    return reward
