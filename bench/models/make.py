"""Makes GGUF files with random weights, at the shapes of published MoE models, for measuring speed.

    PY="$(bash bench/peers/llama.sh)"
    "$PY" bench/models/make.py --shape qwen3moe --type q8_0,q4_k_m        # prints the paths of the files
    "$PY" bench/models/make.py --shape olmoe --type q8_0 --layers 2       # a quick look
    "$PY" bench/models/make.py --shape qwen3moe --type q4_k_m --routing skewed
    "$PY" bench/models/make.py --list

A file that exists is left alone. The BF16 file is written first (it is the type bf16 and what the others are made from);
the others are quantised from it by llama.cpp itself (llama_model_quantize), so their mixtures of formats are llama.cpp's:
q4_k_m has some tensors in Q6_K, q4_0 has its head in Q6_K, and mxfp4 is llama.cpp's MXFP4_MOE (experts in MXFP4, the rest
in Q8_0). --delete-master removes the BF16 file at the end; it takes a few seconds to write again.

Weights are normal with standard deviation 0.022 and norms are 1, so that logits are near 1 and no expert is favoured over all
texts. Within one text attention's mean makes picks last: in deeper layers 50 to 80 % of them are also the last token's
(routing.py). All tensors are cut from one block of random numbers, each from its own place: what is measured does not depend
on the values. The same arguments give the same BF16 file. The vocabulary is of full size, but it can only spell bytes.

--routing skewed makes some experts popular and lets picks last for some tokens, as in trained models. It is a copy of the file with
random routing, with other norms, routers and first values of the embeddings: skew.py.

Room on the disk: qwen3moe at 6 layers takes 8.7 GB in BF16, 4.6 in Q8_0 and 2.5 to 2.7 in the 4-bit types; olmoe at 4 layers 3.8, 2.0 and 1.1.
Memory: about 1 GB, and what llama.cpp takes to quantise one tensor.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import skew

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "data" / "bench"
SHAPES = {
    "qwen3moe": {
        "layers": 6, "hidden": 2048, "experts": 128, "used": 8, "width": 768, "heads": 32, "kv_heads": 4, "head": 128,
        "vocab": 151_936, "rope_base": 1e6, "epsilon": 1e-6, "qk_norm": "head", "pre": "qwen2",
    },
    "olmoe": {
        "layers": 4, "hidden": 2048, "experts": 64, "used": 8, "width": 1024, "heads": 16, "kv_heads": 16, "head": 128,
        "vocab": 50_304, "rope_base": 1e4, "epsilon": 1e-5, "qk_norm": "all", "pre": "olmo",
    },
}  # fmt: skip
TYPES = {"bf16": None, "q8_0": "Q8_0", "q4_k_m": "Q4_K_M", "q4_0": "Q4_0", "mxfp4": "MXFP4_MOE"}
DEVIATION = 0.022
POOL = (1 << 26) + 12_345
SEED = 4
ROUTINGS = ("random", "skewed")


def file_of(shape, kind, layers=None, routing="random"):
    """Where the file of a shape, a type and a kind of routing is."""
    words = [shape, f"{layers or SHAPES[shape]['layers']}l", *([] if routing == "random" else [routing]), kind]
    return FOLDER / f"{'-'.join(words)}.gguf"


def tensors(s, layers):
    """Name, shape (rows first) and whether it is a matrix (BF16) or stays F32; in the order of the file."""
    d, q, kv = s["hidden"], s["heads"] * s["head"], s["kv_heads"] * s["head"]
    per_head = s["qk_norm"] == "head"
    yield "token_embd.weight", (s["vocab"], d), True
    for layer in range(layers):
        p = f"blk.{layer}."
        yield p + "attn_norm.weight", (d,), False
        yield p + "attn_q.weight", (q, d), True
        yield p + "attn_k.weight", (kv, d), True
        yield p + "attn_v.weight", (kv, d), True
        yield p + "attn_q_norm.weight", (s["head"] if per_head else q,), False
        yield p + "attn_k_norm.weight", (s["head"] if per_head else kv,), False
        yield p + "attn_output.weight", (d, q), True
        yield p + "ffn_norm.weight", (d,), False
        yield p + "ffn_gate_inp.weight", (s["experts"], d), False
        yield p + "ffn_gate_exps.weight", (s["experts"], s["width"], d), True
        yield p + "ffn_up_exps.weight", (s["experts"], s["width"], d), True
        yield p + "ffn_down_exps.weight", (s["experts"], d, s["width"]), True
    yield "output_norm.weight", (d,), False
    yield "output.weight", (s["vocab"], d), True


class Noise:
    """Random numbers by the billion: one block, read from another place for every tensor."""

    def __init__(self):
        self.random = np.random.default_rng(SEED)
        block = self.random.standard_normal(POOL, dtype=np.float32)
        block *= np.float32(DEVIATION)
        bits = block.view(np.uint32)
        # Round to nearest; a carry into the exponent is right, and there is nothing that is not finite.
        bits += 0x8000
        self.bf16 = (bits >> 16).astype(np.uint16)

    def take(self, shape):
        """BF16 numbers as uint16."""
        out = np.empty(int(np.prod(shape, dtype=np.int64)), np.uint16)
        at, done = int(self.random.integers(POOL)), 0
        while done < len(out):
            n = min(POOL - at, len(out) - done)
            out[done : done + n] = self.bf16[at : at + n]
            at, done = (at + n) % POOL, done + n
        return out.reshape(shape)


def bytes_as_letters():
    """The printable letters that GPT-2's vocabularies have for the 256 bytes."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in own]
    letters = {b: chr(b) for b in own} | {b: chr(256 + i) for i, b in enumerate(other)}
    return [letters[b] for b in range(256)]


