"""What merging experts of a real model costs: aligned or not, weighed by use or not, by the task's own text or others'.

    python3 bench/dense/merge.py -m .cache/data/models/SmolLM2-135M-Instruct

The model is that of mixture.py. For every domain and every draw of its text: a recording, plans
that merge the experts to `--keep` of them, the model that `cadre apply` makes of each, and its nats per token on held-out text.
Then the same merge with matrices in factors (MC-SMoE), and the part of the experts' bytes that it saves. What has been measured
is kept in `--work`: the same command goes on after a stop. Prints Markdown and appends to bench/record/merge.jsonl. Needs
Python 3.9 or newer, nothing else.
"""

import argparse
import json
import shutil
from pathlib import Path

from bed import arguments, moments, opened
from mixture import mixture, mixture_arguments

from common import append_record, now, revision

# By name: arguments of `cadre plan`, and whether every member of a group weighs the same.
VARIANTS = {
    "m-smoe": (["merge", "--method", "m-smoe"], False),
    "neurons unaligned": (["merge", "--method", "m-smoe", "--align", "false"], False),
    "unweighted": (["merge", "--method", "m-smoe"], True),
    "unaligned and unweighted (mean)": (["merge", "--method", "mean"], False),
    "dropped by router-mass": (["prune", "--method", "router-mass"], False),
    "mc-smoe": (["factor"], False),
}


def recording(bench, moe, domain, draw):
    """A recording of every `draws`-th document of the domain."""
    out = bench.folder / f"{domain}.draw{draw}.parquet"
    if not out.is_file():
        text = bench.folder / f"{domain}.draw{draw}.jsonl"
        lines = (bench.args.data / f"{domain}.train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        taken, n_chars = [], 0
        for line in lines[draw :: bench.args.seeds]:
            if n_chars >= bench.args.look_chars:
                break
            taken.append(line)
            n_chars += len(line)
        text.write_text("".join(taken), encoding="utf-8")
        partial = out.with_name(f"partial.{out.name}")
        partial.unlink(missing_ok=True)
        bench.run("trace", "-m", moe, "--data", text, "--logits", "-t", bench.args.threads, "-o", partial)
        partial.rename(out)
    return out


def expert_bytes(folder):
    """Bytes of the routed experts of a folder of safetensors."""
    total = 0
    for file in Path(folder).glob("*.safetensors"):
        with open(file, "rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        for name, tensor in header.items():
            if ".experts." in name:
                first, end = tensor["data_offsets"]
                total += end - first
    return total


def cost(bench, moe, trace, domain, variant):
    """Nats per token on `domain` of what a plan makes of `moe`, and the bytes of its experts."""
    args = bench.args
    plan, made = bench.folder / "plan.json", bench.folder / "made"
    plan.unlink(missing_ok=True)
    shutil.rmtree(made, ignore_errors=True)
    how, is_even = VARIANTS[variant]
    more = ["--rank", args.rank, "--rest", args.rest] if variant == "mc-smoe" else []
    bench.run("plan", *how, *more, "-m", moe, "--trace", trace, "--keep", args.keep, "-o", plan)
    if is_even:
        text = json.loads(plan.read_text(encoding="utf-8"))
        for layer in text["layers"]:
            for expert in layer["experts"]:
                expert["weights"] = [1.0] * len(expert["from"])
        plan.write_text(json.dumps(text), encoding="utf-8")
    bench.run("apply", "-m", moe, "--plan", plan, "-o", made)
    result = {"nats": bench.nll(made, domain), "bytes": expert_bytes(made)}
    shutil.rmtree(made)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments(parser)
    mixture_arguments(parser)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--rank", type=int, default=24)
    parser.add_argument("--rest", type=float, default=0.1)
    args, host, bench, memory = opened(parser, "merge")
    moe = mixture(bench, args.experts)
    whole = {d: memory.get(f"whole {d}", lambda d=d: bench.nll(moe, d)) for d in args.domains}
    before = expert_bytes(moe)
    nats, saved = {variant: {} for variant in VARIANTS}, {}
    others = {}
    for domain in args.domains:
        for draw in range(args.seeds):
            trace = recording(bench, moe, domain, draw)
            for variant in VARIANTS:
                found = memory.get(f"{domain} {draw} {variant}", lambda: cost(bench, moe, trace, domain, variant))
                nats[variant].setdefault(domain, []).append(found["nats"])
                saved[variant] = 1 - found["bytes"] / before
            other = args.domains[(args.domains.index(domain) + 1) % len(args.domains)]
            elsewhere = recording(bench, moe, other, draw)
            found = memory.get(f"{domain} {draw} m-smoe by {other}", lambda: cost(bench, moe, elsewhere, domain, "m-smoe"))
            others.setdefault(domain, []).append(found["nats"])
    nats["m-smoe by another domain's text"] = others
    saved["m-smoe by another domain's text"] = saved["m-smoe"]
    record = {
        "date": now(), "commit": revision(), "machine": host, "model": Path(args.model).name, "experts": args.experts,
        "active": args.active, "shared": args.shared, "tuned_steps": args.tune, "keep": args.keep, "rank": args.rank, "rest": args.rest,
        "draws": args.seeds, "whole": whole, "nats": nats, "saved": saved,
    }  # fmt: skip
    if not args.no_record:
        append_record("merge", record)
    print(table(record))


def table(record):
    domains = list(record["whole"])
    lines = [f"| nats per token | {' | '.join(domains)} | behind m-smoe (draws with more) | saved of the experts' bytes |"]
    lines += [f"|---|{'---|' * len(domains)}---|---|", f"| whole | {' | '.join(f'{x:.3f}' for x in record['whole'].values())} | | |"]
    for variant, of in record["nats"].items():
        cells = ["{:.3f} +- {:.3f}".format(*moments(of[d])) for d in domains]
        behind = [a - b for d in domains for a, b in zip(of[d], record["nats"]["m-smoe"][d])]
        mean, deviation = moments(behind)
        more = f"{mean:+.3f} +- {deviation:.3f} ({sum(x > 0 for x in behind)} of {len(behind)})"
        more = "" if variant == "m-smoe" else more
        lines.append(f"| {variant} | {' | '.join(cells)} | {more} | {100 * record['saved'][variant]:.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
