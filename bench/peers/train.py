"""Training speed of Cadre next to PyTorch + transformers, on the same machine in one run.

    bash bench/peers/train.sh                         # builds nothing: needs target/release/cadre
    bash bench/peers/train.sh --sides torch-grouped_mm,torch-eager --rounds 3
    bash bench/peers/train.sh --sides cadre,cadre-bf16,torch-grouped_mm,torch-eager,torch-grouped_mm-bf16,torch-eager-bf16
    bash bench/peers/train.sh --table                 # the table of the latest record, measuring nothing
    bash bench/peers/train.sh --loss 300 --sides cadre-bf16,torch-grouped_mm   # losses after 300 steps of the same text

The work, the same on every side: a 65 M-parameter Qwen3-MoE from random weights (CONFIG below, untied head), batches of
8 x 256 random tokens, a new one each step; forward, cross entropy, balance loss (coefficient 0.01), backward, clipping to
norm 1, AdamW (0.9, 0.95, 1e-8, weight decay 0.1, lr 3e-4), all in float32; the sides that end in `-bf16` multiply in
bf16 (Cadre's `train.precision = "bf16"`, PyTorch's autocast) and keep weights and optimizer in float32. No checkpointing of activations, no data
loading. transformers counts the balance loss as top_k at uniform routing and Cadre as 1: the same work, another scale.

Every sample is one step. A round runs each side once, in its own process, in an order that turns by one each round; the first
--warmup steps of a process do not count. All sides are pinned to the same --threads CPUs. PyTorch gets what is fastest
for it: fused AdamW, SDPA attention, and of the two expert implementations the better one counts as "PyTorch" in the ratio.

Prints a Markdown table and appends one line to bench/record/train-65m.jsonl.

--loss N instead trains every side once for N steps from the same initial weights (PyTorch's) on the same text (bytes of
recipes/data/synthetic, drawn by --draw) at the same learning rates (warm-up over a tenth of the steps, then half a cosine), and
compares the cross entropies; the record is bench/record/train-65m-loss.jsonl. PyTorch's balance loss is taken per layer here,
as Cadre takes it. `--until M` ends PyTorch's sides after step M; the same command without it goes on from there (in --work).
"""

import argparse
import array
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from common import append_record, fail, latest_record, machine, now, pin, revision, run, say, versions, warn_if_busy  # noqa: E402

RECORD, LOSS_RECORD = "train-65m", "train-65m-loss"
TEXT = ROOT / ".cache" / "data" / "synthetic" / "mixed.train.jsonl"
# Losses that are compared: the mean of so many last steps, since one step's depends on its text.
LAST = 10
RECIPE = ROOT / "recipes" / "bench-65m.toml"

CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
}
BATCH, LENGTH = 8, 256
BALANCE_COEF = 0.01
CLIP_NORM = 1.0
ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SIDES = ["cadre", "cadre-bf16", "torch-grouped_mm", "torch-eager", "torch-grouped_mm-bf16", "torch-eager-bf16"]
DEFAULT_SIDES = "cadre,torch-grouped_mm,torch-eager"


# One side of the comparison, in a process of its own.


