"""How fast a plan is applied to a GGUF file, against a plain copy of as many bytes on the same disk.

    cadre trace -m MODEL.gguf --data text.jsonl -o t.parquet
    cadre plan prune --trace t.parquet --keep 0.5 -o half.json
    python3 bench/prune_copy.py MODEL.gguf half.json --cadre target/release/cadre

Each round applies the plan, and copies the first bytes of the model, as many as the output has, by reads and writes of 4 MiB.
Both begin with a file that is not in the cache of the system, and end when the output is on the disk. Outputs are written beside the plan
and removed. Linux; needs only Python's standard library.
"""

import argparse
import os
import statistics
import subprocess
import time
from pathlib import Path

PIECE = 4 << 20


def forget(path):
    """Takes a file out of the cache of the system."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def apply(args, out):
    done = subprocess.run([args.cadre, "apply", "-m", args.model, "--plan", args.plan, "-o", out], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"prune_copy.py: {done.stderr.strip()}")


def copy(args, out, n_bytes):
    with args.model.open("rb") as source, out.open("wb") as target:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        left = n_bytes
        while left > 0:
            piece = source.read(min(PIECE, left))
            target.write(piece)
            left -= len(piece)
        target.flush()
        os.fsync(target.fileno())


def timed(args, out, work):
    forget(args.model)
    start = time.monotonic()
    work(out)
    seconds = time.monotonic() - start
    n_bytes = out.stat().st_size
    out.unlink()
    return n_bytes, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--cadre", type=Path, default=Path(__file__).resolve().parents[1] / "target" / "release" / "cadre")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    folder = args.plan.resolve().parent
    outs = [folder / ".prune_copy.a.gguf", folder / ".prune_copy.b.gguf"]
    shares = []
    print("| round | bytes | apply, MB/s | copy, MB/s | share |\n|---|---|---|---|---|")
    try:
        for at in range(args.rounds):
            n_bytes, ours = timed(args, outs[0], lambda out: apply(args, out))
            _, theirs = timed(args, outs[1], lambda out: copy(args, out, n_bytes))
            shares.append(theirs / ours)
            rates = [n_bytes / 1e6 / seconds for seconds in (ours, theirs)]
            print(f"| {at + 1} | {n_bytes} | {rates[0]:.0f} | {rates[1]:.0f} | {shares[-1]:.0%} |", flush=True)
    finally:
        for out in outs:
            out.unlink(missing_ok=True)
    print(f"\nmedian {statistics.median(shares):.0%} of the speed of a copy")


if __name__ == "__main__":
    main()
