"""Cadre next to llama.cpp: the files that `cadre convert` writes, and real models.

    cargo build --release
    PY="$(bash bench/peers/llama.sh)"
    "$PY" bench/peers/parity_llama.py convert [--only mixtral]           # every folder of golden/, through llama.cpp
    "$PY" bench/peers/parity_llama.py quantize F32.gguf [--types Q4_K_M,Q2_K] [--imatrix]  # quantised by both
    "$PY" bench/peers/parity_llama.py real "$(bash recipes/data/smollm2.sh)" [more GGUF files]

convert: `cadre convert -m FOLDER -o FILE --dtype f32` for every checkpoint folder of golden/; llama.cpp reads the file (f32
keys and values, no flash attention, one thread), and its logits are compared with those that transformers computed from
the folder (expected.json). A row is right when `cadre convert` refuses the folder because programs would differ, when the
largest difference is under 1e-4 of the largest logit, or when ON_PURPOSE names why llama.cpp differs there. Exit code 3
when a row is not right, 1 when nothing could be compared.

quantize: each file through `cadre quantize TYPE` and through llama.cpp's llama_model_quantize, for every type or --types. With
--imatrix, both get the same importance matrix of random numbers, written as llama-imatrix writes them. Tensor by tensor,
formats must be the same; the share of equal bytes is reported, and the squared errors to the weights before, each counted by
its column's importance: those of Cadre's tensors over those of llama.cpp's, format by format, at most 2 % more. And llama.cpp
loads Cadre's file: its logits of a few tokens are set against those of `cadre logits`, and against llama.cpp's own on
its own file. Exit code 3 when a format differs or an error is larger.

real: for each file, logits of PROMPTS, 64 greedy tokens after each, and the perplexity of recipes/data/sample.jsonl (or of
--text) in windows of 512, by `cadre logits`, `cadre run` and `cadre eval` and by llama.cpp: by its defaults, with f32 keys
and values, and with those and without repacking weights for its faster kernels, which round otherwise. Exit code 3 when a
perplexity differs by more than 0.5 %. Continuations are reported as the number of tokens that agree before the first
difference, together with the gap between llama.cpp's two largest logits there: llama.cpp rounds inputs to eight bits, and
where its own settings part, nobody can follow both. So each model is compared once
more with its weights decoded to f32 (f32 keys and values), where nothing is rounded: exit code 3 when those logits differ by
more than 1e-4 of the largest (1e-3 for Gemma, whose GELU llama.cpp looks up in a table of f16),
or when a continuation differs. --no-decoded leaves that out (it needs eight times the room).
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "golden" / "make"))

from llama_logits import SILENCE, Model, decoded, read_documents  # noqa: E402

TOLERANCE = 1e-4
GELU_TOLERANCE = 1e-3
WINDOW = 512
COUNT = 64
TEXT = ROOT / "recipes" / "data" / "sample.jsonl"

NO_WINDOW = "llama.cpp knows no sliding window for this architecture"
ROUTER = "llama.cpp has softmax for SparseMixer and RMS norms for layer norms"
ON_PURPOSE = {
    "deepseek_v2/groups": "llama.cpp ranks groups by their two best experts",
    "deepseek_v2/lite": "llama.cpp reads a model without q_lora only if it has 26 or 27 layers",
    "deepseek_v3/mtp": "llama.cpp takes mscale_all_dim for mscale",
    "deepseek_v3/no_q_lora": "llama.cpp reads a model without q_lora only if it has 26 or 27 layers",
    "gemma3_text/layer_types": "llama.cpp takes every sixth layer as full",
    "gemma3_text/pattern_v4": "llama.cpp takes every sixth layer as full",
    "gpt_oss/bf16": "llama.cpp truncates yarn's range",
    "gpt_oss/mxfp4": "llama.cpp rounds the inputs of MXFP4 matrices",
    "llama/yarn_v4": "llama.cpp ignores yarn's attention factor and betas",
    "mixtral/window": NO_WINDOW,
    "olmoe/bias": "llama.cpp has no biases here",
    "phimoe/jitter_001": ROUTER,
    "phimoe/longrope": ROUTER,
    "phimoe/longrope_long": ROUTER,
    "phimoe/plain": ROUTER,
    "phimoe/runtime_window": ROUTER,
    "qwen2/window": NO_WINDOW,
    "qwen2_moe/window": NO_WINDOW,
    "qwen3/bias": "llama.cpp has no biases here",
    "qwen3/window": NO_WINDOW,
    "qwen3_moe/raw_topk": "llama.cpp always renormalises",
    "qwen3_moe/runtime_window": NO_WINDOW + " and no biases",
    "qwen3_moe/top1": "llama.cpp always renormalises",
}
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a small house at the edge of the forest, and in it lived",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return ",
    "Water boils at 100 degrees Celsius because",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,",
    "Es war einmal ein König, der hatte drei Töchter. Die jüngste",
    "The mitochondria is the powerhouse of the cell. It",
    "In 1969, the first humans",
    "SELECT name, age FROM users WHERE",
    "Photosynthesis is the process by which",
]


def cadre(binary, *arguments):
    """Runs the program; its standard output."""
    done = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ValueError(f"cadre {arguments[0]}: {lines[0] if lines else done.returncode}")
    return done.stdout


def difference(got, want):
    """(largest difference relative to the largest logit, share of positions with the same best token)."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / np.abs(want).max()), float((got.argmax(-1) == want.argmax(-1)).mean())