def torch_model(side, threads):
    """The model of random weights, the same for every call."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    experts = side.split("-")[1]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**CONFIG, router_aux_loss_coef=BALANCE_COEF, use_cache=False)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
    ).train()
    if model.config._experts_implementation != experts:
        fail(f"transformers did not take experts_implementation={experts}")
    return model


def torch_optimizer(model):
    """Fused AdamW; norms do not decay."""
    import torch

    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": ADAMW["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=ADAMW["lr"], betas=ADAMW["betas"], eps=ADAMW["eps"], fused=True)


def torch_worker(side, steps, threads):
    """Trains `steps` steps with PyTorch and prints the JSON object that `cadre train --bench` prints."""
    import torch

    model = torch_model(side, threads)
    optimizer = torch_optimizer(model)
    bf16 = side.endswith("bf16")
    # transformers shifts the labels itself: the last position of a row is computed, but not scored.
    batches = torch.randint(0, CONFIG["vocab_size"], (steps, BATCH, LENGTH))

    samples, losses = [], []
    for batch in batches:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(input_ids=batch, labels=batch, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        losses.append(loss.item())
        samples.append(BATCH * LENGTH / (time.perf_counter() - start))
    result = {
        "tokens_per_second": statistics.median(samples),
        "samples": samples,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(json.dumps(result))


# The comparison of losses.


def learning_rate(step, steps):
    """Cadre's schedule with its defaults: half a cosine down to a tenth, after `warmup(steps)` steps of linear warm-up."""
    ahead = warmup(steps)
    if step <= ahead:
        return ADAMW["lr"] * step / ahead
    done = (step - ahead) / max(steps - ahead, 1)
    return ADAMW["lr"] * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def warmup(steps):
    return max(steps // 10, 1)


def write_tokens(path, rows, seed):
    """Rows of LENGTH + 1 bytes from places of the text that `seed` draws, as u32."""
    if not TEXT.is_file():
        fail(f"{TEXT} does not exist; run recipes/data/synthetic")
    text = "".join(json.loads(line)["text"] for line in TEXT.read_text(encoding="utf-8").splitlines()).encode()
    draw = random.Random(seed)
    ids = array.array("I")
    for _ in range(rows):
        at = draw.randrange(len(text) - LENGTH)
        ids.extend(text[at : at + LENGTH + 1])
    if sys.byteorder == "big":
        ids.byteswap()
    path.write_bytes(ids.tobytes())


def torch_losses(side, args):
    """Goes on with a side up to step --until; what it takes to go on, and the losses, are in --work."""
    import torch
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    model = torch_model(side, args.threads)
    optimizer = torch_optimizer(model)
    state = args.work / f"{side}.pt"
    losses = []
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]
    ids = torch.frombuffer(bytearray((args.work / "tokens.u32").read_bytes()), dtype=torch.int32).long()
    batches = ids.reshape(args.loss, args.batch, LENGTH + 1)
    experts, top_k = CONFIG["num_experts"], CONFIG["num_experts_per_tok"]
    for step in range(len(losses) + 1, args.until + 1):
        batch = batches[step - 1]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.loss)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=side.endswith("bf16")):
            out = model(input_ids=batch[:, :-1], output_router_logits=True)
            logits = out.logits.float().reshape(-1, CONFIG["vocab_size"])
            cross_entropy = torch.nn.functional.cross_entropy(logits, batch[:, 1:].reshape(-1))
            layers = [load_balancing_loss_func((layer,), experts, top_k) / top_k for layer in out.router_logits]
            loss = cross_entropy + BALANCE_COEF * sum(layers) / len(layers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        losses.append(cross_entropy.item())
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}, state)
    print(json.dumps({"losses": losses}))


def cadre_losses(side, args):
    """The losses of a Cadre side, which takes all steps at once."""
    changes = [
        f"train.precision={'bf16' if side.endswith('bf16') else 'f32'}",
        f"train.steps={args.loss}",
        f"train.warmup_steps={warmup(args.loss)}",
        f"train.batch_size={args.batch}",
        f'start.from="{args.work / "model"}"',
        f"model.max_position_embeddings={CONFIG['max_position_embeddings']}",
    ]
    command = [args.cadre, "train", "--bench", args.recipe, "--steps", args.loss, "-o", "json", "-t", args.threads]
    command += ["--tokens", args.work / "tokens.u32", *(word for change in changes for word in ("--set", change))]
    return json.loads(run(*command))["losses"]


def compare_losses(args):
    """Every side once; prints the table and appends the record when all are done."""
    host = machine(args.threads, pin(args.threads))
    args.work.mkdir(parents=True, exist_ok=True)
    tokens, weights = args.work / "tokens.u32", args.work / "model"
    if not tokens.is_file():
        write_tokens(tokens, args.loss * args.batch, args.draw)
    if not weights.is_dir():
        torch_model("torch-eager", args.threads).save_pretrained(weights)
    losses = {}
    for side in args.sides:
        kept = args.work / f"{side}.json"
        if kept.is_file():
            losses[side] = json.loads(kept.read_text())
            continue
        say(f"{side}: up to step {args.until}")
        if side.startswith("cadre"):
            losses[side] = cadre_losses(side, args)
        else:
            command = [sys.executable, __file__, "--worker", side, "--loss", args.loss, "--until", args.until, "--batch", args.batch]
            losses[side] = json.loads(run(*command, "--work", args.work, "--threads", args.threads))["losses"]
        if len(losses[side]) == args.loss:
            kept.write_text(json.dumps(losses[side]))
    if undone := [side for side in args.sides if len(losses[side]) < args.loss]:
        say(f"not done: {', '.join(undone)}; the same command goes on")
        return
    record = {
        "bench": LOSS_RECORD,
        "date": now(),
        "commit": revision(),
        "machine": host,
        "versions": versions("torch", "transformers"),
        "config": CONFIG | {"batch": args.batch, "length": LENGTH, "steps": args.loss, "text": "synthetic, bytes"},
        "losses": {side: [round(loss, 4) for loss in losses[side]] for side in args.sides},
    }
    if not args.no_record:
        append_record(LOSS_RECORD, record)
    print(loss_table(record))


