"""Names of the tests under a memory limit.

tg64: 64 tokens, one after the other, after as many that are not measured. pp512: a prompt of 512 tokens, after one that is not
measured. first32: from the start of loading, with nothing of the file cached, to the first token after a prompt of 32.
"""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tests_spec  # noqa: E402

NAME = re.compile(r"(tg|pp|first)([1-9][0-9]*)")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SEED = 4


@dataclass(frozen=True)
class Test:
    """One test."""

    name: str
    kind: str
    count: int

    @property
    def shape(self):
        """The same sizes as a speed test of the other benchmarks."""
        return tests_spec.parse(f"{'tg' if self.kind == 'tg' else 'pp'}{self.count}")

    @property
    def is_time(self):
        """Whether seconds are what counts; tokens per second otherwise."""
        return self.kind == "first"


def parse(name):
    """The test of a name; ValueError when it is none."""
    found = NAME.fullmatch(name)
    if not found:
        raise ValueError(f"{name!r} is no test; such as tg64, pp512, first32")
    return Test(name, found.group(1), int(found.group(2)))


def first_text(count):
    """A text of `count` tokens: the files' vocabulary spells bytes, and merges none of these."""
    draw = random.Random(SEED)
    return "".join(draw.choice(LETTERS) for _ in range(count))


def first_tokens(count):
    """The ids of that text."""
    return list(first_text(count).encode())
