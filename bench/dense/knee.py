"""Loss against experts that stay, for models of two numbers of experts split out of one dense model (UNCURL's threshold).

    python3 bench/dense/knee.py -m .cache/data/models/SmolLM2-135M-Instruct --svg docs/pictures/knee.svg

The models are those of mixture.py. For every domain: a recording of its text, plans that keep a part of the experts, and nats
per token on its held-out text: `uncurl`, `router-mass`, `random` with several seeds, and both by recordings of the other domains.
What has been measured is kept in `--work`: the same command goes on after a stop. Prints Markdown, draws the mean over domains, and appends to bench/record/knee.jsonl.
"""

import argparse
from pathlib import Path

from bed import arguments, moments, opened
from mixture import mixture, mixture_arguments

from common import append_record, now, revision

PLANS = ["uncurl", "router-mass"]
OTHERS = ["uncurl, others", "router-mass, others"]


def trace_of(bench, moe, experts, domain):
    """A recording of the domain's text."""
    out = bench.folder / f"{domain}.{experts}.parquet"
    if not out.is_file():
        partial = out.with_name(f"partial.{out.name}")
        partial.unlink(missing_ok=True)
        bench.run("trace", "-m", moe, "--data", bench.look(domain), "--logits", "-t", bench.args.threads, "-o", partial)
        partial.rename(out)
    return out


def cost(bench, moe, trace, domain, keep, method, seed=0):
    """Nats per token on `domain` of what a plan leaves of `moe`."""
    if keep == 1.0:
        return bench.nll(moe, domain)
    plan = bench.folder / "plan.json"
    plan.unlink(missing_ok=True)
    bench.run("plan", "prune", "-m", moe, "--trace", trace, "--keep", keep, "--method", method, "--seed", seed, "-o", plan)
    return bench.nll(moe, domain, "--plan", plan)


def curves(bench, memory, experts, keeps):
    """By method: for every share that stays the nats of every domain (for random: of every seed and domain)."""
    args, moe = bench.args, mixture(bench, experts)
    traces = {domain: trace_of(bench, moe, experts, domain) for domain in args.domains}

    def nats(by, domain, keep, method, seed=0):
        name = f"{experts} {domain} {keep}" if keep == 1.0 else f"{experts} {domain} {keep} {method} {seed} by {by}"
        return memory.get(name, lambda: cost(bench, moe, traces[by], domain, keep, method, seed))

    result = {method: {} for method in [*PLANS, *OTHERS, "random"]}
    for keep in keeps:
        for method, by_others in zip(PLANS, OTHERS):
            result[method][keep] = [nats(d, d, keep, method) for d in args.domains]
            result[by_others][keep] = [
                moments([nats(o, d, keep, method) for o in args.domains if o != d])[0] for d in args.domains
            ]
        seeds = [1] if keep == 1.0 else range(1, args.seeds + 1)
        result["random"][keep] = [[nats(d, d, keep, "random", seed) for d in args.domains] for seed in seeds]
        print(f"| {experts} experts, keep {keep} | {line(result, keep)} |", flush=True)
    return result


def line(result, keep):
    cells = []
    for at in range(len(result["uncurl"][keep])):
        mean, deviation = moments([row[at] for row in result["random"][keep]])
        own = ", ".join(f"{result[method][keep][at]:.2f}" for method in [*PLANS, *OTHERS])
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
    width, height, left, top, right = 725, 400, 60, 30, 225
    points = [p for result in all_curves.values() for m in result for p in mean_curve(result, m)]
    low, high = min([dense, *(y for _, y in points)]), max(y for _, y in points)
    least = min(x for x, _ in points)
    px = lambda x: left + (width - left - right) * (1 - x) / (1 - least)
    py = lambda y: top + (height - top - 50) * (high - y) / (high - low)
    colours = {
        "uncurl": "#c1440e", "router-mass": "#1b6ca8", "uncurl, others": "#e2a07f", "router-mass, others": "#9dbfd9",
        "random": "#7a7a7a",
    }  # fmt: skip
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">']
    out.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for x in sorted({x for x, _ in points}, reverse=True):
        out.append(f'<text x="{px(x):.0f}" y="{height - 30}" text-anchor="middle">{x:g}</text>')
    for step in range(6):
        y = low + (high - low) * step / 5
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}" stroke="#e0e0e0"/>')
        out.append(f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:.1f}</text>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 10}" text-anchor="middle">share of the experts that stays</text>')
    out.append(f'<text x="{left}" y="16">nats per token, mean over domains</text>')
    out.append(f'<line x1="{left}" x2="{width - right}" y1="{py(dense):.1f}" y2="{py(dense):.1f}" stroke="black" stroke-dasharray="2 3"/>')
    out.append(f'<text x="{left + 6}" y="{py(dense) - 5:.1f}">the dense model</text>')
    row = 0
    for n, (experts, result) in enumerate(all_curves.items()):
        dash = "" if n == 0 else ' stroke-dasharray="5 3"'
        for method in result:
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in mean_curve(result, method))
            out.append(f'<polyline points="{path}" fill="none" stroke="{colours[method]}" stroke-width="2"{dash}/>')
            y = top + 10 + 16 * row
            out.append(f'<line x1="{width - right + 10}" x2="{width - right + 34}" y1="{y}" y2="{y}" stroke="{colours[method]}" stroke-width="2"{dash}/>')
            out.append(f'<text x="{width - right + 40}" y="{y + 4}">{method}, {experts} experts</text>')
            row += 1
    out.append("</svg>")
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments(parser)
    mixture_arguments(parser)
    parser.add_argument("--experts", type=int, nargs=2, default=[8, 32])
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.25])
    parser.add_argument("--svg", type=Path)
    args, host, bench, memory = opened(parser, "knee")
    dense = [memory.get(f"dense {d}", lambda d=d: bench.nll(args.model, d)) for d in args.domains]
    print(f"| {', '.join([*PLANS, *OTHERS])}, random | {' | '.join(args.domains)} |")
    print(f"|---|{'---|' * len(args.domains)}\n| (dense) | {' | '.join(f'{x:.2f}' for x in dense)} |", flush=True)
    result = {experts: curves(bench, memory, experts, args.keep) for experts in args.experts}
    for experts, of in result.items():
        for keep in (0.5, 0.25):
            if keep in of["uncurl"]:
                print(f"{experts} experts, keep {keep}: {verdict(of, keep)}")
    if not args.no_record:
        append_record(
            "knee",
            {
                "date": now(), "commit": revision(), "machine": host, "model": Path(args.model).name, "active": args.active,
                "shared": args.shared, "tuned_steps": args.tune, "nats": memory.found,
            },
        )  # fmt: skip
    if args.svg:
        args.svg.write_text(svg(result, moments(dense)[0]), encoding="utf-8")


def verdict(of, keep):
    """In how many domains methods beat chance, and the own recording those of others."""
    n = len(of["uncurl"][keep])
    chance = [moments([row[at] for row in of["random"][keep]]) for at in range(n)]
    said = []
    for method, others in zip(PLANS, OTHERS):
        better = sum(of[method][keep][at] < mean - deviation for at, (mean, deviation) in enumerate(chance))
        worse = sum(a > b for a, b in zip(of[others][keep], of[method][keep]))
        said.append(f"{method} below random - 1 std in {better} of {n} domains, recordings of others worse in {worse} of {n}")
    return "; ".join(said)


if __name__ == "__main__":
    main()