def loss_table(record):
    """Losses on the way and at the end, and how far each side is from the first of PyTorch."""
    losses, steps, batch = record["losses"], record["config"]["steps"], record["config"]["batch"]
    marks = sorted({1, *(steps * part // 6 for part in range(1, 6))})
    end = {side: statistics.mean(values[-LAST:]) for side, values in losses.items()}
    reference = next((side for side in losses if side.startswith("torch")), None)
    lines = [
        f"Cross entropy of a 65 M-parameter Qwen3-MoE from the same weights on the same text, batch {batch} x {LENGTH},"
        f" {record['date'][:10]}, commit {record['commit']}.",
        "",
        "| side | " + " | ".join(f"step {mark}" for mark in marks) + f" | last {LAST} of {steps} | against {reference} |",
        "|---" * (len(marks) + 3) + "|",
    ]
    for side, values in losses.items():
        against = f"{100 * (end[side] / end[reference] - 1):+.2f} %" if reference else "-"
        at = " | ".join(f"{values[mark - 1]:.4f}" for mark in marks)
        lines.append(f"| {side} | {at} | {end[side]:.4f} | {against} |")
    return "\n".join(lines)


def command_of(side, args):
    steps = str(args.warmup + args.steps)
    if side.startswith("cadre"):
        precision = "bf16" if side.endswith("bf16") else "f32"
        command = [str(args.cadre), "train", "--bench", str(args.recipe), "--steps", steps, "-o", "json"]
        return [*command, "--set", f"train.precision={precision}"]
    return [sys.executable, __file__, "--worker", side, "--steps", steps, "--threads", str(args.threads)]


def run_side(side, args):
    """Runs one side once; returns its samples after warm-up, its losses, and its peak memory in bytes."""
    env = os.environ | {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command_of(side, args), stdout=out, stderr=err, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        text, errors = out.read(), err.read()
    if process.returncode != 0:
        fail(f"{side} exited with {process.returncode}:\n{errors[-2000:]}")
    try:
        result = json.loads(text)
        samples = [float(sample) for sample in result["samples"]]
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{side} did not print the expected JSON object ({error}): {text[:300]!r}")
    if len(samples) != args.warmup + args.steps:
        fail(f"{side} reported {len(samples)} samples for {args.warmup + args.steps} steps")
    check_work(side, result)
    return {
        "samples": [round(sample, 2) for sample in samples[args.warmup :]],
        "loss_first": result["loss_first"],
        "loss_last": result["loss_last"],
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }


def n_parameters():
    """Parameters of CONFIG, counted by hand."""
    c = CONFIG
    d, heads = c["hidden_size"], c["head_dim"]
    attention = 2 * d * heads * (c["num_attention_heads"] + c["num_key_value_heads"]) + 2 * heads
    experts = c["num_experts"] * (3 * d * c["moe_intermediate_size"] + d)
    return c["num_hidden_layers"] * (attention + experts + 2 * d) + 2 * c["vocab_size"] * d + d


def check_work(side, result):
    """A side that does the work has the size asked for, starts near the loss of a uniform guess, and stays finite."""
    if result.get("parameters", n_parameters()) != n_parameters():
        fail(f"{side} trains {result['parameters']} parameters, not the {n_parameters()} of this benchmark")
    uniform = math.log(CONFIG["vocab_size"])
    first, last = result["loss_first"], result["loss_last"]
    if not (uniform - 0.2 < first < uniform + 0.6) or not math.isfinite(last) or last > first + 1.0:
        fail(f"{side} does not train this model: loss {first} to {last}, a uniform guess has {uniform:.3f}")


# Around the measurement.


def summarise(rounds):
    """Median over all samples, and the medians of the rounds, per side."""
    sides = {}
    for side in rounds[0]:
        samples = [sample for r in rounds for sample in r[side]["samples"]]
        sides[side] = {
            "median": round(statistics.median(samples), 1),
            "min": min(samples),
            "max": max(samples),
            "round_medians": [round(statistics.median(r[side]["samples"]), 1) for r in rounds],
            "n_samples": len(samples),
            "peak_rss_bytes": max(r[side]["peak_rss_bytes"] for r in rounds),
            "loss": [round(rounds[0][side]["loss_first"], 4), round(rounds[0][side]["loss_last"], 4)],
        }
    return sides


def ratios(sides):
    """Cadre over the best PyTorch side, and round by round; None when one of them was not measured.

    Cadre's products of bf16 are held against everything that PyTorch offers, those of float32 against float32.
    """
    ours = "cadre-bf16" if "cadre-bf16" in sides else "cadre"
    all_of_them = ours == "cadre-bf16"
    peers = [side for side in sides if side.startswith("torch") and (all_of_them or not side.endswith("bf16"))]
    if ours not in sides or not peers:
        return None
    best = max(peers, key=lambda side: sides[side]["median"])
    by_round = [a / b for a, b in zip(sides[ours]["round_medians"], sides[best]["round_medians"], strict=True)]
    return {
        "of": ours,
        "over": best,
        "ratio": round(sides[ours]["median"] / sides[best]["median"], 3),
        "by_round": [round(value, 3) for value in by_round],
    }


def table(record):
    """The record as Markdown."""
    host = record["machine"]
    lines = [
        f"Training a 65 M-parameter Qwen3-MoE, batch {BATCH} x {LENGTH}, {host['threads']} threads, {host['cpu']}"
        f" ({', '.join(host['isa'])}), {record['date'][:10]}, commit {record['commit']}.",
        "",
        "| side | tok/s, median | min to max | rounds | peak memory |",
        "|---|---|---|---|---|",
    ]
    for side, row in sorted(record["sides"].items(), key=lambda item: -item[1]["median"]):
        lines.append(
            f"| {side} | {row['median']:.0f} | {row['min']:.0f} to {row['max']:.0f}"
            f" | {', '.join(f'{value:.0f}' for value in row['round_medians'])} | {row['peak_rss_bytes'] / 2**30:.2f} GiB |"
        )
    if record["ratio"]:
        found = record["ratio"]
        spread = f"{min(found['by_round']):.2f} to {max(found['by_round']):.2f} by round"
        lines += ["", f"{found.get('of', 'cadre')} / best PyTorch ({found['over']}): **{found['ratio']:.2f}** ({spread})."]
    peers = record["versions"]
    lines += ["", f"PyTorch {peers['torch']}, transformers {peers['transformers']}; load before the run {host['load_before']}."]
    return "\n".join(lines)


def measure(args):
    """All rounds, alternating; returns the record."""
    host = machine(args.threads, pin(args.threads))
    warn_if_busy(host)
    rounds = []
    for index in range(args.rounds):
        turn = index % len(args.sides)
        found = {}
        for side in args.sides[turn:] + args.sides[:turn]:
            found[side] = run_side(side, args)
            median = statistics.median(found[side]["samples"])
            print(f"round {index + 1}/{args.rounds}  {side:22} {median:8.1f} tok/s", file=sys.stderr)
        rounds.append({side: found[side] for side in args.sides})
    sides = summarise(rounds)
    return {
        "bench": RECORD,
        "date": now(),
        "commit": revision(),
        "machine": host,
        "versions": versions("torch", "transformers"),
        "config": CONFIG | {"batch": BATCH, "length": LENGTH, "dtype": "float32"},
        "warmup": args.warmup,
        "steps": args.steps,
        "sides": sides,
        "ratio": ratios(sides),
        "samples": {side: [r[side]["samples"] for r in rounds] for side in args.sides},
    }


def arguments():
    parser = argparse.ArgumentParser(description="Training speed of Cadre next to PyTorch + transformers.")
    parser.add_argument("--cadre", type=Path, default=ROOT / "target" / "release" / "cadre")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--sides", default=DEFAULT_SIDES, help=f"comma separated, of {', '.join(SIDES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a process")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them that do not count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-record", action="store_true", help="print, but append nothing to bench/record/")
    parser.add_argument("--table", action="store_true", help="print the table of the latest record and stop")
    parser.add_argument("--loss", type=int, metavar="STEPS", help="compare the losses of so many steps instead of speed")
    parser.add_argument("--batch", type=int, default=BATCH, help="with --loss: sequences of a step")
    parser.add_argument("--draw", type=int, default=0, metavar="SEED", help="with --loss: which places of the text are drawn")
    parser.add_argument("--until", type=int, metavar="STEP", help="with --loss: stop PyTorch's sides after this step")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "train-loss", help="with --loss: where weights, text and losses are kept")
    parser.add_argument("--worker", choices=SIDES[2:], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.until = min(args.until or args.loss or 0, args.loss or 0)
    if args.worker or args.table:
        return args
    args.sides = args.sides.split(",")
    if unknown := [side for side in args.sides if side not in SIDES]:
        parser.error(f"unknown side {unknown[0]!r}; known: {', '.join(SIDES)}")
    if args.rounds < 1 or args.steps < 1 or args.warmup < 0:
        parser.error("--rounds and --steps must be at least 1, --warmup at least 0")
    if any(side.startswith("cadre") for side in args.sides):
        for path, hint in [(args.cadre, "build it with `cargo build --release`"), (args.recipe, "it is part of the repository")]:
            if not path.is_file():
                parser.error(f"{path} does not exist; {hint}, or leave cadre out of --sides")
    return args


def main():
    args = arguments()
    if args.worker and args.loss:
        torch_losses(args.worker, args)
        return
    if args.worker:
        torch_worker(args.worker, args.steps, args.threads)
        return
    if args.table:
        print(loss_table(latest_record(LOSS_RECORD)) if args.loss else table(latest_record(RECORD)))
        return
    if args.loss:
        compare_losses(args)
        return
    record = measure(args)
    if not args.no_record:
        append_record(RECORD, record)
    print(table(record))


if __name__ == "__main__":
    main()
