"""Read-ME on a real dense model: what its experts and its router before the layers are worth, and what serving gains.

    recipes/data/smollm2.sh && python3 bench/dense/domains.py --out .cache/data/domains math=.. code=.. medicine=..
    cadre convert -m .cache/data/models/SmolLM2-135M-Instruct.Q4_1.gguf --dtype bf16 -o .cache/data/models/SmolLM2-135M-Instruct
    cadre train recipes/read-me/smollm2-router.toml && cadre train recipes/read-me/smollm2-experts.toml
    python3 bench/dense/read_me.py -m .cache/data/models/SmolLM2-135M-Instruct

Prints Markdown and appends a record to bench/record/read-me.jsonl: nats per token on held-out text of every domain (the dense
model; every token sent to the expert of its domain; picks of the router; the same after tuning), where the router sends the
tokens of a domain, one decoding run per way of reading experts ahead, and the different experts that a step of a server needs
(bench/steps.py). Needs Python 3.9 or newer, nothing else; Linux.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bed import ROOT, Bench, Memory, arguments

from common import append_record, machine, now, pin, revision, say, spread, warn_if_busy

SIDES = ["off", "edgemoe", "popularity", "previous", "exact"]


def nats(bench, args):
    """Nats per token by row of the table, one number for each domain."""
    rows = {"dense": [bench.nll(args.model, d) for d in args.domains]}
    forced = [
        [bench.nll(args.router, d, "--force-experts", f"*:{expert}") for d in args.domains]
        for expert in range(len(args.domains))
    ]
    rows["expert of the domain"] = [forced[at][at] for at in range(len(args.domains))]
    rows["best expert of another domain"] = [
        min(row[at] for expert, row in enumerate(forced) if expert != at) for at in range(len(args.domains))
    ]
    rows["picks of the router"] = [bench.nll(args.router, d) for d in args.domains]
    rows["all but the router tuned"] = [bench.nll(args.tuned, d) for d in args.domains]
    return rows


def shares(bench, args):
    """For every domain, the share of its tokens that the router sends to each expert."""
    trace, profile = bench.folder / "picks.parquet", bench.folder / "profile.json"
    data = [x for d in args.domains for x in ("--data", bench.judge(d))]
    bench.run("trace", "-m", args.tuned, *data, "-c", 512, "-t", args.threads, "-o", trace)
    bench.run("trace", "show", trace, "--profile", profile)
    found = json.loads(profile.read_text(encoding="utf-8"))
    # All layers have the same picks.
    return dict(zip(found["domains"], found["layers"][0]["shares"]))


def decode(bench, args, side, text):
    said = bench.run(
        "run", "-m", args.tuned, "-p", text, "-n", args.tokens, "--temp", 0, "-c", 512, "-t", args.threads,
        "--mem-budget", args.mem_budget, "--read-ahead", side, "--stats", "-o", "json",
    )  # fmt: skip
    return json.loads(said)["streaming"]


def decoding(bench, args):
    """By way of reading ahead: medians over rounds of the sums over domains."""
    texts = []
    for domain in args.domains:
        with open(bench.judge(domain), encoding="utf-8") as lines:
            texts.append(json.loads(lines.readline())["text"][:300])
    found = {side: [] for side in SIDES}
    for index in range(args.rounds):
        # Every other round backwards, so that no side is always after the same one.
        for side in SIDES if index % 2 == 0 else SIDES[::-1]:
            runs = [decode(bench, args, side, text) for text in texts]
            n = sum(run["n_tokens"] for run in runs)

            def of(key):
                return sum(run[key] * run["n_tokens"] for run in runs) / n

            lookups = sum(run["lookups"] for run in runs)
            found[side].append(
                {
                    "ms_per_token": of("ms_per_token"),
                    "stall_ms_per_token": of("stall_ms_per_token"),
                    "mb_per_token": of("bytes_read_per_token") / 1e6,
                    "hit_rate": sum(run["hit_rate"] * run["lookups"] for run in runs) / lookups,
                    "in_vain": sum(run["wasted"] for run in runs) / max(sum(run["reads"] for run in runs), 1),
                    "foreseen": runs[0]["foreseen"],
                }
            )
            say(f"round {index + 1}: {side} {found[side][-1]['ms_per_token']:.1f} ms per token")
    keys = ["ms_per_token", "stall_ms_per_token", "mb_per_token", "hit_rate", "in_vain"]
    result = {side: {key: spread([one[key] for one in rounds], 4) for key in keys} for side, rounds in found.items()}
    for side, rounds in found.items():
        result[side]["foreseen"] = rounds[0]["foreseen"]
    return result


def steps(args):
    """What `bench/steps.py` prints for the tuned model."""
    data = [x for d in args.domains for x in ("--data", str(args.data / f"{d}.heldout.jsonl"))]
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "bench/steps.py"), "--cadre", args.cadre, "--model", args.tuned, *data,
            "--domains", ",".join(args.domains), "--requests", str(args.requests), "--step", "4", "--tokens", "160",
            "--mem-budget", args.serve_budget, "--rounds", "3", "--threads", str(args.threads), "--chars", "300",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def table(record):
    domains = record["domains"]
    lines = [f"| nats per token | {' | '.join(domains)} |", f"|---|{'---|' * len(domains)}"]
    for name, row in record["nats"].items():
        lines.append(f"| {name} | {' | '.join(f'{x:.3f}' for x in row)} |")
    lines += ["", f"| tokens of | {' | '.join(f'expert of {d}' for d in domains)} |", f"|---|{'---|' * len(domains)}"]
    for domain, row in record["shares"].items():
        lines.append(f"| {domain} | {' | '.join(f'{100 * x:.0f} %' for x in row)} |")
    lines += [
        "",
        "| reading ahead | ms per token (extremes) | of it waiting for the disk | hits in memory | MB read per token | of the reads, in vain |",
        "|---|---|---|---|---|---|",
    ]
    for side, found in record["decoding"].items():
        time = found["ms_per_token"]
        lines.append(
            f"| `{side}` | {time['median']:.1f} ({time['min']:.1f} to {time['max']:.1f}) | {found['stall_ms_per_token']['median']:.2f} "
            f"| {100 * found['hit_rate']['median']:.1f} % | {found['mb_per_token']['median']:.2f} | {100 * found['in_vain']['median']:.0f} % |"
        )
    lines += ["", record["steps"].strip()]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments(parser)
    parser.add_argument("--router", default="runs/smollm2-router/model", help="what the first recipe leaves")
    parser.add_argument("--tuned", default="runs/smollm2-experts/model", help="what the second recipe leaves")
    parser.add_argument("--mem-budget", default="240MiB", help="of decoding")
    parser.add_argument("--serve-budget", default="420MiB", help="of serving; contexts of all requests are in it")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache/dense/read-me", help="folder of what has been measured")
    parser.add_argument("--tokens", type=int, default=96, help="that are decoded after each text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    host = machine(args.threads, pin(args.threads))
    warn_if_busy(host)
    args.work.mkdir(parents=True, exist_ok=True)
    memory = Memory(args.work / "found.json")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        record = {
            "date": now(), "commit": revision(), "machine": host, "model": Path(args.model).name, "domains": args.domains,
            "mem_budget": args.mem_budget, "tokens": args.tokens, "rounds": args.rounds, "nats": memory.get("nats", lambda: nats(bench, args)),
            "shares": memory.get("shares", lambda: shares(bench, args)), "decoding": decoding(bench, args), "steps": steps(args),
        }  # fmt: skip
    if not args.no_record:
        append_record("read-me", record)
    print(table(record))


if __name__ == "__main__":
    main()
