#!/usr/bin/env python3
"""Reading ahead while decoding from disk: what is certain (Read-ME's router before the layers) against every way of guessing.

Makes a model of Cadre's own kind with random weights, at the shape of Qwen3-MoE with fewer layers, whose router runs before its
layers and gives each of them picks of its own. Some experts are popular (shares fall as 1 / rank, in another order in every
layer), so that guesses have something to go by. Then decodes with a share of its experts in memory, one side after the other
in every round: `off`, each guess while it helps (`edgemoe`, `popularity`, `previous`) and `exact`. All sides read the same file,
and pick the same experts for the same tokens.

    cargo build --release && python3 bench/ahead/run.py [--cadre target/release/cadre] [--share 0.3] [--rounds 5] [--no-record]
    python3 bench/ahead/run.py --table

Prints a table, and appends a record to bench/record/ahead.jsonl. The model takes 2.9 GB under .cache/data/bench, and is made
once. Needs Python 3.9 or newer, nothing else; Linux.
"""

import argparse
import array
import json
import math
import random
import struct
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from common import append_record, fail, latest_record, machine, now, pin, revision, say, spread, warn_if_busy  # noqa: E402

LAYERS, EXPERTS, USED, HIDDEN, WIDTH, HEADS, KV, HEAD, VOCAB = 4, 64, 4, 2048, 768, 16, 4, 128, 8192
ROUTER = {"hidden_size": 256, "n_layers": 1, "n_heads": 4, "head_dim": 64, "intermediate_size": 256, "per_layer": True}
FOLDER = ROOT / ".cache" / "data" / "bench" / "decoupled-4l-bf16"
SEED, DEVIATION = 6, 0.022
# Of the router's stream, values that are the same for every token: what popularity is made of. They stay out of the
# router's blocks, whose norms have weight 0 there.
CONSTANT, VALUE = 32, 0.3
# Deviation of the part of a logit that depends on the token, and how far popularity spreads them.
SPREAD, POPULARITY = 1.0, 0.8
SIDES = ["off", "edgemoe", "popularity", "previous", "exact"]
BLOCK = 1 << 20


def config():
    return {
        "architectures": ["CadreMoeForCausalLM"], "model_type": "cadre_moe", "hidden_act": "silu", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV,
        "head_dim": HEAD, "intermediate_size": WIDTH, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": False, "eos_token_id": 0, "dtype": "bfloat16",
        "cadre_moe": {
            "layers": list(range(LAYERS)), "n_experts": [EXPERTS] * LAYERS, "top_k": USED, "intermediate_size": WIDTH,
            "router": {"name": "top_k", "norm_topk_prob": True}, "decoupled_router": ROUTER,
        },
    }  # fmt: skip


def tensors():
    """Names and shapes, in the order of the file."""
    yield "model.embed_tokens.weight", [VOCAB, HIDDEN]
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        yield from attention(p, HIDDEN, HEADS, KV, HEAD)
        for expert in range(EXPERTS):
            yield from swiglu(f"{p}mlp.experts.{expert}.", HIDDEN, WIDTH)
    yield "model.norm.weight", [HIDDEN]
    yield "lm_head.weight", [VOCAB, HIDDEN]
    r = ROUTER["hidden_size"]
    yield "model.router.embed_tokens.weight", [VOCAB, r]
    for layer in range(ROUTER["n_layers"]):
        p = f"model.router.layers.{layer}."
        yield from attention(p, r, ROUTER["n_heads"], ROUTER["n_heads"], ROUTER["head_dim"])
        yield from swiglu(f"{p}mlp.", r, ROUTER["intermediate_size"])
    yield "model.router.norm.weight", [r]
    yield "model.router.head.weight", [LAYERS * EXPERTS, r]


def attention(p, d, heads, kv, head):
    """Attention and the norms of a layer."""
    yield p + "input_layernorm.weight", [d]
    yield p + "post_attention_layernorm.weight", [d]
    yield p + "self_attn.q_proj.weight", [heads * head, d]
    yield p + "self_attn.k_proj.weight", [kv * head, d]
    yield p + "self_attn.v_proj.weight", [kv * head, d]
    yield p + "self_attn.o_proj.weight", [d, heads * head]
    yield p + "self_attn.q_norm.weight", [head]
    yield p + "self_attn.k_norm.weight", [head]


def swiglu(p, d, width):
    yield p + "gate_proj.weight", [width, d]
    yield p + "up_proj.weight", [width, d]
    yield p + "down_proj.weight", [d, width]


def bf16(value):
    """Its 16 bits; rounded down, which does not matter here."""
    return struct.unpack("<I", struct.pack("<f", value))[0] >> 16


class Noise:
    """Random numbers by the million: one block, read from another place for every tensor."""

    def __init__(self):
        self.random = random.Random(SEED)
        values = (self.random.gauss(0.0, DEVIATION) for _ in range(BLOCK))
        self.block = array.array("H", (bf16(value) for value in values))
        self.block = self.block + self.block

    def write(self, file, n):
        while n > 0:
            at, length = self.random.randrange(BLOCK), min(n, BLOCK)
            file.write(self.block[at : at + length].tobytes())
            n -= length


def router_table(noise):
    """A row per token: the constant, then noise of deviation 1."""
    r, out = ROUTER["hidden_size"], array.array("H")
    constant = array.array("H", [bf16(VALUE)] * CONSTANT)
    for _ in range(VOCAB):
        own = array.array("H", (bf16(noise.random.gauss(0.0, 1.0)) for _ in range(r - CONSTANT)))
        out += constant + own
    return out