def folders(only):
    """Checkpoint folders of golden/, as MODEL_TYPE/VARIANT."""
    for expected in sorted((ROOT / "golden").glob("*/*/expected.json")):
        manifest = json.loads((expected.parent.parent / "MANIFEST.json").read_text(encoding="utf-8"))
        name = f"{expected.parent.parent.name}/{expected.parent.name}"
        if manifest["script"] == "golden/make/checkpoints.py" and (only is None or only in name):
            yield name, expected.parent


def one_conversion(binary, name, folder, scratch):
    """One row of the table and whether it is right."""
    out = scratch / "converted.gguf"
    out.unlink(missing_ok=True)
    try:
        cadre(binary, "convert", "-m", folder, "-o", out, "--dtype", "f32")
    except ValueError as error:
        reason = str(error).partition("is not supported: ")[2]
        # A refusal says what the programs that read GGUF would compute otherwise; anything else is a failure.
        return f"| {name} | - | - | {'refused: ' + reason[:170] if reason else error} |", bool(reason)
    try:
        model = Model(out)
    except ValueError as error:
        return f"| {name} | - | - | {ON_PURPOSE.get(name, 'WRONG')} ({str(error)[:140]}) |", name in ON_PURPOSE
    worst, best_token = 0.0, []
    for case in json.loads((folder / "expected.json").read_text(encoding="utf-8"))["cases"]:
        far, same = difference(model.logits(case["tokens"]), case["logits"])
        worst = max(worst, far)
        best_token.append(same)
    model.close()
    limit = GELU_TOLERANCE if name.startswith("gemma3") else TOLERANCE
    note = "" if worst <= limit else ON_PURPOSE.get(name, "WRONG")
    return f"| {name} | {worst:.1e} | {min(best_token):.0%} | {note} |", note != "WRONG"


def convert(args):
    """Compares llama.cpp on Cadre's files with transformers. Returns the exit code."""
    print("| checkpoint | difference | same best token | |\n|---|---|---|---|")
    verdicts = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in folders(args.only):
            row, right = one_conversion(args.cadre, name, folder, Path(scratch))
            print(row, flush=True)
            verdicts.append(right)
    print(f"\n{sum(verdicts)} of {len(verdicts)} are right")
    return 1 if not verdicts else 0 if all(verdicts) else 3


FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14,
    "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q2_K_S": 21, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "MXFP4_MOE": 38,
}  # fmt: skip
# What Cadre's errors may be over llama.cpp's.
MORE_ERROR = 1.02
TOKENS = [1, 17, 200, 3, 99, 42, 150, 7]


