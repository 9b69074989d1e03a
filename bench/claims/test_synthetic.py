"""Tests of recipes/data/synthetic: python3 -m unittest discover bench/claims"""

import importlib.machinery
import importlib.util
import json
import re
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


def documents(domain, size=20_000, split="train", seed="test"):
    return [json.loads(line) for line in synthetic.lines(domain, split, size, seed, synthetic.Language(seed))]


class Synthetic(unittest.TestCase):
    def test_the_same_names_give_the_same_text_and_others_give_other_text(self):
        for domain in synthetic.DOMAINS:
            self.assertEqual(documents(domain, 2000), documents(domain, 2000))
            self.assertNotEqual(documents(domain, 2000), documents(domain, 2000, split="heldout"))
            self.assertNotEqual(documents(domain, 2000), documents(domain, 2000, seed="other"))

    def test_every_character_has_a_difficulty_and_both_kinds_are_common(self):
        for domain in synthetic.DOMAINS:
            marks = ""
            for document in documents(domain):
                self.assertEqual(len(document["text"]), len(document["hard"]))
                self.assertTrue(document["text"].isascii())
                marks += document["hard"]
            self.assertEqual(set(marks), {"0", "1"})
            self.assertTrue(0.1 < marks.count("1") / len(marks) < 0.9, domain)

    def test_results_of_arithmetic_are_right(self):
        text = "".join(document["text"] for document in documents("arithmetic"))
        statements = text.split(";")[:-1]
        self.assertGreater(len(statements), 500)
        for statement in statements:
            a, sign, b, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(-?\d+)", statement).groups()
            self.assertEqual({"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign], int(result))

    def test_brackets_close_and_have_their_number_of_items(self):
        innermost = re.compile(r"\([^][(){},],[^][(){},]\)|\[[^][(){},],[^][(){},],[^][(){},]\]|\{[^][(){},]\}")
        for document in documents("brackets"):
            for statement in document["text"].split(";")[:-1]:
                value = re.fullmatch(r"let [a-h]=(.*)", statement).group(1)
                while len(value) > 1:
                    value, count = innermost.subn("a", value)
                    self.assertTrue(count, statement)

    def test_answers_stand_before_their_questions(self):
        for document in documents("recall"):
            for episode in document["text"].split(";")[:-1]:
                table, *questions = episode.split("?")
                self.assertEqual((len(table.split(",")), len(questions)), (3, 2))
                for question in questions:
                    self.assertIn(question, table.split(","))

    def test_easy_characters_of_words_follow_from_the_two_words_before(self):
        text = hard = ""
        for document in documents("words", 5000):
            text, hard = text + document["text"], hard + document["hard"]
        words = [(found.start(), found.group()) for found in re.finditer(r"[a-z]+", text)]
        for (_, first), (_, second), (start, word) in zip(words, words[1:], words[2:]):
            candidates = LANGUAGE.following(first, second)
            self.assertIn(word, candidates)
            for at in range(len(word)):
                known = {other[at : at + 1] for other in candidates if other[:at] == word[:at]}
                self.assertEqual(hard[start + at], "1" if len(known) > 1 else "0")

    def test_mixed_text_has_all_domains_close_together(self):
        lines = [json.loads(line) for line in synthetic.mixed_lines(2000, "test", LANGUAGE)]
        self.assertEqual([line["domain"] for line in lines[:5]], [*synthetic.DOMAINS, synthetic.DOMAINS[0]])
        self.assertLess(max(len(line["text"]) for line in lines), 160)


if __name__ == "__main__":
    unittest.main()
