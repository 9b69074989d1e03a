"""Makes golden/qwen3_moe/: tiny random Qwen3-MoE checkpoints, each with the logits and routing that transformers computes.

    PY="$(bash golden/make/env.sh)" && "$PY" golden/make/qwen3_moe.py

Each folder is a normal checkpoint (config.json, safetensors) plus expected.json:
    {"cases": [{"tokens": [ids], "logits": [[f32; vocab] per position],
                "routing": [{"layer": model layer, "experts": [[ids] per position], "weights": [[f32] per position]}]}]}
A case has the shape of `cadre logits --tokens .. --routing -o json`. Dense layers do not appear in `routing`.
Experts are ordered by falling probability; weights are after renormalisation where norm_topk_prob asks for it.

The numbers are computed from the folder as it lies on disk, read back with AutoModelForCausalLM in float32 (bf16
weights are widened first), eager attention and eager experts. MANIFEST.json holds the versions, the seed of every
variant, how far transformers' own `batched_mm` experts are from its `eager` ones (`noise`, relative to the largest
logit), and the smallest gap between two neighbouring router logits in the picks (`routing_gap`): the seed is the
first one for which the gap exceeds 1e-3, so that rounding cannot change a pick.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

from common import ROOT, f32_list, forward, moe_layers, relative_difference, routing_gap, versions, write_json

OUT = ROOT / "golden" / "qwen3_moe"
MIN_GAP = 1e-3

BASE = dict(
    vocab_size=56,
    hidden_size=32,
    intermediate_size=40,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=6,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    rms_norm_eps=1e-6,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=None,
)

# name -> (what it is for, config changes, spelling of config.json, dtype on disk, shards)
VARIANTS = {
    "plain": ("untied head, renormalised top-2", {}, "v5", "float32", 1),
    "tied_v4": (
        "tied embeddings, rope_theta at the top level",
        dict(tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
        "v4",
        "float32",
        1,
    ),
    "raw_topk": (
        "raw softmax weights, top-3",
        dict(norm_topk_prob=False, num_experts_per_tok=3),
        "v4",
        "float32",
        1,
    ),
    "dense_layer": (
        "layer 0 is dense by mlp_only_layers",
        dict(num_hidden_layers=2, mlp_only_layers=[0], num_experts=8, num_experts_per_tok=3),
        "v5",
        "float32",
        1,
    ),
    "sparse_step": (
        "decoder_sparse_step 2: only layer 1 of 3 has experts",
        dict(num_hidden_layers=3, decoder_sparse_step=2, intermediate_size=16),
        "v4",
        "float32",
        1,
    ),
    "odd_sizes": (
        "3 query heads on 1 key head, head_dim 10 (not hidden/heads), 5 experts of width 7, top-3, vocabulary 61",
        dict(
            vocab_size=61,
            hidden_size=28,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=10,
            num_experts=5,
            num_experts_per_tok=3,
            moe_intermediate_size=7,
            rms_norm_eps=1e-5,
            eos_token_id=[1, 2],
        ),
        "v5",
        "float32",
        1,
    ),
    "top1": (
        "top-1 with raw weights, one key head per query head",
        dict(num_key_value_heads=4, num_experts=5, num_experts_per_tok=1, norm_topk_prob=False),
        "v5",
        "float32",
        1,
    ),
    "bf16_sharded": (
        "bf16 weights in three shards with an index",
        dict(num_experts=8, num_experts_per_tok=4, eos_token_id=[1, 3]),
        "v4",
        "bfloat16",
        3,
    ),
}


def randomise(model, seed):
    """Weights large enough that routing, norms and positions all matter: N(0, 1/fan_in), norms 1 + N(0, 0.04)."""
    generator = torch.Generator().manual_seed(seed)
    # An embedding that is also the head must be small, or every logit is huge.
    embed_scale = 0.3 if model.config.tie_word_embeddings else 1.0
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1.0 + 0.2 * noise)
            elif name.endswith("embed_tokens.weight"):
                parameter.copy_(embed_scale * noise)
            else:
                scale = 2.0 if name.endswith("mlp.gate.weight") else 1.0
                parameter.copy_(noise * scale / parameter.shape[-1] ** 0.5)


def v4_config(config):
    """The config.json that transformers 4 wrote for the same model."""
    old = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": config["bos_token_id"],
        "decoder_sparse_step": config["decoder_sparse_step"],
        "eos_token_id": config["eos_token_id"],
        "head_dim": config["head_dim"],
        "hidden_act": "silu",
        "hidden_size": config["hidden_size"],
        "initializer_range": 0.02,
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "max_window_layers": config["num_hidden_layers"],
        "mlp_only_layers": config["mlp_only_layers"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": config["moe_intermediate_size"],
        "norm_topk_prob": config["norm_topk_prob"],
        "num_attention_heads": config["num_attention_heads"],
        "num_experts": config["num_experts"],
        "num_experts_per_tok": config["num_experts_per_tok"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_key_value_heads": config["num_key_value_heads"],
        "output_router_logits": False,
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_scaling": None,
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "torch_dtype": config["dtype"],
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config["vocab_size"],
    }
    return old


def shard(folder, n_shards):
    """Splits model.safetensors into n_shards of whole tensors, with the index that Hugging Face writes."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map, total = {}, 0
    for part in range(n_shards):
        file = f"model-{part + 1:05}-of-{n_shards:05}.safetensors"
        # Round robin, so that the tensors of one expert lie in different shards.
        mine = {name: tensors[name].contiguous() for name in names[part::n_shards]}
        save_file(mine, folder / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in mine}
        total += sum(t.numel() * t.element_size() for t in mine.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "model.safetensors").unlink()


