"""Tests of recipes/data/synthetic: python3 -m unittest discover bench/claims"""

import collections
import importlib.machinery
import importlib.util
import math
import sys
import unittest
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "data" / "synthetic"


def load():
    """The script as a module, without leaving compiled code beside it."""
    sys.dont_write_bytecode = True
    loader = importlib.machinery.SourceFileLoader("synthetic", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("synthetic", loader))
    loader.exec_module(module)
    return module


synthetic = load()
LANGUAGE = synthetic.Language("test")
LINE = 1 + synthetic.LETTERS_OF_A_LINE


def documents(domain, size=20_000, split="train", seed="test"):
    language = LANGUAGE if seed == "test" else synthetic.Language(seed)
    return list(synthetic.documents(domain, split, size, seed, language))


class Synthetic(unittest.TestCase):
    def test_the_same_names_give_the_same_text_and_others_give_other_text(self):
        for domain in synthetic.DOMAINS:
            self.assertEqual(documents(domain, 2000), documents(domain, 2000))
            self.assertNotEqual(documents(domain, 2000), documents(domain, 2000, split="heldout"))
            self.assertNotEqual(documents(domain, 2000), documents(domain, 2000, seed="other"))

    def test_the_generator_stays_what_it_is(self):
        # SplitMix64's published sequence for the seed 0 begins with these.
        draw = synthetic.Draw("any")
        draw.state = 0
        self.assertEqual([draw.below(1 << 64) for _ in range(2)], [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4])

    def test_capitals_say_which_domain_it_is(self):
        capitals = set(synthetic.CAPITALS.values())
        self.assertEqual(len(capitals), len(synthetic.DOMAINS))
        self.assertFalse(capitals & set(synthetic.LETTERS))
        self.assertEqual(len(set(synthetic.LETTERS)), 48)

    def test_lines_follow_the_tables_and_difficulty_says_where_they_decide(self):
        for domain in synthetic.DOMAINS:
            for document in documents(domain, 5000):
                text, hard = document["text"], document["hard"]
                self.assertEqual((len(text) % LINE, len(hard)), (0, len(text)))
                for at, (character, mark) in enumerate(zip(text, hard)):
                    if at % LINE == 0:
                        self.assertEqual((character, mark), (synthetic.CAPITALS[domain], "0" if at else "1"))
                        continue
                    candidates = LANGUAGE.following(domain, text[max(0, at - 2) : at])
                    self.assertIn(character, candidates)
                    self.assertEqual(mark, "1" if len(candidates) > 1 else "0")

    def test_entries_are_as_many_letters_as_they_should_be_and_all_different(self):
        sizes = collections.Counter()
        for first in synthetic.LETTERS:
            for second in synthetic.LETTERS:
                candidates = LANGUAGE.following("north", first + second)
                self.assertEqual(len(set(candidates)), len(candidates))
                sizes[len(candidates)] += 1
        self.assertEqual(set(sizes), set(synthetic.CANDIDATES))
        self.assertGreater(min(sizes.values()), 0.3 * sum(sizes.values()))
        north, south = ([LANGUAGE.following(domain, a + "b") for a in "abcd"] for domain in ("north", "south"))
        self.assertNotEqual(north, south)

    def test_most_of_a_table_comes_up(self):
        # What is never seen cannot be learned, and what is always the same needs no room.
        text = "".join(document["text"] for document in documents("east", 100_000))
        seen = collections.Counter(text[at - 2 : at] for at in range(2, len(text)) if at % LINE > 2)
        self.assertGreater(len(seen), 0.6 * len(synthetic.LETTERS) ** 2)
        self.assertLess(max(seen.values()), 0.01 * len(text))

    def test_both_kinds_of_characters_are_common_and_nats_are_those_of_the_choices(self):
        for domain in synthetic.DOMAINS:
            made = documents(domain)
            hard = sum(document["hard"].count("1") for document in made) / sum(len(document["text"]) for document in made)
            self.assertTrue(0.4 < hard < 0.9, domain)
        line = synthetic.document("west", synthetic.Draw("one line"), LANGUAGE, 1)
        text, choices = line["text"], 1
        for at in range(1, len(text)):
            choices *= len(LANGUAGE.following("west", text[max(0, at - 2) : at]))
        self.assertAlmostEqual(line["nats"], math.log(choices))

    def test_mixed_text_has_all_domains_close_together(self):
        pieces = list(synthetic.mixed(2000, "test", LANGUAGE))
        self.assertEqual([piece["domain"] for piece in pieces[:5]], [*synthetic.DOMAINS, synthetic.DOMAINS[0]])
        self.assertEqual({len(piece["text"]) for piece in pieces}, {synthetic.PIECE_BYTES})


if __name__ == "__main__":
    unittest.main()