def random_importance(path, out):
    """An importance matrix with numbers for every matrix of a file, as llama-imatrix writes it; {name: [matrices, cols]}."""
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(out, arch="imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["random"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    entries = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = [int(n) for n in tensor.shape]
        skipped = ("token_embd.weight", "output.weight")
        if len(shape) < 2 or tensor.name in skipped or not tensor.name.endswith(".weight"):
            continue
        n_matrices, cols = int(np.prod(shape[2:])), shape[0]
        counts = rng.integers(1, 1000, (n_matrices, 1)).astype(np.float32)
        means = (rng.standard_normal((n_matrices, cols)) ** 2 * 10.0 ** rng.integers(-1, 2, (n_matrices, cols))).astype(np.float32)
        sums = means * counts
        writer.add_tensor(f"{tensor.name}.in_sum2", sums)
        writer.add_tensor(f"{tensor.name}.counts", counts)
        entries[tensor.name] = sums / counts
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return entries


def theirs_quantized(path, out, kind, entries, threads):
    """Quantises by llama.cpp."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind]
    params.nthread = threads
    if entries:
        rows = [(name.encode(), np.ascontiguousarray(values).ravel()) for name, values in entries.items()]
        # A row without a name ends the list.
        data = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))()
        for slot, (name, values) in zip(data, rows):
            slot.name, slot.size = name, values.size
            slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(data, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    done = llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), ctypes.byref(params))
    if done != 0:
        raise ValueError(f"llama.cpp does not quantise {path}: {' '.join(SILENCE.errors).strip()}")


def quantize(args):
    """Compares quantised files. Returns the exit code."""
    code = 0
    kinds = args.types.split(",") if args.types else list(FILE_TYPES)
    print("| file | type | format | tensors | with equal bytes | equal bytes | error over llama.cpp's | logits |\n"
          "|---|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        ours, theirs, matrix = (Path(scratch) / name for name in ("ours.gguf", "theirs.gguf", "imatrix.gguf"))
        for path in args.models:
            entries = random_importance(path, matrix) if args.imatrix else {}
            for kind in kinds:
                if kind == "Q2_K_S" and not args.imatrix:
                    continue
                ours.unlink(missing_ok=True)
                more = ["--imatrix", matrix] if args.imatrix else []
                cadre(args.cadre, "quantize", kind, "-m", path, "-o", ours, *more)
                theirs_quantized(path, theirs, kind, entries, args.threads)
                code = max(code, compare_quantized(args, (path, kind), (ours, theirs), entries))
    return code


def logits_of_both(args, ours, theirs):
    """How far `cadre logits` and llama.cpp on its own file are from llama.cpp on Cadre's file."""
    listed = ",".join(map(str, TOKENS))
    cadres = json.loads(cadre(args.cadre, "logits", "-m", ours, "--tokens", listed, "-o", "json"))["logits"]
    models = [Model(file, threads=args.threads) for file in (ours, theirs)]
    rows = [model.logits(TOKENS) for model in models]
    for model in models:
        model.close()
    return f"{difference(cadres, rows[0])[0]:.1e}, {difference(rows[1], rows[0])[0]:.1e}"


def compare_quantized(args, names, files, entries):
    """Prints what is the same in two files, format by format. Returns the exit code."""
    read = lambda file: {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}  # noqa: E731
    values = lambda tensor: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)  # noqa: E731
    (path, kind), (ours, theirs), before = names, map(read, files), read(names[0])
    other = sorted(set(ours) ^ set(theirs))
    other += [name for name in ours if name in theirs and ours[name].tensor_type != theirs[name].tensor_type]
    for name in other:
        kinds = [file[name].tensor_type.name if name in file else "missing" for file in (ours, theirs)]
        print(f"| {path.name} | {kind} | WRONG: {name} {kinds[0]}, llama.cpp {kinds[1]} | | | | | |")
    table = {}
    for name in sorted(set(ours) - set(other)):
        a, b = ours[name].data.view(np.uint8).ravel(), theirs[name].data.view(np.uint8).ravel()
        row = table.setdefault(ours[name].tensor_type.name, [0, 0, 0, 0, 0.0, 0.0])
        same = int((a == b).sum())
        row[0] += 1
        row[1] += same == a.size
        row[2] += same
        row[3] += a.size
        if same < a.size:
            exact = values(before[name])
            weights = entries.get(name, np.ones(1))
            if weights.ndim == 2 and exact.ndim == 3:
                weights = weights[:, None, :]
            row[4] += float((weights * (values(ours[name]) - exact) ** 2).sum())
            row[5] += float((weights * (values(theirs[name]) - exact) ** 2).sum())
    logits = logits_of_both(args, *files)
    worst = 0.0
    for format, (n, whole, same, total, mine, peers) in table.items():
        ratio = mine / peers if peers > 0 else 1.0
        worst = max(worst, ratio)
        print(f"| {path.name} | {kind} | {format} | {n} | {whole} | {same / total:.4%} | {ratio:.4f} | {logits} |", flush=True)
    return 3 if other or worst > MORE_ERROR else 0


def agreement(ours, theirs):
    """Number of leading tokens in common."""
    common = min(len(ours), len(theirs))
    return next((i for i in range(common) if ours[i] != theirs[i]), common)


def one_prompt(args, path, text, ways):
    """One row: logits and continuations of one prompt."""
    answer = json.loads(
        cadre(args.cadre, "run", "-m", path, "-p", text, "-n", COUNT, "--temp", 0, "-o", "json", "-t", args.threads)
    )
    tokens = answer["prompt_tokens"]
    if tokens != (theirs := ways["default"].tokenize(text, special=True)):
        return f"| {text[:30]!r} | tokens differ: {tokens} and {theirs} | | | | | |"
    listed = ",".join(map(str, tokens))
    logits = json.loads(cadre(args.cadre, "logits", "-m", path, "--tokens", listed, "-o", "json"))["logits"]
    rows = {name: way.logits(tokens) for name, way in ways.items()}
    far = [f"{difference(logits, row)[0]:.1e}" for row in rows.values()]
    own = max(difference(row, rows["default"])[0] for row in rows.values())
    found = {name: way.greedy(tokens, COUNT)[0] for name, way in ways.items()}
    gap = "-"
    best = max(found, key=lambda name: agreement(answer["tokens"], found[name]))
    common = agreement(answer["tokens"], found[best])
    if common < len(answer["tokens"]):
        row = ways[best].logits(tokens + found[best][:common])[-1]
        second, first = np.partition(row, -2)[-2:]
        gap = f"{first - second:.3f}"
    same = [str(agreement(answer["tokens"], ids)) for ids in found.values()]
    apart = min(agreement(ids, found["default"]) for ids in found.values())
    cells = [", ".join(far), f"{own:.1e}", ", ".join(same), str(apart), f"{len(answer['tokens'])}", gap]
    return f"| {text[:30]!r} | {' | '.join(cells)} |"