def write_checkpoint(folder, config, seed, spelling, dtype, n_shards):
    """Writes one checkpoint folder through transformers' own save_pretrained."""
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config)).float()
    randomise(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    for extra in folder.iterdir():
        if extra.name not in ("config.json", "model.safetensors"):
            extra.unlink()
    if spelling == "v4":
        text = json.dumps(v4_config(config | {"dtype": dtype}), indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    if n_shards > 1:
        shard(folder, n_shards)


def load(folder, experts):
    """Reads a folder as any user of transformers would, in float32."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation=experts
    ).eval()


def prompts(vocab_size):
    """A prompt of 13 tokens with repeats, and a single token."""
    generator = torch.Generator().manual_seed(7)
    long = torch.randint(0, vocab_size, (11,), generator=generator).tolist()
    return [long + long[:2], [vocab_size - 1]]


def make_variant(name, folder):
    """Tries seeds from 1 until no pick is close to a tie; returns the manifest entry."""
    purpose, changes, spelling, dtype, n_shards = VARIANTS[name]
    config = BASE | changes
    for seed in range(1, 100):
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(folder, config, seed, spelling, dtype, n_shards)
        eager, batched = load(folder, "eager"), load(folder, "batched_mm")
        cases, gap, noise = [], float("inf"), 0.0
        for tokens in prompts(config["vocab_size"]):
            logits, routing = forward(eager, tokens)
            gap = min(gap, routing_gap(routing))
            noise = max(noise, relative_difference(forward(batched, tokens)[0], logits))
            cases.append(
                {
                    "tokens": tokens,
                    "logits": f32_list(logits),
                    "routing": [
                        {
                            "layer": layer["layer"],
                            "experts": layer["experts"].tolist(),
                            "weights": f32_list(layer["weights"]),
                        }
                        for layer in routing
                    ],
                }
            )
        if gap > MIN_GAP:
            write_json(folder / "expected.json", {"cases": cases})
            for file in folder.iterdir():
                file.chmod(0o644)  # safetensors writes files that only the owner can read
            size = sum(f.stat().st_size for f in folder.iterdir())
            return {
                "purpose": purpose,
                "config": spelling,
                "dtype": dtype,
                "shards": n_shards,
                "seed": seed,
                "moe_layers": moe_layers(eager),
                "routing_gap": float(f"{gap:.3g}"),
                "noise": float(f"{noise:.3g}"),
                "bytes": size,
            }
    raise SystemExit(f"qwen3_moe.py: no seed below 100 gives variant {name} a routing gap above {MIN_GAP}")


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    logging.disable_progress_bar()
    variants = {}
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUT.parent) as scratch:
        for name in VARIANTS:
            variants[name] = make_variant(name, Path(scratch) / name)
            print(name, variants[name])
        # Only a complete set replaces the old one.
        for name in VARIANTS:
            shutil.rmtree(OUT / name, ignore_errors=True)
            shutil.move(Path(scratch) / name, OUT / name)
    manifest = {
        "script": "golden/make/qwen3_moe.py",
        "requirements": "golden/make/requirements.txt",
        "versions": versions(),
        "expected": "float32, eager attention, eager experts, one thread",
        "variants": variants,
    }
    write_json(OUT / "MANIFEST.json", manifest)


if __name__ == "__main__":
    main()
