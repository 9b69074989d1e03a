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
    from train import RECORD as TRAIN
    from train import table as train_table

    parts = [INTRO + ("\n" + moe(latest()) if latest() else "\nNothing is recorded yet.")]
    if read_records(TRAIN):
        parts.append("## Training next to PyTorch\n\n" + train_table(latest_record(TRAIN)))
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
