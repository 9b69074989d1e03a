"""What the benchmarks of models made out of dense ones share: running cadre, pieces of text, perplexities."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from common import head, machine, pin, run  # noqa: E402


def arguments(parser):
    parser.add_argument("--cadre", default=str(ROOT / "target/release/cadre"))
    parser.add_argument("-m", "--model", required=True, help="dense model")
    parser.add_argument("--data", type=Path, default=ROOT / ".cache/data/domains", help="folder made by domains.py")
    parser.add_argument("--domains", nargs="+", default=["math", "code", "medicine"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--look-chars", type=int, default=60_000, help="characters of a domain that are looked at")
    parser.add_argument("--judge-chars", type=int, default=12_000, help="characters of held-out text per domain")


class Bench:
    """A working folder with `NAME.look.jsonl` and `NAME.judge.jsonl` of every domain."""

    def __init__(self, args, folder):
        self.args, self.folder = args, Path(folder)
        for domain in args.domains:
            head(args.data / f"{domain}.train.jsonl", self.look(domain), args.look_chars)
            head(args.data / f"{domain}.heldout.jsonl", self.judge(domain), args.judge_chars)

    def look(self, domain):
        return self.folder / f"{domain}.look.jsonl"

    def judge(self, domain):
        return self.folder / f"{domain}.judge.jsonl"

    def run(self, *args):
        return run(self.args.cadre, *args)

    def nll(self, model, domain, *more):
        """Nats per token on the held-out text of `domain`."""
        said = self.run(
            "eval", "perplexity", "-m", model, "--data", self.judge(domain), "-c", 512, "-t", self.args.threads,
            "-o", "json", *more,
        )  # fmt: skip
        return json.loads(said)["nll"]


class Memory:
    """Numbers by name, in a file that outlives a stop."""

    def __init__(self, path):
        self.path = path
        self.found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def get(self, name, make):
        if name not in self.found:
            self.found[name] = make()
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.found), encoding="utf-8")
            partial.rename(self.path)
        return self.found[name]


def opened(parser, name):
    """Arguments of a benchmark that goes on after a stop, the machine, its working folder, and what has been measured."""
    folder = ROOT / ".cache/dense" / name
    parser.add_argument("--work", type=Path, default=folder, help="folder of what has been made and measured")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    host = machine(args.threads, pin(args.threads))
    args.work.mkdir(parents=True, exist_ok=True)
    return args, host, Bench(args, args.work), Memory(args.work / "nats.json")


def moments(values):
    mean = sum(values) / len(values)
    return mean, (sum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1)) ** 0.5
