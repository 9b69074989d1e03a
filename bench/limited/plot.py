#!/usr/bin/env python3
"""Draws the newest sweep of bench/record/limited.jsonl: tokens per second against the memory limit, Cadre and llama.cpp.

    python3 bench/limited/plot.py            # writes docs/pictures/streaming.svg
    python3 bench/limited/plot.py --check    # exit code 3 when the picture is not what the records say

With routing as of a trained model where there is such a sweep. The scale of the rate is logarithmic. A cross at the bottom is a limit under which a side gave no result. Colours follow the reader's scheme.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ROOT, fail, read_records  # noqa: E402

OUT = ROOT / "docs" / "pictures" / "streaming.svg"
WIDTH, HEIGHT = 912, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 232, 64, 56
STYLE = """<style>
text{font-family:ui-sans-serif,system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}.title{font-size:15px;font-weight:600}.name{font-size:12px;font-weight:600}
.tick,.note{font-size:11px}.end{text-anchor:end}.middle{text-anchor:middle}
.card{fill:#ffffff;stroke:#e2e0ea}.title{fill:#1d1b26}.tick,.note{fill:#6c6878}.grid{stroke:#e9e7ef}
.line{fill:none;stroke-width:2.5;stroke-linejoin:round;stroke-linecap:round}.dash{stroke-dasharray:6 5}.cross{stroke-width:2}.thin{stroke-width:1;opacity:.6}
.cadre{stroke:#c12a51}.cadre-dot,.cadre-name{fill:#c12a51}.llama{stroke:#5a6b8c}.llama-dot,.llama-name{fill:#5a6b8c}
@media(prefers-color-scheme:dark){
.card{fill:#15131d;stroke:#2b2837}.title{fill:#f0eef6}.tick,.note{fill:#9a95a8}.grid{stroke:#262332}
.cadre{stroke:#ff7a5c}.cadre-dot,.cadre-name{fill:#ff7a5c}.llama{stroke:#9fb0d0}.llama-dot,.llama-name{fill:#9fb0d0}
}
</style>"""
# Class, whether dashed, name.
SIDES = {
    "cadre": ("cadre", False, "Cadre"),
    "llama-window": ("llama", True, "llama.cpp, disk tuned for it"),
    "llama-best": ("llama", False, "llama.cpp, best flags"),
}


def newest(records):
    """The newest sweep, with skewed routing if there is one; None without any."""
    sweeps = [record for record in records if record["what"] == "sweep"]
    return ([None] + sorted(sweeps, key=lambda record: (record["routing"] == "skewed", record["date"])))[-1]


def series(record):
    """Name, class, whether dashed, points as (share, rate) with None for no result."""
    for side, (kind, dashed, name) in SIDES.items():
        points = [(point["share"], point[side].get("median")) for point in record["points"] if side in point]
        if points:
            yield name, kind, dashed, points


class Axes:
    """Places of shares and rates."""

    def __init__(self, rates):
        # Half decades around what there is.
        self.low = 10 ** (math.floor(2 * math.log10(min(rates))) / 2)
        self.high = 10 ** (math.ceil(2 * math.log10(max(rates))) / 2)

    def x(self, share):
        return LEFT + (WIDTH - LEFT - RIGHT) * share

    def y(self, rate):
        part = math.log(rate / self.low) / math.log(self.high / self.low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * part

    def ticks(self):
        """1, 3, 10, 30 and so on."""
        power = math.floor(math.log10(self.low))
        while 10**power <= self.high * 1.01:
            for tick in (10**power, 3 * 10**power):
                if self.low * 0.99 <= tick <= self.high * 1.01:
                    yield tick
            power += 1


def grid(axes):
    lines = []
    for tick in axes.ticks():
        y = axes.y(tick)
        lines.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        lines.append(f'<text class="tick end" x="{LEFT - 8}" y="{y + 4:.1f}">{tick:g}</text>')
    for percent in range(0, 101, 20):
        lines.append(f'<text class="tick middle" x="{axes.x(percent / 100):.1f}" y="{HEIGHT - BOTTOM + 20}">{percent} %</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    lines.append(f'<text class="note middle" x="{middle:.0f}" y="{HEIGHT - 14}">memory that the process may use, of the size of the file</text>')
    return lines


def curve(axes, kind, dashed, points):
    """A line through what worked, a cross where nothing did."""
    worked = [(axes.x(share), axes.y(rate)) for share, rate in points if rate]
    lines = []
    if worked:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in worked)
        lines.append(f'<path class="line {kind}{" dash" if dashed else ""}" d="M{path}"/>')
        lines += [f'<circle class="{kind}-dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in worked]
    y = HEIGHT - BOTTOM - 6
    for share, rate in points:
        if not rate:
            x = axes.x(share)
            lines.append(f'<path class="cross {kind}" d="M{x - 4:.1f} {y - 4}l8 8m0 -8l-8 8"/>')
    return lines


def labels(axes, drawn, whole):
    """Names at the right, beside the last points, moved apart where they would meet."""
    ends = [[axes.y(whole), "all in memory", "note"]] if whole else []
    for name, kind, _, points in drawn:
        rates = [rate for _, rate in points if rate]
        if rates:
            ends.append([axes.y(rates[-1]), name, f"name {kind}-name"])
    ends.sort()
    for before, after in zip(ends, ends[1:]):
        after[0] = max(after[0], before[0] + 16)
    return [f'<text class="{kind}" x="{WIDTH - RIGHT + 12}" y="{y + 4:.1f}">{name}</text>' for y, name, kind in ends]


def picture(record):
    """The whole SVG."""
    drawn = list(series(record))
    whole = next(iter(record["unlimited_ts"].values()), None)
    rates = [rate for *_, points in drawn for _, rate in points if rate]
    if not rates:
        fail("the newest sweep has no result to draw")
    axes = Axes([*rates, whole] if whole else rates)
    title = f"Tokens per second, decoding, when memory is smaller than the model ({record['shape']}, {record['type'].upper()})"
    disk, threads = record["disk_bytes_per_s"]["median"] / 1e6, record["machine"]["threads"]
    note = (
        f"{record['file_bytes'] / 1e9:.2f} GB file, {record['routing']} routing; disk {disk:.0f} MB/s with direct reads; {threads} threads;"
        f" {record['date'][:10]}; a cross: no result"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">',
        STYLE,
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>',
        f'<text class="title" x="20" y="28">{title}</text>',
        f'<text class="note" x="20" y="46">{note}</text>',
        *grid(axes),
    ]
    if whole:
        lines.append(f'<path class="cadre thin" d="M{LEFT} {axes.y(whole):.1f}H{WIDTH - RIGHT}"/>')
    for _, kind, dashed, points in drawn:
        lines += curve(axes, kind, dashed, points)
    return "\n".join([*lines, *labels(axes, drawn, whole), "</svg>"]) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Draws the newest sweeps of bench/record/limited.jsonl.")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    args = parser.parse_args()
    record = newest(read_records("limited"))
    if record is None:
        fail("no sweep is recorded yet; run bench/limited/run.py --what sweep")
    text = picture(record)
    if not args.check:
        args.out.write_text(text, encoding="utf-8")
    elif not args.out.is_file() or args.out.read_text(encoding="utf-8") != text:
        print(f"{args.out} is not what the records say; run python3 bench/limited/plot.py", file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main()
