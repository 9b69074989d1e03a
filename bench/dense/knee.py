"""Loss against experts that stay, for models of two numbers of experts split out of one dense model (UNCURL's threshold).

    python3 bench/dense/knee.py -m .cache/data/models/SmolLM2-135M-Instruct.Q4_1.gguf --svg docs/pictures/knee.svg

The neurons of every layer are parted among E experts (`cadre split --by activity`), of which a token takes an eighth. For every
domain: a recording of its text, plans that keep a part of the experts, and nats per token on its held-out text: `uncurl`,
`router-mass`, `random` with several seeds, and `router-mass` by recordings of the other domains. Nothing is trained. Prints
Markdown, and draws the mean over domains.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from bed import Bench, arguments, moments

PLANS = ["uncurl", "router-mass"]


def split(bench, experts, part):
    out = bench.folder / f"moe{experts}"
    data = [x for d in bench.args.domains for x in ("--data", bench.look(d))]
    bench.run(
        "split", "-m", bench.args.model, "--experts", experts, "--top-k", max(1, experts // part), "--by", "activity",
        *data, "--tokens", bench.args.look_tokens, "-t", bench.args.threads, "-o", out,
    )  # fmt: skip
    return out


def cost(bench, moe, trace, domain, keep, method, seed=0):
    """Nats per token on `domain` of what a plan leaves of `moe`."""
    if keep == 1.0:
        return bench.nll(moe, domain)
    plan = bench.folder / "plan.json"
    bench.run("plan", "prune", "--trace", trace, "--keep", keep, "--method", method, "--seed", seed, "-o", plan)
    return bench.nll(moe, domain, "--plan", plan)


def curves(bench, experts, part, keeps):
    """By method: for every share that stays the nats of every domain (for random: of every seed and domain)."""
    moe = split(bench, experts, part)
    traces = {}
    for domain in bench.args.domains:
        traces[domain] = bench.folder / f"{domain}.parquet"
        bench.run("trace", "-m", moe, "--data", bench.look(domain), "--logits", "-t", bench.args.threads, "-o", traces[domain])
    result = {method: {} for method in [*PLANS, "other domains", "random"]}
    for keep in keeps:
        for method in PLANS:
            result[method][keep] = [cost(bench, moe, traces[d], d, keep, method) for d in bench.args.domains]
        result["other domains"][keep] = [
            moments([cost(bench, moe, traces[o], d, keep, "router-mass") for o in bench.args.domains if o != d])[0]
            for d in bench.args.domains
        ]
        seeds = [1] if keep == 1.0 else range(1, bench.args.seeds + 1)
        result["random"][keep] = [
            [cost(bench, moe, traces[d], d, keep, "random", seed) for d in bench.args.domains] for seed in seeds
        ]
        print(f"| {experts} experts, keep {keep} | {line(result, keep)} |", flush=True)
    shutil.rmtree(moe)
    return result


def line(result, keep):
    cells = []
    for at in range(len(result["uncurl"][keep])):
        mean, deviation = moments([row[at] for row in result["random"][keep]])
        own = ", ".join(f"{result[method][keep][at]:.2f}" for method in [*PLANS, "other domains"])
        cells.append(f"{own}, {mean:.2f} +- {deviation:.2f}")
    return " | ".join(cells)


def mean_curve(result, method):
    """(share, mean nats) by falling share."""
    points = []
    for keep, values in result[method].items():
        flat = [x for row in values for x in row] if method == "random" else values
        points.append((keep, moments(flat)[0]))
    return sorted(points, reverse=True)


def svg(all_curves, dense):
    """Mean nats over the share of the experts that stays, one line per number of experts and method."""
    width, height, left, top = 640, 400, 60, 30
    points = [p for result in all_curves.values() for m in result for p in mean_curve(result, m)]
    low, high = min([dense, *(y for _, y in points)]), max(y for _, y in points)
    least = min(x for x, _ in points)
    px = lambda x: left + (width - left - 150) * (1 - x) / (1 - least)
    py = lambda y: top + (height - top - 50) * (high - y) / (high - low)
    colours = {"uncurl": "#c1440e", "router-mass": "#1b6ca8", "other domains": "#7a7a7a", "random": "#b8a100"}
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">']
    out.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for x in sorted({x for x, _ in points}, reverse=True):
        out.append(f'<text x="{px(x):.0f}" y="{height - 30}" text-anchor="middle">{x:g}</text>')
    for step in range(6):
        y = low + (high - low) * step / 5
        out.append(f'<line x1="{left}" x2="{width - 150}" y1="{py(y):.1f}" y2="{py(y):.1f}" stroke="#e0e0e0"/>')
        out.append(f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:.1f}</text>')
    out.append(f'<text x="{(left + width - 150) / 2}" y="{height - 10}" text-anchor="middle">share of the experts that stays</text>')
    out.append(f'<text x="{left}" y="16">nats per token, mean over domains</text>')
    row = 0
    for n, (experts, result) in enumerate(all_curves.items()):
        dash = "" if n == 0 else ' stroke-dasharray="5 3"'
        for method in result:
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in mean_curve(result, method))
            out.append(f'<polyline points="{path}" fill="none" stroke="{colours[method]}" stroke-width="2"{dash}/>')
            y = top + 10 + 16 * row
            out.append(f'<line x1="{width - 140}" x2="{width - 116}" y1="{y}" y2="{y}" stroke="{colours[method]}" stroke-width="2"{dash}/>')
            out.append(f'<text x="{width - 110}" y="{y + 4}">{method}, {experts}</text>')
            row += 1
    out.append("</svg>")
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments(parser)
    parser.add_argument("--experts", type=int, nargs=2, default=[16, 64])
    parser.add_argument("--active", type=int, default=8, help="a token takes one of so many parts of the experts")
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.375, 0.25, 0.125])
    parser.add_argument("--look-tokens", type=int, default=4096)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        dense = [bench.nll(args.model, d) for d in args.domains]
        print(f"| uncurl, router-mass, router-mass by other domains, random | {' | '.join(args.domains)} |")
        print(f"|---|{'---|' * len(args.domains)}\n| (dense) | {' | '.join(f'{x:.2f}' for x in dense)} |", flush=True)
        result = {experts: curves(bench, experts, args.active, args.keep) for experts in args.experts}
    for experts, of in result.items():
        for keep in (0.5, 0.25):
            if keep in of["uncurl"]:
                better = 0
                for at in range(len(args.domains)):
                    mean, deviation = moments([row[at] for row in of["random"][keep]])
                    better += of["uncurl"][keep][at] < mean - deviation
                worse = sum(a > b for a, b in zip(of["other domains"][keep], of["router-mass"][keep]))
                n = len(args.domains)
                print(
                    f"{experts} experts, keep {keep}: uncurl below random - 1 std in {better} of {n} domains, "
                    f"recordings of other domains worse than the own in {worse} of {n}"
                )
    if args.svg:
        args.svg.write_text(svg(result, moments(dense)[0]), encoding="utf-8")


if __name__ == "__main__":
    main()
