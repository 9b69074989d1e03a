"""One measurement of llama.cpp in a process of its own, which enters a memory control group before it loads the model.

    "$PY" bench/limited/llama.py MODEL.gguf --test tg64 --join /sys/fs/cgroup/memory/NAME/cgroup.procs --no-repack

Tests are those of bench/limited/cases.py. The last line on standard output is JSON: what was measured, or "error". Each part
prints a line when it is done, so that a process that is killed shows how far it came. The interpreter and llama.cpp's
code are loaded before the group is entered, so that only the model, its buffers and the file's pages count.

Decoding stops after --most-seconds, and the rate is that of the tokens done: at a token in several seconds, 64 of them say no
more than 10. Tokens are those that `cadre bench` reads.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1] / "peers"))

import llama_bench  # noqa: E402
from cases import first_tokens, parse  # noqa: E402

# Few enough to end, enough that one slow token does not decide.
LEAST_TOKENS = 4


class Tokens:
    """The ids that `cadre bench` reads: SplitMix64 from 4, scaled to the vocabulary."""

    MASK = (1 << 64) - 1

    def __init__(self, n_vocab):
        self.state = 4
        self.n_vocab = n_vocab

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & self.MASK
        mixed = self.state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & self.MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & self.MASK
        mixed ^= mixed >> 31
        return ((mixed >> 32) * self.n_vocab) >> 32


def read_bytes():
    """Bytes that this process had read from a disk so far; pages that the system read ahead for it among them."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


class Watch:
    """Counts what happens between two moments."""

    def __init__(self):
        self.start = time.perf_counter_ns()
        self.read = read_bytes()
        self.faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt

    def show(self, part, tokens):
        """Prints and returns what happened since."""
        ns = time.perf_counter_ns() - self.start
        found = {
            "part": part, "tokens": tokens, "ns": ns, "read_bytes": read_bytes() - self.read,
            "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - self.faults,
        }  # fmt: skip
        print(json.dumps(found), flush=True)
        return found


def clear(peer):
    llama_bench.llama_cpp.llama_memory_clear(llama_bench.llama_cpp.llama_get_memory(peer.context), True)


def generate(peer, tokens, count, most_seconds):
    """Decodes up to `count` tokens from an empty cache; how many were done."""
    clear(peer)
    start = time.perf_counter()
    for step in range(count):
        peer.decode([(tokens.next(), step, 0, True)])
        if step + 1 >= LEAST_TOKENS and time.perf_counter() - start > most_seconds:
            return step + 1
    return count


def prompt(peer, ids):
    """Reads a prompt from an empty cache; returns its length."""
    clear(peer)
    peer.decode([(token, at, 0, at + 1 == len(ids)) for at, token in enumerate(ids)])
    return len(ids)


def measure(args):
    """Everything from loading on; the last part is what counts."""
    test = parse(args.test)
    loading = Watch()
    peer = llama_bench.Peer(args.model, args.threads, not args.no_repack, args.load)
    peer.use(test.shape, args.flash, False)
    loading.show("load", 0)
    tokens = Tokens(peer.n_vocab)
    if test.kind == "first":
        prompt(peer, first_tokens(test.count))
        return loading.show(test.name, test.count)
    for part in ("warm-up", test.name):
        watch = Watch()
        if test.kind == "pp":
            done = prompt(peer, [tokens.next() for _ in range(test.count)])
        else:
            done = generate(peer, tokens, test.count, args.most_seconds)
        found = watch.show(part, done)
    return found


def arguments():
    parser = argparse.ArgumentParser(description="One measurement of llama.cpp under a memory limit.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--test", required=True, help="such as tg64, pp512, first32")
    parser.add_argument("--join", type=Path, help="cgroup.procs of the group to enter")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-repack", action="store_true")
    parser.add_argument("--load", choices=[*llama_bench.LOAD, "direct"], default="auto")
    parser.add_argument("--flash", choices=llama_bench.FLASH, default="auto")
    parser.add_argument("--most-seconds", type=float, default=60.0, help="end of a decoding part")
    return parser.parse_args()


def main():
    llama_bench.LOAD["direct"] = llama_bench.llama_cpp.LLAMA_LOAD_MODE_DIRECT_IO
    args = arguments()
    if args.join:
        args.join.write_text(str(os.getpid()))
    try:
        found = measure(args)
    except ValueError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        sys.exit(1)
    print(json.dumps(found | {"peak_rss_bytes": llama_bench.peak_rss_bytes()}), flush=True)


if __name__ == "__main__":
    main()