def describe(writer, name, s, layers):
    """The metadata: what the model is, and a vocabulary."""
    import gguf

    writer.add_name(f"{name} shape, random weights")
    writer.add_block_count(layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(s["hidden"])
    writer.add_feed_forward_length(s["width"])
    writer.add_head_count(s["heads"])
    writer.add_head_count_kv(s["kv_heads"])
    writer.add_key_length(s["head"])
    writer.add_value_length(s["head"])
    writer.add_layer_norm_rms_eps(s["epsilon"])
    writer.add_rope_freq_base(s["rope_base"])
    writer.add_expert_count(s["experts"])
    writer.add_expert_used_count(s["used"])
    writer.add_expert_feed_forward_length(s["width"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    tokens = bytes_as_letters()
    # What the only merge makes has to be a token.
    tokens.append(tokens[0] + tokens[1])
    tokens += [f"<{i}>" for i in range(len(tokens), s["vocab"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(s["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    # llama.cpp refuses a list of merges that is empty or missing; this pair never meets.
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_eos_token_id(s["vocab"] - 1)


def write_master(path, name, layers):
    """Writes the BF16 file, one tensor at a time."""
    import gguf

    s = SHAPES[name]
    noise = Noise()
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, name)
    describe(writer, name, s, layers)
    listed = list(tensors(s, layers))
    for tensor, shape, is_matrix in listed:
        kind = gguf.GGMLQuantizationType.BF16 if is_matrix else gguf.GGMLQuantizationType.F32
        size = (2 if is_matrix else 4) * int(np.prod(shape, dtype=np.int64))
        # BF16 is given in bytes: gguf takes the shape of raw data so.
        stored = (*shape[:-1], 2 * shape[-1]) if is_matrix else shape
        dtype = np.dtype(np.uint8) if is_matrix else np.dtype(np.float32)
        writer.add_tensor_info(tensor, stored, dtype, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, shape, is_matrix in listed:
        if is_matrix:
            writer.write_tensor_data(noise.take(shape).view(np.uint8))
        elif len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, np.float32))
        else:
            router = noise.take(shape).astype(np.uint32) << 16
            writer.write_tensor_data(router.view(np.float32))
    writer.close()
    partial.rename(path)


def quantise(master, path, kind, threads):
    """Lets llama.cpp write `path`."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{TYPES[kind]}")
    partial = path.with_suffix(".partial")
    code = llama_cpp.llama_model_quantize(os.fsencode(master), os.fsencode(partial), params)
    if code != 0:
        sys.exit(f"make.py: llama.cpp could not make {path.name} (code {code})")
    partial.rename(path)


def skewed(source, path, used):
    """Makes the file with skewed routing beside the one with random routing, if it is missing; returns its path."""
    if not path.is_file():
        print(f"make.py: imposing routing on {path.name}", file=sys.stderr)
        partial = path.with_suffix(".partial")
        skew.impose(source, partial, used)
        partial.rename(path)
    return path


def listing():
    for path in sorted(FOLDER.glob("*.gguf")):
        print(f"{path.stat().st_size / 1e9:6.2f} GB  {path}")


def arguments():
    parser = argparse.ArgumentParser(description="Makes GGUF files with random weights.")
    parser.add_argument("--shape", choices=SHAPES, help="which model's shape")
    parser.add_argument("--type", default="q8_0", help=f"comma separated, of {', '.join(TYPES)}")
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--routing", choices=ROUTINGS, default=ROUTINGS[0], help="near uniform, or as of a trained model")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for quantising")
    parser.add_argument("--delete-master", action="store_true", help="remove the BF16 file at the end")
    parser.add_argument("--list", action="store_true", help="print what there is and stop")
    args = parser.parse_args()
    args.type = args.type.split(",")
    if unknown := [kind for kind in args.type if kind not in TYPES]:
        parser.error(f"unknown type {unknown[0]!r}; known: {', '.join(TYPES)}")
    if not args.list and args.shape is None:
        parser.error("--shape is needed")
    if args.layers is not None and args.layers < 1:
        parser.error("--layers must be at least 1")
    if args.routing == "skewed" and args.shape not in (None, "qwen3moe"):
        parser.error("--routing skewed is fitted to --shape qwen3moe only")
    return args


def main():
    args = arguments()
    if args.list:
        listing()
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    master = file_of(args.shape, "bf16", args.layers)
    for kind in args.type:
        path = file_of(args.shape, kind, args.layers)
        if not path.is_file():
            if not master.is_file():
                print(f"make.py: writing {master.name}", file=sys.stderr)
                write_master(master, args.shape, args.layers or SHAPES[args.shape]["layers"])
            if kind != "bf16":
                print(f"make.py: quantising {path.name}", file=sys.stderr)
                quantise(master, path, kind, args.threads)
        if args.routing == "skewed":
            path = skewed(path, file_of(args.shape, kind, args.layers, args.routing), SHAPES[args.shape]["used"])
        print(path)
    if args.delete_master:
        master.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
