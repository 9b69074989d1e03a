"""Names of speed tests, as llama-bench writes them.

pp512: a prompt of 512 tokens. tg64: 64 tokens, one after the other. tg64x8: 64 steps of 8 sequences together (an addition).
@d256 behind a name: after 256 tokens that are not measured.
"""

import re
from dataclasses import dataclass

NAME = re.compile(r"(pp|tg)([1-9][0-9]*)(?:x([1-9][0-9]*))?(?:@d([0-9]+))?")


@dataclass(frozen=True)
class Test:
    """One test."""

    n_prompt: int
    n_gen: int
    n_seqs: int
    n_depth: int

    @property
    def n_tokens(self):
        """Tokens that count, of all sequences."""
        return (self.n_prompt or self.n_gen) * self.n_seqs

    @property
    def n_ctx(self):
        """Tokens that one sequence holds at the end."""
        return self.n_depth + self.n_prompt + self.n_gen


def parse(name):
    """The test of a name; ValueError when it is none."""
    found = NAME.fullmatch(name)
    if not found:
        raise ValueError(f"{name!r} is no test; such as pp512, tg64, tg64x8, tg64@d512")
    kind, n, seqs, depth = found.groups()
    n, seqs, depth = int(n), int(seqs or 1), int(depth or 0)
    return Test(n if kind == "pp" else 0, n if kind == "tg" else 0, seqs, depth)
