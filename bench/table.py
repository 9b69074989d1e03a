#!/usr/bin/env python3
"""Writes docs/performance.md from the records in bench/record/; its numbers are never typed.

    python3 bench/table.py            # writes the file
    python3 bench/table.py --check    # exit code 3 when the file is not what the records say
"""

import argparse
import sys

from common import ROOT, latest_record, read_records

sys.path.insert(0, str(ROOT / "bench" / "peers"))

OUT = ROOT / "docs" / "performance.md"
NAMES = {"q8_0": "Q8_0", "q4_k_m": "Q4_K_M", "q4_0": "Q4_0", "mxfp4": "MXFP4", "bf16": "BF16"}
WHAT = {
    "qwen3moe": "Qwen3-MoE shape: hidden 2048, 128 experts of width 768, top-8, 32 heads and 4 for keys and values, vocabulary 151,936",
    "olmoe": "OLMoE shape: hidden 2048, 64 experts of width 1024, top-8, 16 heads, vocabulary 50,304",
}
# Under a memory limit: how often faster than llama.cpp's best, and the share of the physical bound, that are aimed at.
LIMITED_GOALS = {"tg": (5.0, 0.75), "pp": (1.4, 0.80), "first": (1.5, 0.75)}
ROUTING = {"random": "random weights", "skewed": "skewed routing"}
# Ratios to llama.cpp that are aimed at.
GOALS = {
    "pp": {"q8_0": 4.0, "q4_k_m": 2.8, "q4_0": 2.8, "mxfp4": 2.0, "bf16": 2.0},
    "tg": {"q8_0": 1.15, "q4_k_m": 1.2, "q4_0": 1.2, "mxfp4": 1.15, "bf16": 1.05},
    "tgx8": {"q8_0": 2.0, "q4_k_m": 2.0, "q4_0": 2.0, "mxfp4": 1.5, "bf16": 1.5},
}
INTRO = """# Performance

Written by `python3 bench/table.py` from the records in `bench/record/`; no number here is typed. How it is measured, and the rules that a
comparison keeps: [benchmarks](../bench/README.md). Machines are noisy: read ratios, which come from one run with alternating sides, before tokens per second.

## MoE models next to llama.cpp

Random weights at the shapes of published models, cut to few layers. `pp512` is a prompt of 512 tokens; `tg64` are 64 tokens, one after the
other; `tg64x8` are 64 steps of 8 sequences decoded together, tokens of all sequences counted. Medians over the rounds. llama.cpp runs twice: with its
default settings, and with the fastest that a small grid found for each test (repacking, mapping, flash attention, one cache or one per sequence).

What limits each figure is in the last columns. Decoding is bound by bytes: *bound* is how fast the same process reads these weights,
divided by the bytes of weights and cache that a token needs (for several sequences, the experts that any of them picked, once), and *share* is the median
speed as a part of it. Prompts are bound by arithmetic: *GFLOP/s* counts two operations per weight and token, attention left out.
"""


def kind_of(test):
    """Which goal a test has."""
    if test.startswith("pp"):
        return "pp"
    steps = test.split("@")[0].partition("x")[2]
    return {"": "tg", "8": "tgx8"}.get(steps)


def number(value, digits=1):
    return "-" if value is None else f"{value:.{digits}f}"


def ratio(row, side, goal):
    """The ratio, its spread over the rounds, and whether it is what is aimed at."""
    if side not in row or "ratio" not in row[side]:
        return "-"
    by_round = row[side]["ratio_by_round"]
    value = row[side]["ratio"]
    bold = "**" if goal is not None and value >= goal else ""
    return f"{bold}{value:.2f}{bold} ({min(by_round):.2f} to {max(by_round):.2f})"


def limit(cadre):
    """The physical limit of one figure, and the share that was reached."""
    if "bound_ts" in cadre:
        return f"{cadre['bound_ts']:.0f} tok/s", f"{100 * cadre['bound_share']:.0f} % of bandwidth"
    if "peak_share" in cadre:
        return f"{cadre['gflops']:.0f} GFLOP/s", f"{100 * cadre['peak_share']:.0f} % of peak"
    return f"{number(cadre.get('gflops'), 0)} GFLOP/s", "-"