def check_decoded(args, path):
    """Compares a model with its weights decoded to f32. Returns whether logits and continuations agree."""
    agree = True
    architecture = gguf.GGUFReader(path).fields["general.architecture"].contents()
    # llama.cpp looks GELU up in a table of f16.
    limit = GELU_TOLERANCE if architecture.startswith("gemma") else TOLERANCE
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "decoded.gguf"
        decoded(path, plain)
        llama = Model(plain, WINDOW, threads=args.threads)
        print("\nweights decoded to f32\n\n| prompt | logits | tokens in common |\n|---|---|---|")
        for text in PROMPTS:
            tokens = llama.tokenize(text, special=True)
            listed = ",".join(map(str, tokens))
            logits = json.loads(cadre(args.cadre, "logits", "-m", plain, "--tokens", listed, "-o", "json"))["logits"]
            far = difference(logits, llama.logits(tokens))[0]
            ours = json.loads(
                cadre(args.cadre, "run", "-m", plain, "-p", text, "-n", COUNT, "--temp", 0, "-o", "json", "-t", args.threads)
            )["tokens"]
            common = agreement(ours, llama.greedy(tokens, COUNT)[0])
            # Cadre stops at an end token, llama.cpp's list goes on.
            agree &= far <= limit and common == len(ours)
            print(f"| {text[:30]!r} | {far:.1e} | {common} of {len(ours)} |", flush=True)
        llama.close()
    return agree


def real(args):
    """Compares real models. Returns the exit code."""
    code = 0
    for path in args.models:
        ways = {"default": Model(path, WINDOW, default_cache=True, threads=args.threads)}
        ways["f32 cache"] = Model(path, WINDOW, threads=args.threads)
        ways["f32 cache, not repacked"] = Model(path, WINDOW, threads=args.threads, repack=False)
        print(f"\n{path.name}, by llama.cpp: {'; '.join(ways)}\n")
        print("| prompt | logits | llama.cpp from itself | tokens in common | llama.cpp with itself | of | gap there |\n"
              "|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
        for text in PROMPTS:
            print(one_prompt(args, path, text, ways), flush=True)
        ours = json.loads(
            cadre(args.cadre, "eval", "perplexity", "-m", path, "--data", args.text, "-c", WINDOW, "-o", "json")
        )["perplexity"]
        documents = [ways["default"].tokenize(text, special=True) for text in read_documents(args.text)]
        for name, way in ways.items():
            theirs, count = way.perplexity(documents, WINDOW)
            off = abs(ours / theirs - 1)
            print(f"\nperplexity, {name}: Cadre {ours:.4f}, llama.cpp {theirs:.4f} over {count} tokens: {off:.3%} apart")
            code = code if off <= 0.005 else 3
        for way in ways.values():
            way.close()
        if not args.no_decoded and not check_decoded(args, path):
            code = 3
    return code


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cadre", type=Path, default=ROOT / "target" / "release" / "cadre", help="the program")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("convert", help="every folder of golden/ through `cadre convert`")
    one.add_argument("--only", help="only folders whose name contains this")
    one.set_defaults(run=convert)
    three = commands.add_parser("quantize", help="files quantised by both")
    three.add_argument("models", type=Path, nargs="+")
    three.add_argument("--types", help="types of llama-quantize, separated by commas; without it, all that Cadre writes")
    three.add_argument("--imatrix", action="store_true", help="with an importance matrix of random numbers")
    three.add_argument("--threads", type=int, default=2)
    three.set_defaults(run=quantize)
    two = commands.add_parser("real", help="real models")
    two.add_argument("models", type=Path, nargs="+")
    two.add_argument("--text", type=Path, default=TEXT, help="what to measure the perplexity of")
    two.add_argument("--threads", type=int, default=2)
    two.add_argument("--no-decoded", action="store_true", help="not with weights decoded to f32 as well")
    two.set_defaults(run=real)
    args = parser.parse_args()
    if not args.cadre.is_file():
        sys.exit(f"parity_llama.py: {args.cadre} does not exist; build it with `cargo build --release`, or give --cadre")
    sys.exit(args.run(args))


if __name__ == "__main__":
    main()
