"""A mixture of experts split out of a dense model: what the benchmarks of pruning and merging are run on.

The neurons of every layer are parted among a shared expert, of those that are active most often, and E experts
(`cadre split --by activity`), of which a token takes a part. The mixture is then trained for some steps on the text of all
domains (`cadre train`, routers and experts), because a router that has not been trained says little about experts.
"""

import json


def mixture_arguments(parser):
    parser.add_argument("--active", type=int, default=4, help="a token takes one of so many parts of the experts")
    parser.add_argument("--shared", type=int, default=768, help="neurons of an expert for every token")
    parser.add_argument("--look-tokens", type=int, default=4096, help="that neurons are parted by")
    parser.add_argument("--tune", type=int, default=200, help="steps of training after the split; 0: none")
    parser.add_argument("--lr", type=float, default=3e-4, help="highest learning rate of these")


RECIPE = """name = "knee"
seed = 1

[model]
vocab_size = {vocab_size}
hidden_size = {hidden_size}
n_layers = {num_hidden_layers}
n_heads = {num_attention_heads}
n_kv_heads = {num_key_value_heads}
head_dim = {head_dim}
n_experts = {experts}
top_k = {top_k}
moe_intermediate_size = {intermediate_size}
{shared}qk_norm = false
rms_norm_eps = {rms_norm_eps}
rope_theta = {rope_theta}
max_position_embeddings = {max_position_embeddings}
tie_word_embeddings = {tied}

[data]
eval_tokens = 2048
sources = [
{sources}]

[train]
steps = {steps}
batch_size = 4
seq_len = 256
lr = {lr}
min_lr_ratio = 0.1
warmup_steps = 5
precision = "bf16"

[losses]
balance = 0.01
z = 0.0

[start]
from = "{start}"
freeze = ["dense"]

[output]
dir = "{run}"
snapshot_every = {every}
keep = 1
eval_every = {steps}
"""


def split(bench, experts):
    """The folder of the untrained mixture."""
    args = bench.args
    out = bench.folder / f"moe{experts}"
    if not (out / "config.json").is_file():
        data = [x for d in args.domains for x in ("--data", bench.look(d))]
        bench.run(
            "split", "-m", args.model, "--experts", experts, "--top-k", max(1, experts // args.active), "--by", "activity",
            "--shared", args.shared, *data, "--tokens", args.look_tokens, "-t", args.threads, "-o", out,
        )  # fmt: skip
    return out


def mixture(bench, experts):
    """The folder of the mixture, made in the working folder of `bench` unless it is there."""
    args = bench.args
    out, run = split(bench, experts), bench.folder / f"run{experts}"
    if not args.tune:
        return out
    if not (run / "model/config.json").is_file():
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        source = '  {{ domain = "{0}", train = "{1}/{0}.train.jsonl", heldout = "{1}/{0}.heldout.jsonl" }},\n'
        recipe = bench.folder / f"knee{experts}.toml"
        text = RECIPE.format(
            **config, experts=experts, top_k=max(1, experts // args.active), tied=str(config["tie_word_embeddings"]).lower(), steps=args.tune, lr=args.lr, start=out.resolve(),
            sources="".join(source.format(d, args.data.resolve()) for d in args.domains), run=run.resolve(), every=max(1, args.tune // 6),
            shared=f"shared_intermediate_size = {args.shared}\n" if args.shared else "",
        )  # fmt: skip
        recipe.write_text(text, encoding="utf-8")
        bench.run("train", recipe)
    return run / "model"
