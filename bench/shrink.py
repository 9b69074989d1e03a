"""What plans cost on the embedded model: every way to drop or merge experts, on text that no plan has seen.

    recipes/data/nano && cargo build --release && python3 bench/shrink.py --cadre target/release/cadre

For every domain of nano's data: a recording of the domain's training text, plans that keep a part of the experts, and the
perplexity of each output on the domain's held-out text (`cadre apply --data`). Beside the methods: `random` with several
seeds, and the best method with recordings of the other domains. Prints Markdown; nothing is trained afterwards. Needs only
Python's standard library.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from common import head, run

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ["code", "dialogue", "german", "math", "prose"]
PRUNES = ["router-mass", "frequency", "reap", "uncurl"]
MERGES = ["m-smoe", "mean"]


class Bench:
    def __init__(self, args, folder):
        self.args, self.folder = args, Path(folder)

    def run(self, *args):
        return run(self.args.cadre, *args)

    def trace(self, domain):
        text, trace = self.folder / f"{domain}.train.jsonl", self.folder / f"{domain}.parquet"
        head(self.args.data / f"{domain}.train.jsonl", text, self.args.train_chars)
        self.run("trace", "--data", text, "-o", trace, "--logits", "--norms", "-t", self.args.threads)
        head(self.args.data / f"{domain}.heldout.jsonl", self.folder / f"{domain}.jsonl", self.args.eval_chars)
        return trace

    def cost(self, trace, domain, keep, kind, method, *more):
        """Perplexity before and after, divergence, and agreement on the held-out text of `domain`."""
        plan, out = self.folder / "plan.json", self.folder / "out"
        self.run("plan", kind, "--trace", trace, "--keep", keep, "--method", method, "-o", plan, *more)
        data = self.folder / f"{domain}.jsonl"
        self.run("apply", "--plan", plan, "-o", out, "--data", data, "-t", self.args.threads)
        for file in out.iterdir():
            file.unlink()
        out.rmdir()
        total = json.loads((self.folder / "out.quality.json").read_text(encoding="utf-8"))["total"]
        return total["perplexity_before"], total["perplexity_after"], total["kl"]



def table(bench, traces, keep):
    """One line per method; perplexity per domain."""
    lines, before = [], {}
    seeds = range(1, bench.args.seeds + 1)
    random = {}
    for domain in DOMAINS:
        runs = [bench.cost(traces[domain], domain, keep, "prune", "random", "--seed", seed) for seed in seeds]
        before[domain] = runs[0][0]
        random[domain] = [run[1] for run in runs]
    for kind, methods in (("prune", PRUNES), ("merge", MERGES)):
        for method in methods:
            row = {d: bench.cost(traces[d], d, keep, kind, method)[1] for d in DOMAINS}
            better = [row[d] < statistics.mean(random[d]) - statistics.stdev(random[d]) for d in DOMAINS]
            lines.append((method, [f"{row[d]:.1f}" for d in DOMAINS], sum(better)))
    others = []
    for domain in DOMAINS:
        runs = [bench.cost(traces[o], domain, keep, "prune", "router-mass")[1] for o in DOMAINS if o != domain]
        others.append(f"{statistics.mean(runs):.1f}")
    print(f"\n| keep {keep} | {' | '.join(DOMAINS)} | domains below random - 1 std |\n|---|{'---|' * len(DOMAINS)}---|")
    print(f"| whole model | {' | '.join(f'{before[d]:.1f}' for d in DOMAINS)} | |")
    for method, row, better in lines:
        print(f"| {method} | {' | '.join(row)} | {better} of {len(DOMAINS)} |")
    print(f"| router-mass, recorded on the other domains (mean) | {' | '.join(others)} | |")
    shown = [f"{statistics.mean(random[d]):.1f} +- {statistics.stdev(random[d]):.1f}" for d in DOMAINS]
    print(f"| random, {len(list(seeds))} seeds | {' | '.join(shown)} | |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cadre", default=str(ROOT / "target/release/cadre"))
    parser.add_argument("--data", type=Path, default=ROOT / ".cache/data/nano")
    parser.add_argument("--keep", nargs="+", default=["0.5", "0.25"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train-chars", type=int, default=60_000)
    parser.add_argument("--eval-chars", type=int, default=30_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        traces = {domain: bench.trace(domain) for domain in DOMAINS}
        for keep in args.keep:
            table(bench, traces, keep)


if __name__ == "__main__":
    main()