def settings(record, test):
    """llama.cpp's best settings, in words."""
    best = record["llama_best"].get(test)
    if not best:
        return "-"
    words = [] if best["loading"] == "default" else [best["loading"]]
    words += ["no flash attention"] if best["flash"] == "off" else []
    words += ["one cache"] if best["unified"] else []
    return ", ".join(words) or "default"


def one(record):
    """The table of one shape and type."""
    host = record["machine"]
    lines = [
        f"### {record['shape']}, {NAMES[record['type']]}",
        "",
        f"{WHAT[record['shape']]}. `{record['file']}`, {record['file_bytes'] / 1e9:.2f} GB. {host['threads']} threads, {host['cpu']}"
        f" ({', '.join(host['isa'])}), {record['date'][:10]}, commit {record['commit']}, {record['rounds']} rounds,"
        f" llama-cpp-python {record['versions']['llama-cpp-python']}, load before the run {host['load_before']}.",
        "",
        "| test | Cadre, tok/s | llama.cpp | its best | settings of its best | Cadre / llama.cpp | Cadre / its best | aim | bound or rate | share |",
        "|---|---:|---:|---:|---|---|---|---:|---:|---:|",
    ]
    for test, row in record["tests"].items():
        goal = GOALS.get(kind_of(test), {}).get(record["type"])
        medians = [number(row[side]["median"]) if side in row else "-" for side in ("cadre", "llama", "llama-best")]
        bound, share = limit(row["cadre"]) if "cadre" in row else ("-", "-")
        cells = [test, *medians, settings(record, test), ratio(row, "llama", goal), ratio(row, "llama-best", goal)]
        lines.append("| " + " | ".join([*cells, number(goal, 2), bound, share]) + " |")
    rates = [row["cadre"]["bandwidth_bytes_per_s"] for row in record["tests"].values() if "bandwidth_bytes_per_s" in row.get("cadre", {})]
    if rates:
        lines += ["", f"Bandwidth measured between the tests: {min(rates) / 1e9:.1f} to {max(rates) / 1e9:.1f} GB/s. Ratios in bold reach the aim; it is met when both are."]
    return "\n".join(lines)


def moe(records):
    """The tables of several shapes and types."""
    return "\n\n".join(one(record) for record in records)


