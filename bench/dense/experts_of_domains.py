"""Experts cut out of a dense model for domains: is a domain's own expert better than the others, and than chance?

    recipes/data/smollm2.sh && python3 bench/dense/domains.py --out .cache/data/domains math=.. code=.. medicine=..
    python3 bench/dense/experts_of_domains.py -m .cache/data/models/SmolLM2-135M-Instruct.Q4_1.gguf

Read-ME's extraction (arXiv 2410.19123): of every layer the part of the neurons that a domain uses most. Every held-out text is
read with every token sent to one expert. Beside them: random parts of the same size (`cadre split --by random`, the first part
of each seed). Nothing is trained. Prints Markdown, nats per token, and appends a record to bench/record/experts-of-domains.jsonl.
"""

import argparse
import tempfile
from pathlib import Path

from bed import Bench, arguments, moments

from common import append_record, machine, now, pin, revision


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments(parser)
    parser.add_argument("--width", type=int, default=768, help="neurons of an expert; half of SmolLM2-135M's")
    parser.add_argument("--parts", type=int, default=2, help="parts of that size in a feed-forward, for comparison")
    parser.add_argument("--look-tokens", type=int, default=8192)
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    host = machine(args.threads, pin(args.threads))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        rows = {"dense": [bench.nll(args.model, d) for d in args.domains]}
        moe = bench.folder / "moe"
        data = [x for d in args.domains for x in ("--data", bench.look(d))]
        tokens = ["--tokens", args.look_tokens, "-t", args.threads]
        bench.run("split", "-m", args.model, "--by", "domains", "--width", args.width, *data, *tokens, "-o", moe)
        for expert, domain in enumerate(args.domains):
            force = ("--force-experts", f"*:{expert}")
            rows[domain] = [bench.nll(moe, d, *force) for d in args.domains]
        random = []
        for seed in range(1, args.seeds + 1):
            out = bench.folder / f"random{seed}"
            bench.run("split", "-m", args.model, "--experts", args.parts, "--top-k", 1, "--by", "random", "--seed", seed, "-o", out)
            force = ("--force-experts", "*:0")
            random.append([bench.nll(out, d, *force) for d in args.domains])
        print(f"| expert of | {' | '.join(args.domains)} |\n|---|{'---|' * len(args.domains)}")
        for name, row in rows.items():
            cells = [f"**{x:.3f}**" if name == d else f"{x:.3f}" for d, x in zip(args.domains, row)]
            print(f"| {'(dense)' if name == 'dense' else name} | {' | '.join(cells)} |")
        cells = []
        for at, domain in enumerate(args.domains):
            mean, deviation = moments([row[at] for row in random])
            cells.append(f"{mean:.3f} +- {deviation:.3f}")
        print(f"| random, {args.seeds} seeds | {' | '.join(cells)} |")
        own = [rows[d][at] for at, d in enumerate(args.domains)]
        others = all(own[at] < rows[o][at] for at, d in enumerate(args.domains) for o in args.domains if o != d)
        chance = all(own[at] < min(row[at] for row in random) for at in range(len(own)))
        if not args.no_record:
            record = {
                "date": now(), "commit": revision(), "machine": host, "model": Path(args.model).name, "domains": args.domains,
                "width": args.width, "look_tokens": args.look_tokens, "judge_chars": args.judge_chars, "nats": rows, "random": random,
            }  # fmt: skip
            append_record("experts-of-domains", record)
        print(f"\nown expert better than every other: {others}; than every random part: {chance}")


if __name__ == "__main__":
    main()
