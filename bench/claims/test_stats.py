"""Tests of stats.py and of what run.py makes of records: python3 -m unittest discover bench/claims"""

import json
import math
import sys
import tempfile
import types
import unittest
import unittest.mock
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import claims
import probes
import report
import speed
import stats
import values
from stats import FAILS, HOLDS, UNDECIDED


def differences(*values):
    return dict(enumerate(values, 1))


class Rule(unittest.TestCase):
    def test_all_of_three_or_four_must_agree(self):
        self.assertEqual(stats.verdict(differences(-0.1, -0.2, -0.001), -1), HOLDS)
        self.assertEqual(stats.verdict(differences(-0.1, -0.2, 0.001), -1), FAILS)
        self.assertEqual(stats.verdict(differences(-1, -1, -1, 1), -1), FAILS)
        self.assertEqual(stats.verdict(differences(1, 1, 1, 1), 1), HOLDS)

    def test_four_of_five_are_enough_and_three_are_not(self):
        self.assertEqual(stats.verdict(differences(-1, -1, -1, -1, 5), -1), HOLDS)
        self.assertEqual(stats.verdict(differences(-1, -1, -1, 1, 5), -1), FAILS)
        self.assertEqual([stats.needed(n) for n in range(3, 11)], [3, 4, 4, 5, 6, 7, 8, 8])

    def test_two_seeds_decide_nothing(self):
        self.assertEqual(stats.verdict(differences(-1, -1), -1), UNDECIDED)
        self.assertEqual(stats.verdict({}, -1), UNDECIDED)

    def test_equal_is_not_less_and_what_is_not_a_number_agrees_with_nothing(self):
        self.assertEqual(stats.verdict(differences(-1, -1, 0.0), -1), FAILS)
        self.assertEqual(stats.verdict(differences(-1, -1, math.nan), -1), FAILS)
        self.assertEqual(stats.verdict(differences(-1, -1, -math.inf), -1), FAILS)

    def test_a_margin_is_how_far_on_the_wrong_side_is_still_right(self):
        self.assertEqual(stats.verdict(differences(0.009, -0.3, 0.0), -1, 0.01), HOLDS)
        self.assertEqual(stats.verdict(differences(0.011, -0.3, 0.0), -1, 0.01), FAILS)
        self.assertEqual(stats.verdict(differences(0.2, 0.3, 0.4), 1, -0.1), HOLDS)
        self.assertEqual(stats.verdict(differences(0.2, 0.3, 0.05), 1, -0.1), FAILS)

    def test_a_claim_of_several_checks_needs_all_of_them(self):
        self.assertEqual(stats.whole([HOLDS, HOLDS]), HOLDS)
        self.assertEqual(stats.whole([HOLDS, UNDECIDED, FAILS]), FAILS)
        self.assertEqual(stats.whole([HOLDS, UNDECIDED]), UNDECIDED)
        self.assertEqual(stats.whole([]), UNDECIDED)


class Pairs(unittest.TestCase):
    def test_only_seeds_that_both_have_are_compared(self):
        self.assertEqual(stats.paired({1: 3.0, 2: 5.0, 4: 1.0}, {2: 4.0, 1: 1.0, 3: 9.0}), {1: 2.0, 2: 1.0})

    def test_summary(self):
        self.assertEqual(stats.summary([1.0, 2.0, 3.0]), {"n": 3, "mean": 2.0, "sd": 1.0})
        self.assertIsNone(stats.summary([1.0])["sd"])