def router_head(noise):
    """A row per expert: its offset on the constant, then noise that makes logits of deviation SPREAD."""
    r, out = ROUTER["hidden_size"], array.array("H")
    # After the norm a token's own values have deviation about 1, and so has the constant VALUE of it.
    scale = SPREAD / math.sqrt(r - CONSTANT)
    for _ in range(LAYERS):
        ranks = list(range(1, EXPERTS + 1))
        noise.random.shuffle(ranks)
        for rank in ranks:
            offset = -POPULARITY * math.log(rank) / (CONSTANT * VALUE)
            out += array.array("H", [bf16(offset)] * CONSTANT)
            out += array.array("H", (bf16(noise.random.gauss(0.0, scale)) for _ in range(r - CONSTANT)))
    return out


def values_of(name, shape, noise):
    """What is not noise; None for that."""
    if name == "model.router.embed_tokens.weight":
        return router_table(noise)
    if name == "model.router.head.weight":
        return router_head(noise)
    if len(shape) > 1:
        return None
    ones = array.array("H", [bf16(1.0)]) * shape[0]
    if name.startswith("model.router.layers.") and name.endswith("layernorm.weight"):
        ones[:CONSTANT] = array.array("H", [0]) * CONSTANT
    return ones


def make():
    """The checkpoint, if it is missing."""
    if (FOLDER / "model.safetensors").is_file():
        return
    say(f"making {FOLDER.relative_to(ROOT)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    noise, partial = Noise(), FOLDER / "model.partial"
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors():
            values = values_of(name, shape, noise)
            if values is None:
                noise.write(file, math.prod(shape))
            else:
                file.write(values.tobytes())
    (FOLDER / "config.json").write_text(json.dumps(config(), indent=1) + "\n")
    partial.rename(FOLDER / "model.safetensors")


def budget(share):
    """Bytes for all weights with this share of the experts in memory, caches and buffers beside it."""
    sizes = {name: 2 * math.prod(shape) for name, shape in tensors()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    # Matrices of routers are f32 in memory, keys and values of a short context and buffers are small.
    return int(sum(sizes.values()) - experts + share * experts) + (64 << 20)


def measure(args, side):
    """The record of one decoding run."""
    command = [
        args.cadre, "bench", "-m", str(FOLDER), "-p", "0", "-n", str(args.tokens), "-r", "1", "-b", "64", "-t", str(args.threads),
        "--mem-budget", str(budget(args.share)), "--read-ahead", side, "-o", "json",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        fail(f"{' '.join(command)}\n{ran.stderr}")
    return json.loads(ran.stdout)[-1]


def row(records):
    """What is kept of a side's rounds."""

    def of(key, digits=4):
        return spread([record[key] or 0.0 for record in records], digits)

    return {
        "tokens_per_second": of("avg_ts", 2),
        "hit_rate": of("hit_rate"),
        "bytes_read_per_token": of("bytes_read_per_token"),
        "stall_ns_per_token": of("stall_ns_per_token"),
        "read_ahead_share": of("read_ahead_share"),
        "wasted_share": of("wasted_share"),
        "disk_bound_share": of("disk_bound_share"),
    }


def table(record):
    lines = [
        f"`{record['model']}`, {100 * record['share']:.0f} % of the experts in memory, {record['threads']} threads, "
        f"{record['machine']['cpu']}, {record['date'][:10]}, commit {record['commit']}, {record['rounds']} rounds.",
        "",
        "| reading ahead | tokens/s (extremes) | waiting for the disk, ms per token | hits in memory | MB read per token | of the reads, begun early | of the reads, in vain |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, found in record["sides"].items():
        speed = found["tokens_per_second"]
        lines.append(
            f"| `{side}` | {speed['median']} ({speed['min']} to {speed['max']}) "
            f"| {found['stall_ns_per_token']['median'] / 1e6:.1f} | {100 * found['hit_rate']['median']:.1f} % "
            f"| {found['bytes_read_per_token']['median'] / 1e6:.1f} | {100 * found['read_ahead_share']['median']:.0f} % "
            f"| {100 * found['wasted_share']['median']:.0f} % |"
        )
    return "\n".join(lines)


def arguments():
    parser = argparse.ArgumentParser(description="Exact reading ahead against guesses.")
    parser.add_argument("--cadre", default=str(ROOT / "target" / "release" / "cadre"))
    parser.add_argument("--share", type=float, default=0.3, help="of the experts that fit into memory")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the newest record's table and stop")
    return parser.parse_args()


def main():
    args = arguments()
    if args.table:
        print(table(latest_record("ahead")))
        return
    make()
    host = machine(args.threads, pin(args.threads))
    warn_if_busy(host)
    records = {side: [] for side in SIDES}
    for index in range(args.rounds):
        # Every other round backwards, so that no side is always after the same one.
        for side in SIDES if index % 2 == 0 else SIDES[::-1]:
            found = measure(args, side)
            records[side].append(found)
            say(f"round {index + 1}: {side} {found['avg_ts']:.2f} tok/s")
    record = {
        "date": now(), "commit": revision(), "machine": host, "model": FOLDER.name, "share": args.share, "threads": args.threads,
        "tokens": args.tokens, "rounds": args.rounds, "sides": {side: row(found) for side, found in records.items()},
    }  # fmt: skip
    if not args.no_record:
        append_record("ahead", record)
    print(table(record))


if __name__ == "__main__":
    main()
