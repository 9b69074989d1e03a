"""Speed of llama.cpp, measured as llama-bench measures it, in a process that keeps the model loaded.

    PY="$(bash bench/peers/llama.sh)"
    "$PY" bench/peers/llama_bench.py MODEL.gguf --threads 2 --tests pp512,tg64,tg64x8 --repeat 3
    "$PY" bench/peers/llama_bench.py MODEL.gguf --threads 2 --serve      # reads commands, so that sides can alternate

One line of JSON per measurement on standard output:
{"test": "pp512", "flash": "auto", "unified": false, "ns": 1980000000, "ts": 258.1}. With --serve the first line says
{"ready": true, ..}, a command is one line such as {"test": "pp512", "flash": "off"}, and the end of the input ends the
process. Names of tests: bench/tests_spec.py.

As in llama-bench: random token ids, logits of the last token of a prompt and of every token that is generated, no sampling,
the cache is emptied before each measurement, and tokens of depth do not count. Only the calls into llama.cpp are timed, not
the Python around them. Several sequences go into one batch of one token each. Everything that no flag names is llama.cpp's
default: keys and values in f16, batches of 2048 and of 512, mapped files, weights repacked where llama.cpp has a layout for them.
"""

import argparse
import ctypes
import json
import random
import resource
import sys
import time
from pathlib import Path

import llama_cpp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests_spec import parse  # noqa: E402

FLASH = {"auto": -1, "off": 0, "on": 1}
LOAD = {"auto": -1, "none": 0, "mmap": 1}
SEED = 4


class Silence:
    """Keeps llama.cpp's log out of the way, but remembers its errors."""

    def __init__(self):
        self.errors = []

        @llama_cpp.llama_log_callback
        def log(level, text, _data):
            if level >= 4:
                self.errors.append(text.decode("utf-8", "replace"))

        self.callback = log
        llama_cpp.llama_log_set(log, ctypes.c_void_p(0))


class Batches:
    """Batches that are filled before the clock starts."""

    def __init__(self, room):
        self.batch = llama_cpp.llama_batch_init(room, 0, 1)

    def fill(self, entries):
        """`entries`: (token, position, sequence, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = int(wanted)
        return batch


class Peer:
    """One loaded model; a context for each combination of settings and sizes that is asked for."""

    def __init__(self, path, threads, repack, load):
        self.silence = Silence()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = repack
        params.load_mode = LOAD[load]
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise ValueError(f"llama.cpp does not load {path}: {self.errors()}")
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.threads = threads
        self.random = random.Random(SEED)
        self.held = None
        self.context = None
        self.batches = Batches(4096)

    def errors(self):
        return " ".join(self.silence.errors).strip()

    def use(self, test, flash, unified):
        """Makes the context that a test needs the current one."""
        # Contexts of one length for short tests: prompts and decoding then share one.
        length = -(-test.n_ctx // 1024) * 1024
        wanted = (flash, unified, test.n_seqs, length)
        if wanted == self.held:
            return
        if self.context:
            llama_cpp.llama_free(self.context)
            self.held = self.context = None
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = length * test.n_seqs
        params.n_seq_max = test.n_seqs
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = FLASH[flash]
        params.kv_unified = unified
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError(f"llama.cpp makes no context of {params.n_ctx} tokens: {self.errors()}")
        self.held = wanted

    def decode(self, entries):
        """Nanoseconds of one call."""
        batch = self.batches.fill(entries)
        start = time.perf_counter_ns()
        code = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_synchronize(self.context)
        took = time.perf_counter_ns() - start
        if code != 0:
            raise ValueError(f"llama_decode returned {code}: {self.errors()}")
        return took

    def prompt(self, sequence, start, count):
        """Reads `count` random tokens of one sequence; nanoseconds."""
        took = 0
        for at in range(0, count, 2048):
            n = min(2048, count - at)
            took += self.decode(
                [(self.token(), start + at + i, sequence, at + i + 1 == count) for i in range(n)]
            )
        return took

    def token(self):
        return self.random.randrange(self.n_vocab)

    def measure(self, test, flash, unified):
        """Nanoseconds of one test, from an empty cache."""
        self.use(test, flash, unified)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        if test.n_depth:
            for sequence in range(test.n_seqs):
                self.prompt(sequence, 0, test.n_depth)
        if test.n_prompt:
            return sum(self.prompt(sequence, test.n_depth, test.n_prompt) for sequence in range(test.n_seqs))
        return sum(
            self.decode([(self.token(), test.n_depth + step, sequence, True) for sequence in range(test.n_seqs)])
            for step in range(test.n_gen)
        )

    def warm_up(self, test, flash, unified):
        """One short run of the same kind."""
        shorter = parse(f"pp{min(test.n_prompt, 64)}" if test.n_prompt else f"tg2x{test.n_seqs}")
        # The same context as the test's own.
        self.use(test, flash, unified)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        if shorter.n_prompt:
            self.prompt(0, 0, shorter.n_prompt)
        else:
            for step in range(2):
                self.decode([(self.token(), step, sequence, True) for sequence in range(test.n_seqs)])


def answer(peer, command):
    """The measurement that a command asks for."""
    name, flash, unified = command["test"], command.get("flash", "auto"), bool(command.get("unified", False))
    if flash not in FLASH:
        raise ValueError(f"flash is {flash!r}; known: {', '.join(FLASH)}")
    test = parse(name)
    peer.warm_up(test, flash, unified)
    ns = peer.measure(test, flash, unified)
    return {"test": name, "flash": flash, "unified": unified, "ns": ns, "ts": test.n_tokens * 1e9 / ns}


def peak_rss_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(peer):
    """Answers commands until there are none."""
    print(json.dumps({"ready": True, "n_vocab": peer.n_vocab, "peak_rss_bytes": peak_rss_bytes()}), flush=True)
    for line in sys.stdin:
        try:
            found = answer(peer, json.loads(line)) | {"peak_rss_bytes": peak_rss_bytes()}
        except (ValueError, KeyError, TypeError) as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)


def arguments():
    parser = argparse.ArgumentParser(description="Speed of llama.cpp on one file.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-repack", action="store_true", help="leave the weights in the layout of the file")
    parser.add_argument("--load", choices=LOAD, default="auto", help="how the file is read")
    parser.add_argument("--serve", action="store_true", help="read commands from standard input")
    parser.add_argument("--tests", default="pp256,pp512,tg64,tg64x8", help="comma separated")
    parser.add_argument("--flash", choices=FLASH, default="auto", help="flash attention")
    parser.add_argument("--unified", action="store_true", help="one cache for all sequences")
    parser.add_argument("--repeat", type=int, default=3)
    return parser.parse_args()


def main():
    args = arguments()
    try:
        peer = Peer(args.model, args.threads, not args.no_repack, args.load)
        if args.serve:
            serve(peer)
            return
        for name in args.tests.split(","):
            for _ in range(args.repeat):
                print(json.dumps(answer(peer, {"test": name, "flash": args.flash, "unified": args.unified})), flush=True)
    except ValueError as error:
        sys.exit(f"llama_bench.py: {error}")


if __name__ == "__main__":
    main()
