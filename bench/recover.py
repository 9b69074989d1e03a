"""What tuning gives back: the embedded model with half of its experts merged or dropped, and with four fifths of their bytes
gone (MC-SMoE), each tuned on one domain for the same number of steps.

    recipes/data/nano && cargo build --release && python3 bench/recover.py --cadre target/release/cadre

For every domain of --domains: a recording of its training text, four smaller models, and `cadre tune --recover` on the
training text with the original as teacher, once for each seed, which decides the order of the text. Judged by nats per token
on held-out text that nothing has seen. Rows of the table:

- merged: `plan merge`, half of the experts, routers keep their rows (M-SMoE)
- dropped: `plan prune --method router-mass`, as many experts
- factors, rows by size: `plan factor --rank R --rest P`, tuned as it is
- factors, rows by gradient: `plan factor --rank R --rest 1`, tuned with `--rest P` (MC-SMoE as published)
- whole: the original, tuned in the same way

The loss is the published one (cross-entropy + 0.2 KL at temperature 2, routers held still) unless --loss default is given
(that of `cadre tune` without further options). Prints Markdown; a run that was interrupted goes on in --folder. Needs only
Python's standard library.
"""

import argparse
import json
import shutil
import statistics
import struct
from pathlib import Path

from common import head, run

ROOT = Path(__file__).resolve().parents[1]
LOSSES = {"published": ["--beta", "0.05", "--temperature", "2", "--freeze", "router"], "default": []}
ARMS = ["by gradient", "by size", "merged", "dropped", "whole"]


def expert_bytes(folder):
    """Bytes of the tensors of routed experts."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if ".mlp.experts." in name:
                start, end = entry["data_offsets"]
                total += end - start
    return total


class Task:
    """One domain: its text, its recording, and the smaller models."""

    def __init__(self, args, domain):
        self.args, self.domain = args, domain
        self.folder = args.folder / domain
        self.folder.mkdir(parents=True, exist_ok=True)
        self.train = self.folder / "train.jsonl"
        self.heldout = self.folder / "heldout.jsonl"
        recorded, trace = self.folder / "recorded.jsonl", self.folder / "t.parquet"
        head(args.data / f"{domain}.train.jsonl", self.train, args.train_chars)
        head(args.data / f"{domain}.train.jsonl", recorded, args.recorded_chars)
        head(args.data / f"{domain}.heldout.jsonl", self.heldout, args.eval_chars)
        if not trace.exists():
            self.run("trace", "--data", recorded, "-o", trace, "--logits")
        factor = ["--rank", args.rank, "--rest"]
        self.models = {
            "whole": args.model,
            "merged": self.made("merged", "merge", trace),
            "dropped": self.made("dropped", "prune", trace, "--method", "router-mass"),
            "by size": self.made("size", "factor", trace, *factor, args.rest),
            "by gradient": self.made("gradient", "factor", trace, *factor, "1"),
        }

    def run(self, command, *more):
        return run(self.args.cadre, command, "-m", self.args.model, *more)

    def made(self, name, kind, trace, *more):
        plan, out = self.folder / f"{name}.json", self.folder / name
        if not out.exists():
            run(self.args.cadre, "plan", kind, "--trace", trace, "--keep", self.args.keep, "-o", plan, *more)
            self.run("apply", "--plan", plan, "-o", out)
        return out

    def nll(self, model):
        """Nats per token on the held-out text, by the program that runs models."""
        text = run(self.args.cadre, "eval", "perplexity", "-m", model, "--data", self.heldout,
                   "-c", self.args.seq_len, "-t", self.args.threads, "-o", "json")
        return json.loads(text)["nll"]

    def tuned(self, arm, seed, loss):
        out = self.folder / f"run-{loss}-{arm.replace(' ', '-')}-{seed}"
        rest = ["--rest", self.args.rest] if arm == "by gradient" else []
        if not (out / "model").exists():
            run(self.args.cadre, "tune", "--recover", "-m", self.models[arm], "--teacher", self.args.model,
                "--data", self.train, "--heldout", self.heldout, "-o", out, "--steps", self.args.steps,
                "--batch-size", self.args.batch_size, "--seq-len", self.args.seq_len, "--lr", self.args.lr,
                "--seed", seed, "-t", self.args.threads, *LOSSES[loss], *rest)
            shutil.rmtree(out / "snapshots")
        return out / "model"


def table(task, args, loss):
    whole = expert_bytes(args.model)
    print(f"\n{task.domain}, {loss} loss, {args.steps} steps, {len(args.seeds)} seeds\n", flush=True)
    print("| model | bytes of experts gone | before | tuned |\n|---|---|---|---|", flush=True)
    for arm in args.arms:
        tuned = [task.tuned(arm, seed, loss) for seed in args.seeds]
        saved = 100 * (1 - expert_bytes(tuned[0]) / whole)
        losses = [task.nll(model) for model in tuned]
        spread = f" +- {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        before = task.nll(task.models[arm])
        print(f"| {arm} | {saved:.1f} % | {before:.3f} | {statistics.mean(losses):.3f}{spread} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cadre", default=str(ROOT / "target/release/cadre"))
    parser.add_argument("--model", type=Path, default=ROOT / "models/nano")
    parser.add_argument("--data", type=Path, default=ROOT / ".cache/data/nano")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache/recover")
    parser.add_argument("--domains", nargs="+", default=["german", "code", "dialogue"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--loss", nargs="+", choices=list(LOSSES), default=["published"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--keep", default="0.5")
    parser.add_argument("--rank", default="16")
    parser.add_argument("--rest", default="0.1")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--lr", default="1e-3")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train-chars", type=int, default=200_000)
    parser.add_argument("--recorded-chars", type=int, default=60_000)
    parser.add_argument("--eval-chars", type=int, default=10_000)
    args = parser.parse_args()
    for domain in args.domains:
        task = Task(args, domain)
        for loss in args.loss:
            table(task, args, loss)


if __name__ == "__main__":
    main()