class Measures(unittest.TestCase):
    def test_ranks_share_ties(self):
        self.assertEqual(stats.ranks([10, 30, 20, 20]), [1, 4, 2.5, 2.5])

    def test_spearman_of_worked_examples(self):
        self.assertAlmostEqual(stats.spearman([1, 2, 3, 4], [10, 20, 30, 400]), 1)
        self.assertAlmostEqual(stats.spearman([1, 2, 3, 4], [4, 3, 2, 1]), -1)
        # Ranks 1 2 3 4 5 and 1 3 2 5 4: 1 - 6 * 4 / (5 * 24).
        self.assertAlmostEqual(stats.spearman([1, 2, 3, 4, 5], [1, 3, 2, 5, 4]), 0.8)
        self.assertEqual(stats.spearman([1, 1, 1], [1, 2, 3]), 0)
        with self.assertRaises(ValueError):
            stats.spearman([1], [1])

    def test_jensen_shannon_of_equal_and_of_disjoint_distributions(self):
        self.assertAlmostEqual(stats.jensen_shannon([[0.5, 0.5], [0.5, 0.5]]), 0)
        self.assertAlmostEqual(stats.jensen_shannon([[1, 0], [0, 1]]), 1)
        self.assertAlmostEqual(stats.jensen_shannon([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), 2)


def record(arm, seed, nll, steps=600, **more):
    return {
        "arm": arm, "seed": seed, "steps": steps, "data": "synthetic", "data_sha256": "1", "set": list(claims.ARMS[arm].set),
        "recipe_sha256": claims.meaning(claims.ARMS[arm]), "commit": "abc", "step_seconds": 0.1, "machine": {"threads": 2}, "others": 0.0,
        "missing": {}, "values": {"nll": nll} | more,
    }  # fmt: skip


class Records(unittest.TestCase):
    CLAIM = claims.Claim(
        "sparse", "", "", (claims.nll("top2", "dense", "a"), claims.nll("z-loss", "dense", "b"), claims.nll("top2", "z-loss", "c", margin=0.2))
    )

    def records(self):
        losses = {"dense": (1.2, 1.3, 1.25), "z-loss": (1.1, 1.2, 1.3), "top2": (1.0, 1.1, 1.2)}
        return [record(arm, seed, loss) for arm, three in losses.items() for seed, loss in enumerate(three, 1)]

    def test_verdicts_of_a_claim(self):
        found, steps, used = report.by_arm(self.records(), self.CLAIM)
        self.assertEqual((steps, len(used)), (600, 9))
        self.assertEqual([report.judged(check, found)["verdict"] for check in self.CLAIM.checks], [HOLDS, FAILS, HOLDS])
        self.assertEqual(report.verdict_of(self.CLAIM, found), FAILS)

    def test_the_newest_record_of_a_run_counts_and_runs_of_other_lengths_do_not(self):
        records = self.records() + [record("z-loss", 3, 1.2), record("z-loss", 1, 9.0, steps=50)]
        found, _, _ = report.by_arm(records, self.CLAIM)
        self.assertEqual(report.verdict_of(self.CLAIM, found), HOLDS)

    def test_records_of_other_recipes_and_of_older_text_do_not_count(self):
        stale = [one | {"recipe_sha256": "0", "values": {"nll": 9.0}} for one in self.records()]
        older = [one | {"data_sha256": "0", "values": {"nll": 9.0}} for one in self.records()]
        speed_of = {"kind": "speed", "arm": "top2", "recipe_sha256": "0", "step_seconds": 1.0}
        found, _, used = report.by_arm(older + self.records() + stale + [speed_of], self.CLAIM)
        self.assertEqual((len(used), found["top2"][1]["nll"]), (9, 1.0))

    def test_a_seed_that_is_missing_leaves_it_open(self):
        records = [one for one in self.records() if (one["arm"], one["seed"]) != ("top2", 2)]
        found, _, _ = report.by_arm(records, self.CLAIM)
        self.assertEqual(report.judged(self.CLAIM.checks[0], found)["verdict"], UNDECIDED)

    def test_another_measure_and_a_factor_of_the_other_side(self):
        check = claims.Check("", "part.consistency", "thor-5", claims.LESS, "thor-0", factor=0.2)
        found = {"thor-5": {1: {"part.consistency": 0.1}}, "thor-0": {1: {"part.consistency": 1.0}}}
        self.assertAlmostEqual(report.judged(check, found)["differences"][0], 0.1 - 0.2)
        check = claims.Check("", "picks", "top-p", claims.LESS, "top-p/picks.start")
        self.assertEqual(report.judged(check, {"top-p": {1: {"picks": 2.0, "picks.start": 5.0}}})["differences"], [-3.0])

    def test_the_document_names_every_claim(self):
        text = report.document(self.records())
        for claim in claims.CLAIMS:
            self.assertIn(f"## {claim.name}\n", text)
        self.assertIn("not testable at this size", text)
        self.assertIn("not yet measured", report.document([]))
        found, _, _ = report.by_arm(self.records(), self.CLAIM)
        line = "| a | `top2` 1.1000 | `dense` 1.2500 | -0.1500 (-0.2000 to -0.0500) | 3 | holds |"
        self.assertEqual(report.row(self.CLAIM.checks[0], found), line)


class Claims(unittest.TestCase):
    def test_comments_do_not_change_what_a_recipe_means(self):
        with tempfile.TemporaryDirectory() as folder, unittest.mock.patch.object(claims, "RECIPES", Path(folder)):
            path = Path(folder) / "top2.toml"
            path.write_text("# one\n[train]\nsteps = 3\n", encoding="utf-8")
            plain, changed = claims.Arm("a", "top2"), claims.Arm("a", "top2", ("train.steps=4",))
            first = claims.meaning(plain)
            self.assertNotEqual(first, claims.meaning(changed))
            path.write_text("# two\n\n[train]\n  steps = 3\n", encoding="utf-8")
            self.assertEqual(first, claims.meaning(plain))
            path.write_text("[train]\nsteps = 5\n", encoding="utf-8")
            self.assertNotEqual(first, claims.meaning(plain))

    def test_what_every_comparison_stands_beside(self):
        for claim in claims.CLAIMS:
            self.assertEqual([claims.ARMS[name].recipe for name in claim.baselines if name != "micro"][:2], ["dense", "switch"], claim.name)
            self.assertEqual(len(claim.baselines), 4)

    def test_teachers_come_before_students(self):
        names = [arm.name for arm in claims.arms_of(claims.claim_named("mos"))]
        self.assertLess(names.index("mos-teacher"), names.index("mos-staged"))
        self.assertEqual(len(names), len(set(names)))

    def test_equal_runs_have_one_name(self):
        kinds = [claims.meaning(arm) for arm in claims.ARMS.values()]
        self.assertEqual(len(kinds), len(set(kinds)))

    def test_every_recipe_is_used(self):
        recipes = {path.stem for path in claims.RECIPES.glob("*.toml")}
        self.assertLessEqual(recipes, {arm.recipe for arm in claims.ARMS.values()})
        self.assertLessEqual({"dense", "top2"}, recipes)

    def test_a_claim_waits_for_recipes_that_do_not_exist_and_then_trains_nothing(self):
        claim = claims.Claim("x", "", "", (claims.nll("x", "dense", ""),))
        claims.ARMS["x"] = claims.Arm("x", "no-such-recipe")
        try:
            self.assertEqual(claims.waits_for(claim), ["no-such-recipe"])
            self.assertEqual(claims.arms_of(claim), [])
            self.assertEqual(report.verdict_of(claim, {}), "no recipe yet")
        finally:
            del claims.ARMS["x"]

    def test_every_claim_has_checks_or_says_why_not(self):
        for claim in claims.CLAIMS:
            self.assertNotEqual(bool(claim.checks), bool(claim.untestable), claim.name)


class Speed(unittest.TestCase):
    """Jobs are a plan's view of runs: an arm, a seed, steps, and whether there is a record."""

    def job(self, arm, seed, steps=100, done=False):
        args = types.SimpleNamespace(threads=2, no_record=True)
        return types.SimpleNamespace(arm=claims.ARMS[arm], seed=seed, steps=steps, record=lambda: done or None, args=args)

    def test_shared_runs_count_once_and_recorded_ones_are_not_left(self):
        jobs = {"sparse": [self.job("dense", 1, done=True), self.job("top2", 1)], "deepseek": [self.job("top2", 1), self.job("deepseek", 1)]}
        times = {"dense": (3600.0, True), "top2": (60.0, True), "deepseek": (120.0, False)}
        chosen = [claims.claim_named(name) for name in jobs]
        lines = list(speed.plan(lambda claim: jobs[claim.name], chosen, lambda job: times[job.arm.name]))
        self.assertEqual(lines[1].split(), "sparse 2 2 1 61.0 61.0 over 45 minutes".split())
        self.assertEqual(lines[2].split(), "deepseek 2 2 0 3.0 2.0".split())
        self.assertEqual(lines[3], "3 runs, 1.1 hours in all, one at a time; 0.1 hours of it not recorded yet")
        self.assertTrue(lines[4].endswith("too slow: deepseek"))

    def test_an_idle_machine_tells_more_than_a_busy_one_and_another_recipe_tells_nothing(self):
        busy = [record("top2", seed, 1.0) | {"others": 0.5, "step_seconds": slow} for seed, slow in ((1, 0.9), (2, 0.6))]
        job = self.job("top2", 1)
        self.assertEqual(speed.seconds_of(job, busy, measure=False), (0.6 * speed.WITH_EVALUATION * 100, False))
        idle = [record("top2", 1, 1.0) | {"step_seconds": 0.2}]
        self.assertEqual(speed.seconds_of(job, busy + idle, measure=False), (0.2 * speed.WITH_EVALUATION * 100, True))
        self.assertIsNone(speed.seconds_of(job, [idle[0] | {"recipe_sha256": "0"}], measure=False))

    def test_what_others_take_is_a_share(self):
        with speed.Others() as others:
            pass
        self.assertGreaterEqual(others.share, 0.0)

    def test_tokens_of_a_step(self):
        usual = claims.ARMS["top2"]
        for arm in (usual, claims.ARMS["top2-pool"], claims.ARMS["switch-long"]):
            job = types.SimpleNamespace(arm=arm, recipe=claims.recipe_of(arm))
            self.assertEqual(speed.tokens_per_step(job), 2048, arm.name)


class Values(unittest.TestCase):
    def test_numbers_of_a_log(self):
        def step(at):
            layers = [{"layer": 0, "max_vio": 1.0, "picks": 4.0}, {"layer": 1, "max_vio": 3.0, "picks": 2.0 + (at < 6)}]
            return {"step": at, "loss": 1.0, "z": float(at), "layers": layers}

        evaluations = [{"step": at, "eval": {"a": {"nll": 2.0 - at / 20}, "b": {"nll": 1.0}}} for at in (5, 10, 20)]
        found = values.of_run([step(at) for at in range(1, 21)], evaluations)
        self.assertEqual((found["nll"], found["nll.a"], found["z"], found["max_vio"]), (1.0, 1.0, 19.5, 2.0))
        self.assertEqual((found["picks"], found["picks.start"], found["picks.first"], found["picks.last"]), (3.0, 3.5, 4.0, 2.0))
        self.assertEqual(found["nll@0.4"], (1.75 + 1.0) / 2)


class Probes(unittest.TestCase):
    def test_silence_zeroes_exactly_what_is_named(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            header = json.dumps({"a.up": {"data_offsets": [0, 2]}, "a.down": {"data_offsets": [2, 5]}}).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header + b"\1\2\3\4\5")
            probes.silence(path, ".down")
            self.assertEqual(path.read_bytes()[-5:], b"\1\2\0\0\0")
            with self.assertRaises(probes.Unavailable):
                probes.silence(path, ".absent")

    def test_difficulty_of_the_next_character_across_pieces_of_a_document(self):
        documents = [json.dumps({"hard": "0110"}), json.dumps({"hard": "01"})]
        # The context is 3: the first document became two sequences.
        found = probes.next_difficulties(documents, [0, 0, 0, 1, 2, 2], [0, 1, 2, 0, 0, 1])
        self.assertEqual(found, {(0, 0): "1", (0, 1): "1", (0, 2): "0", (2, 0): "1"})
        with self.assertRaises(probes.Unavailable):
            probes.next_difficulties([json.dumps({"hard": "01"})], [0, 0, 0], [0, 1, 2])


if __name__ == "__main__":
    unittest.main()