def opening(records):
    """The newest line of `bench/open/run.py` for each container."""
    newest = {record["container"]: record for record in records}
    lines = [
        "`cadre inspect` of sparse checkpoints with true headers, from the start of the process to its end; *cold*: the pages of the checkpoint"
        " were dropped from the system's cache before. Medians. The aim is under 50 ms and under 50 MB.",
        "",
        "| container | size | tensors | cold | warm | processor time, cold | most memory | machine |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, record in newest.items():
        cold, warm = record["cold"], record["warm"]
        peak = max(cold["peak_rss_bytes"], warm["peak_rss_bytes"])
        cells = [
            name, f"{record['file_bytes'] / 1e9:.1f} GB", f"{record['tensors']:,}",
            *(f"{1e3 * value:.0f} ms" for value in (cold["median_s"], warm["median_s"], cold["median_cpu_s"])),
            f"{peak / 1e6:.0f} MB",
            f"{record['cpus']} CPUs ({record['machine']}), load {record['load']}, {record['date'][:10]}, commit {record['commit']}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def limited_kind(test):
    return test.rstrip("0123456789")


def limited_cell(row):
    """A side's median, or why it has none."""
    if "median" not in row:
        # The record has the whole message.
        what = row.get("failed", "-").partition(":")[0]
        return f"refused ({what})" if what.startswith("exit code") else what
    some = f", {row['n_failed']} failed" if row.get("n_failed") else ""
    return f"{row['median']:.2f} {'s' if row['unit'] == 'seconds' else 'tok/s'}{some}"


def limited_settings(record, side, test):
    """Settings of one side of llama.cpp, in words."""
    best = record["llama_best"].get(side, {}).get(test)
    if not best:
        return "-"
    window = best.get("window_kib")
    words = [best["loading"]] + (["no flash attention"] if best["flash"] == "off" else []) + ([f"window {window} KiB"] if window else [])
    return ", ".join(words)


def limited_row(record, test):
    """One test under one limit."""
    row, (goal, share_goal) = record["tests"][test], LIMITED_GOALS.get(limited_kind(test), (None, None))
    ours = row.get("cadre", {})
    bound = f"{ours['bound_ts']:.1f} tok/s" if "bound_ts" in ours else f"{ours['bound_s']:.2f} s" if "bound_s" in ours else "-"
    share = ours.get("bound_share")
    mark = "**" if share is not None and share_goal is not None and share >= share_goal else ""
    # How often faster is aimed at for the larger limits, and the share of the bound for all.
    goal = goal if record["share"] >= 0.5 else None
    peers = []
    for side in ("llama-best", "llama-window"):
        peers += [limited_cell(row.get(side, {})), limited_settings(record, side, test), ratio(row, side, goal)]
    read = f"{ours['bytes_read_per_token'] / 1e6:.1f} MB" if "bytes_read_per_token" in ours else "-"
    hits = f"{100 * ours['hit_rate']:.0f} %" if "hit_rate" in ours else "-"
    reached = "-" if share is None else f"{mark}{100 * share:.0f} %{mark}"
    return [test, limited_cell(ours), hits, read, bound, reached, "-" if share_goal is None else f"{100 * share_goal:.0f} %", *peers, number(goal)]


def limited_one(record):
    """The table of one limit."""
    host, disk = record["machine"], record["disk_bytes_per_s"]
    lines = [
        f"### {record['shape']}, {NAMES[record['type']]}, {ROUTING[record['routing']]}: {100 * record['share']:.0f} % of the file",
        "",
        f"`{record['file']}`, {record['file_bytes'] / 1e9:.2f} GB, limited to {record['limit_bytes'] / 1e9:.2f} GB;"
        f" `--mem-budget` {record['mem_budget_bytes'] / 1e9:.2f} GB. Disk: {disk['median'] / 1e6:.0f} MB/s ({disk['min'] / 1e6:.0f} to {disk['max'] / 1e6:.0f})."
        f" Window of reading ahead: {record['window_kib']} KiB."
        f" {host['threads']} threads, {host['cpu']}, {record['date'][:10]}, commit {record['commit']}, {record['rounds']} rounds,"
        f" llama-cpp-python {record['versions']['llama-cpp-python']}, load before the run {host['load_before']}.",
        "",
        "| test | Cadre | hits | read per token | bound | share of the bound | aim | llama.cpp, best flags | flags | times faster"
        " | llama.cpp, best window | settings | times faster | aim |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|---|---:|---|---|---:|",
    ]
    lines += ["| " + " | ".join(limited_row(record, test)) + " |" for test in record["tests"]]
    killed = {}
    for test, tried in record["llama_tried"].items():
        for one_try in tried:
            if "failed" in one_try:
                tests = killed.setdefault(f"{one_try['loading']}: {one_try['failed']}", [])
                tests += [test] if test not in tests else []
    if killed:
        lines += ["", "Settings of llama.cpp that gave no result: " + "; ".join(f"{what} ({', '.join(tests)})" for what, tests in killed.items()) + "."]
    return "\n".join(lines)


def limited_sweep(record):
    """Tokens per second at each limit."""
    lines = [
        f"### {record['shape']}, {NAMES[record['type']]}, {ROUTING[record['routing']]}: from small to large limits",
        "",
        f"`{record['test']}`, {record['rounds']} rounds, {record['date'][:10]}, commit {record['commit']}; load before the run {record['machine']['load_before']}.",
        "",
        "| limit, of the file | Cadre | hits | llama.cpp | its loading | llama.cpp, best window | window | disk |",
        "|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for point in record["points"]:
        ours, theirs, tuned = (point.get(side, {}) for side in ("cadre", "llama-best", "llama-window"))
        hits = f"{100 * ours['hit_rate']:.0f} %" if "hit_rate" in ours else "-"
        cells = [f"{100 * point['share']:.0f} %", limited_cell(ours), hits, limited_cell(theirs), theirs.get("loading", "-")]
        cells += [limited_cell(tuned), f"{tuned['window_kib']} KiB" if tuned.get("window_kib") else "-"]
        lines.append("| " + " | ".join([*cells, f"{point['disk_bytes_per_s'] / 1e6:.0f} MB/s"]) + " |")
    whole = ", ".join(f"{rate:.1f} tok/s" for rate in record["unlimited_ts"].values())
    return "\n".join(lines + ([f"\nCadre without a limit: {whole}."] if whole else []))


def limited_overhead(record):
    """What streaming costs when everything fits."""
    lines = [
        f"### {record['shape']}, {NAMES[record['type']]}, {ROUTING[record['routing']]}: streamed with room for everything",
        "",
        f"No limit; in turns with `--mem-budget` {record['mem_budget_bytes'] / 1e9:.1f} GB and without, {record['rounds']} rounds of {record['repetitions']} repetitions (median of all but the first), {record['date'][:10]},"
        f" commit {record['commit']}; load before the run {record['machine']['load_before']}.",
        "",
        "| test | streamed | resident | streamed / resident | aim |",
        "|---|---:|---:|---|---:|",
    ]
    for test, row in record["tests"].items():
        cells = [test, limited_cell(row["streamed"]), limited_cell(row["resident"]), ratio({"own": row}, "own", 0.97), "0.97"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


LIMITED_INTRO = """The process is in a memory control group smaller than the model's file, and nothing of the file is cached when it starts
(`bench/limited/run.py`). `tg64` and `tg256`: as many tokens, one after the other, after as many that are not measured (the cache is full after about 150). `pp512`: a prompt of 512 tokens, after one that is not
measured. `first32`: from the start of the program to the first token after a prompt of 32. *Bound*: for decoding, the disk's bandwidth (random direct
reads, measured in the same rounds) by the bytes that a token had to read, but no more than the speed without a limit; else the time in which the disk gives the whole file, or that of the
same prompt without a limit if it is longer. *Best window*: the same flags of llama.cpp, and how much the system reads around a missing page of a mapped file (a setting of the
disk) chosen for it, from a few. A prompt that finds part of the model in memory, or does not pick every expert, can exceed its bound. Ratios and shares in bold reach the aim."""


def limited(records):
    """The newest of each measurement under a memory limit."""
    newest = {}
    for record in records:
        newest[(record["what"], record["routing"], record["type"], record.get("share"))] = record
    parts = [LIMITED_INTRO]
    for what, table in (("compare", limited_one), ("sweep", limited_sweep), ("overhead", limited_overhead)):
        parts += [table(record) for record in newest.values() if record["what"] == what]
    return "\n\n".join(parts)


def agreement(records):
    """The newest line of `bench/peers/agree.py` for each model."""
    newest = {record["model"]: record for record in records}
    lines = [
        "Greedy tokens after open prompts, by Cadre and by llama.cpp in several settings, which round differently"
        " (`bench/peers/agree.py`). Where its settings agree, there is something to be equal to.",
        "",
        "| model | prompts x tokens | all settings of llama.cpp agree | Cadre is equal there | Cadre is equal to some setting |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, record in newest.items():
        cells = [
            f"`{name}`", f"{record['prompts']} x {record['tokens']}", record["all_settings_agree"],
            f"{record['cadre_agrees_there']} of {record['all_settings_agree']}", record["cadre_agrees_with_one"],
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def document():
    """The whole page."""
    from run import latest
    from train import LOSS_RECORD, loss_table
    from train import RECORD as TRAIN
    from train import table as train_table

    parts = [INTRO + ("\n" + moe(latest()) if latest() else "\nNothing is recorded yet.")]
    if small := read_records("limited"):
        parts.append("## Bigger than memory\n\n" + limited(small))
    if read_records(TRAIN):
        parts.append("## Training next to PyTorch\n\n" + train_table(latest_record(TRAIN)))
    if read_records(LOSS_RECORD):
        parts.append(loss_table(latest_record(LOSS_RECORD)))
    if opened := read_records("open"):
        parts.append("## Opening a checkpoint of 10 GB\n\n" + opening(opened))
    if agreed := read_records("agree"):
        parts.append("## Continuations next to llama.cpp\n\n" + agreement(agreed))
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Writes docs/performance.md from the records.")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    args = parser.parse_args()
    text = document()
    if not args.check:
        OUT.write_text(text, encoding="utf-8")
        return
    if not OUT.is_file() or OUT.read_text(encoding="utf-8") != text:
        print(f"{OUT.relative_to(ROOT)} is not what the records say; run python3 bench/table.py", file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main()
