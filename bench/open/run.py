#!/usr/bin/env python3
"""Opening large checkpoints: wall time and peak memory of `cadre inspect`.

Makes two checkpoints with true headers over holes, so that they are over 10 GB long and take next to no room on the disk:

- a folder of Qwen3-MoE's shapes (48 layers, 128 experts, about 18,900 tensors, bf16) in 4 shards, narrower than the
  published model so that it is about 10 GB;
- a GGUF file of the same shapes, experts stacked, with a vocabulary of 151,936 tokens and as many merges.

Each is inspected 5 times after its pages were dropped from the cache, and 5 times with them in it, in turns. Prints one line of
JSON per checkpoint and appends it to bench/record/open.jsonl (with --no-record it only prints).

    cargo build --release && python3 bench/open/run.py [--cadre target/release/cadre] [--no-record]

Needs Python 3.9 or newer, nothing else; Linux (sparse files, wait4).
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from common import append_record, now, revision  # noqa: E402

ROUNDS = 5
LAYERS, EXPERTS, HIDDEN, WIDTH, HEADS, KV, HEAD, VOCAB = 48, 128, 1024, 256, 32, 4, 128, 151_936
SHARDS = 4
LIMIT_SECONDS, LIMIT_BYTES = 0.050, 50_000_000


def config():
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu",
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV, "head_dim": HEAD, "num_experts": EXPERTS, "num_experts_per_tok": 8,
        "moe_intermediate_size": WIDTH, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "norm_topk_prob": True, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "decoder_sparse_step": 1, "mlp_only_layers": [], "eos_token_id": 151_645,
    }


def tensors():
    """Names and shapes, layer by layer."""
    yield "model.embed_tokens.weight", [VOCAB, HIDDEN]
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        yield p + "input_layernorm.weight", [HIDDEN]
        yield p + "post_attention_layernorm.weight", [HIDDEN]
        yield p + "self_attn.q_proj.weight", [HEADS * HEAD, HIDDEN]
        yield p + "self_attn.k_proj.weight", [KV * HEAD, HIDDEN]
        yield p + "self_attn.v_proj.weight", [KV * HEAD, HIDDEN]
        yield p + "self_attn.o_proj.weight", [HIDDEN, HEADS * HEAD]
        yield p + "self_attn.q_norm.weight", [HEAD]
        yield p + "self_attn.k_norm.weight", [HEAD]
        yield p + "mlp.gate.weight", [EXPERTS, HIDDEN]
        for expert in range(EXPERTS):
            e = f"{p}mlp.experts.{expert}."
            yield e + "gate_proj.weight", [WIDTH, HIDDEN]
            yield e + "up_proj.weight", [WIDTH, HIDDEN]
            yield e + "down_proj.weight", [HIDDEN, WIDTH]
    yield "model.norm.weight", [HIDDEN]
    yield "lm_head.weight", [VOCAB, HIDDEN]


def product(shape):
    n = 1
    for dim in shape:
        n *= dim
    return n


def write(path, head, n_data):
    """`head`, and a hole of `n_data` bytes behind it."""
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + n_data)
        os.fsync(file.fileno())


def make_folder(folder):
    folder.mkdir()
    everything = list(tensors())
    per_shard = -(-len(everything) // SHARDS)
    index = {}
    for no in range(SHARDS):
        name = f"model-{no + 1:05}-of-{SHARDS:05}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for tensor, shape in everything[no * per_shard:(no + 1) * per_shard]:
            size = 2 * product(shape)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            index[tensor] = name
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        write(folder / name, struct.pack("<Q", len(text)) + text, end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2))
    (folder / "config.json").write_text(json.dumps(config()))
    return folder


GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
}


def gguf_tensors():
    yield "token_embd.weight", [VOCAB, HIDDEN]
    for name, shape in tensors():
        parts = name.split(".")
        if len(parts) > 3 and parts[1] == "layers" and "experts" not in parts:
            stem = ".".join(parts[3:-1])
            yield f"blk.{parts[2]}.{GGUF_NAMES[stem]}.weight", shape
    for layer in range(LAYERS):
        yield f"blk.{layer}.ffn_gate_exps.weight", [EXPERTS, WIDTH, HIDDEN]
        yield f"blk.{layer}.ffn_up_exps.weight", [EXPERTS, WIDTH, HIDDEN]
        yield f"blk.{layer}.ffn_down_exps.weight", [EXPERTS, HIDDEN, WIDTH]
    yield "output_norm.weight", [HIDDEN]
    yield "output.weight", [VOCAB, HIDDEN]


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def make_gguf(path):
    entries = []

    def put(key, kind, payload):
        entries.append(text(key) + struct.pack("<I", kind) + payload)

    def number(key, value):
        put(key, 4, struct.pack("<I", value))

    def texts(key, values):
        put(key, 9, struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values)))

    put("general.architecture", 8, text("qwen3moe"))
    a = "qwen3moe."
    for key, value in {
        "block_count": LAYERS, "context_length": 40960, "embedding_length": HIDDEN, "feed_forward_length": 6144,
        "attention.head_count": HEADS, "attention.head_count_kv": KV, "attention.key_length": HEAD,
        "attention.value_length": HEAD, "expert_count": EXPERTS, "expert_used_count": 8,
        "expert_feed_forward_length": WIDTH,
    }.items():
        number(a + key, value)
    put(a + "rope.freq_base", 6, struct.pack("<f", 1e6))
    put(a + "attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-6))
    put("tokenizer.ggml.model", 8, text("gpt2"))
    put("tokenizer.ggml.pre", 8, text("qwen2"))
    texts("tokenizer.ggml.tokens", [f"t{i}" for i in range(VOCAB)])
    put("tokenizer.ggml.token_type", 9, struct.pack("<IQ", 5, VOCAB) + struct.pack("<i", 1) * VOCAB)
    texts("tokenizer.ggml.merges", [f"t{i} t{i + 1}" for i in range(VOCAB - 300)])
    number("tokenizer.ggml.eos_token_id", 151_645)
    table, end, n = [], 0, 0
    for name, shape in gguf_tensors():
        # Norms and routers F32, matrices BF16.
        small = len(shape) == 1 or "gate_inp" in name
        dims = b"".join(struct.pack("<Q", dim) for dim in reversed(shape))
        kind = 0 if small else 30
        table.append(text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, end))
        end += (4 if small else 2) * product(shape)
        end += -end % 32
        n += 1
    head = b"GGUF" + struct.pack("<IQQ", 3, n, len(entries)) + b"".join(entries) + b"".join(table)
    write(path, head + b"\0" * (-len(head) % 32), end)
    return path


def files(path):
    return [path] if path.is_file() else list(path.iterdir())


def drop_cache(path):
    for file in files(path):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(cadre, path):
    """Seconds, peak resident bytes, CPU seconds, and the report of one run."""
    start = time.perf_counter()
    child = subprocess.Popen([cadre, "inspect", "-m", path, "-o", "json"], stdout=subprocess.PIPE)
    report = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"cadre inspect -m {path} failed")
    return seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime, json.loads(report)


def bench(cadre, kind, path):
    samples = {"cold": [], "warm": []}
    for _ in range(ROUNDS):
        drop_cache(path)
        samples["cold"].append(measure(cadre, path))
        samples["warm"].append(measure(cadre, path))
    report = samples["warm"][0][3]
    sizes = [file.stat() for file in files(path)]
    line = {
        "benchmark": "open", "container": kind, "file_bytes": sum(size.st_size for size in sizes),
        "disk_bytes": sum(512 * size.st_blocks for size in sizes),
        "tensors": sum(report["dtypes"].values()), "parameters": report["parameters"]["total"],
    }
    for name, runs in samples.items():
        seconds = [run[0] for run in runs]
        line[name] = {
            "median_s": round(statistics.median(seconds), 5), "min_s": round(min(seconds), 5),
            "max_s": round(max(seconds), 5), "median_cpu_s": round(statistics.median(run[2] for run in runs), 5),
            "peak_rss_bytes": max(run[1] for run in runs),
        }
    worst = max(line["cold"]["median_s"], line["warm"]["median_s"])
    rss = max(line["cold"]["peak_rss_bytes"], line["warm"]["peak_rss_bytes"])
    line["meets_goal"] = worst < LIMIT_SECONDS and rss < LIMIT_BYTES
    return line


def main():
    parser = argparse.ArgumentParser(description="Opening large checkpoints.")
    parser.add_argument("--cadre", default=ROOT / "target/release/cadre", type=pathlib.Path)
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--make", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_folder(args.make / "folder")
        make_gguf(args.make / "model.gguf")
        return
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"the load is {load:.1f}: times are worthless", file=sys.stderr)
    about = {
        "date": now(), "commit": revision(),
        "machine": platform.machine(), "cpus": os.cpu_count(), "load": round(load, 2),
        "profile": args.cadre.resolve().parent.name, "rounds": ROUNDS,
    }
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        # In a process of its own: the peak that the system reports for a child includes that of its parent at the fork.
        subprocess.run([sys.executable, __file__, "--make", scratch], check=True)
        for kind, path in [("safetensors", scratch / "folder"), ("gguf", scratch / "model.gguf")]:
            line = about | bench(args.cadre, kind, path)
            print(json.dumps(line))
            if not args.no_record:
                append_record("open", line)


if __name__ == "__main__":
    main()
