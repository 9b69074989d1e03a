#!/usr/bin/env python3
"""How a model routes: how popular its experts are and how many picks a token shares with the one before it, per layer.

    python3 bench/models/routing.py .cache/data/bench/qwen3moe-6l-skewed-q4_k_m.gguf      # random tokens
    python3 bench/models/routing.py --nano                            # writes nano-routing.json from held-out text
    python3 bench/models/routing.py FILE --compare                    # beside nano's, scaled to the file's experts

Random tokens are in sequences that start from nothing, as in the benchmarks: ids from the whole vocabulary, drawn evenly. `chance`
is how many picks two tokens would share if each picked by popularity alone; `lasting` is what is above it, as a share of
what could be: (shared - chance) / (1 - chance). `LRU 1/4` and `LRU 1/2` are the picks that a cache of so many of the layer's experts
would have had, dropping what was not used for longest, one sequence after the other; the first one only fills it. Needs Python 3.9 or newer and `cadre`, nothing else.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ROOT, fail  # noqa: E402

SOURCE = Path(__file__).resolve().parent / "nano-routing.json"
TEXT = ROOT / "recipes" / "data" / "sample.jsonl"
SEED = 11
KEYS = ("hottest", "coldest_half", "shared", "chance", "lasting", "lru_quarter", "lru_half")


def run(command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        fail(f"{command[0]} {command[1]} exited with {done.returncode}:\n{done.stderr[-1500:]}")
    return done.stdout


def nano(cadre):
    """The routing of the embedded model on held-out text, per layer."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "nano.parquet"
        run([cadre, "trace", "--data", TEXT, "--output", trace])
        shown = json.loads(run([cadre, "trace", "show", trace, "-o", "json"]))
    layers = []
    for layer in shown["layers"]:
        chance, shared = layer["reuse_by_chance"], layer["reuse"]
        layers.append({
            "share": [round(share, 5) for share in layer["share"]], "shared": round(shared, 4), "chance": round(chance, 4),
            "lasting": round((shared - chance) / (1 - chance), 4),
        })  # fmt: skip
    return {"model": "nano", "text": str(TEXT.relative_to(ROOT)), "layers": layers}


def picks_of(cadre, path, tokens, threads):
    """Per layer and position, the picked experts."""
    command = [cadre, "logits", "-m", path, "-t", threads, "--no-repack", "--last", "--routing", "-o", "json"]
    found = json.loads(run([*command, "--tokens", ",".join(map(str, tokens))]))
    return [layer["experts"] for layer in found["routing"]]


def statistics_of(sequences, n_experts):
    """One layer: popularity, and picks shared with the token before."""
    counts = [0] * n_experts
    shared = followed = 0
    for positions in sequences:
        for at, picks in enumerate(positions):
            for expert in picks:
                counts[expert] += 1
            if at:
                shared += len(set(picks) & set(positions[at - 1]))
                followed += len(picks)
    used = len(sequences[0][0])
    total = sum(counts)
    shares = sorted((count / total for count in counts), reverse=True)
    chance = used * sum(share * share for share in shares)
    reuse = shared / followed
    return {
        "hottest": sum(shares[:used]), "coldest_half": sum(shares[n_experts // 2 :]), "shared": reuse, "chance": chance,
        "lasting": (reuse - chance) / (1 - chance),
        "lru_quarter": lru_hits(sequences, n_experts // 4), "lru_half": lru_hits(sequences, n_experts // 2),
    }  # fmt: skip


def lru_hits(sequences, room):
    """The share of picks that are among the `room` experts used last, after the first sequence."""
    held, hits, picked = {}, 0, 0
    for number, positions in enumerate(sequences):
        for picks in positions:
            for expert in picks:
                hits += number > 0 and expert in held
                picked += number > 0
                # The end of a dict is what was put in last.
                held.pop(expert, None)
                held[expert] = True
                if len(held) > room:
                    del held[next(iter(held))]
    return hits / picked if picked else 0.0


def measure(cadre, path, n_sequences, length, n_vocab, n_experts, threads):
    """The statistics of each layer over sequences of random tokens."""
    draw = random.Random(SEED)
    layers = None
    for _ in range(n_sequences):
        picks = picks_of(cadre, path, [draw.randrange(n_vocab) for _ in range(length)], threads)
        layers = layers or [[] for _ in picks]
        for layer, positions in zip(layers, picks):
            layer.append(positions)
    return [statistics_of(sequences, n_experts) for sequences in layers]


def show(rows, source):
    """A table; with nano's scaled beside it if `source` is given."""
    words = ["layer", "8 hottest", "coldest half", "shared", "chance", "lasting", "LRU 1/4", "LRU 1/2"] + (["nano lasting", "nano scaled"] if source else [])
    print("  ".join(f"{word:>12}" for word in words))
    for at, row in enumerate(rows):
        cells = [f"{at}", *(f"{100 * row[key]:.1f} %" for key in KEYS)]
        if source:
            lasting = source["layers"][min(at, len(source["layers"]) - 1)]["lasting"]
            cells += [f"{100 * lasting:.1f} %", f"{100 * (row['chance'] + lasting * (1 - row['chance'])):.1f} %"]
        print("  ".join(f"{cell:>12}" for cell in cells))


def main():
    parser = argparse.ArgumentParser(description="How a model routes, per layer.")
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--nano", action="store_true", help="write nano-routing.json")
    parser.add_argument("--compare", action="store_true", help="show nano's beside it")
    parser.add_argument("--cadre", type=Path, default=ROOT / "target" / "release" / "cadre")
    parser.add_argument("--sequences", type=int, default=6)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", choices=("text", "json"), default="text")
    args = parser.parse_args()
    if args.nano:
        SOURCE.write_text(json.dumps(nano(args.cadre), indent=1) + "\n", encoding="utf-8")
        return
    if args.model is None:
        parser.error("name a file, or give --nano")
    rows = measure(args.cadre, args.model, args.sequences, args.length, args.vocabulary, args.experts, args.threads)
    if args.output == "json":
        print(json.dumps(rows))
        return
    show(rows, json.loads(SOURCE.read_text(encoding="utf-8")) if args.compare else None)


if __name__ == "__main__":
    main()
