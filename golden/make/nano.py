"""Makes golden/nano/: what transformers computes from a trained Cadre checkpoint that it loads unchanged.

    PY="$(bash golden/make/env.sh)"
    "$PY" golden/make/nano.py --model models/nano --out golden/nano [--cadre target/release/cadre]

The folder is read with AutoModelForCausalLM and AutoTokenizer, as any user of transformers would; nothing about it is
patched. Everything is computed in float32 (bf16 weights are widened), with eager attention and eager experts.

Files
    expected.json         `prompts`: text, token ids, and per position the id of the largest logit;
                          `texts`: text, token ids, and the text that the ids decode to.
    expected.safetensors  per prompt K: `K.last` [vocab], the logits of the last position; `K.columns` [T, vocab/64]: every
                          64th logit of every position.
    MANIFEST.json         script, versions, sha256 of the checkpoint's files, and the agreement with Cadre if --cadre is given.

With --cadre the program runs `CADRE logits -m MODEL --tokens .. --routing -o json` on each prompt, compares ALL logits of
all positions and all picked experts, prints a table, and exits with 3 when a difference exceeds 1e-4 of the largest logit.
"""

import argparse
import hashlib
import json
import subprocess
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from common import fail, forward, relative_difference, routing_gap, versions, write_json

PROMPTS = [
    "Once upon a time there was a small house at the edge of the forest, and in it lived",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return ",
    "Es war einmal ein König, der hatte drei Töchter. Die jüngste sagte: ",
]
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand a tab\r\nand lines\n\n",
    "fn main() { println!(\"{}\", 0x1F + 3.14e-2); }",
    "3 + 4 * (12 - 5) = 31, so x^2 = 9.",
    "Größe, Straße, naïve, façade",
    "\u65e5\u672c\u8a9e \u043f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627",
    "emoji: \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "combining e\u0301 and a null \x00 byte",
    "don't I'll we've it's",
]
COLUMN_STRIDE = 64
TOLERANCE = 1e-4


def sha256(path):
    """Digest of one file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cadre_logits(cadre, model, tokens):
    """Runs `cadre logits` and returns its JSON object."""
    command = [str(cadre), "logits", "-m", str(model), "--tokens", ",".join(map(str, tokens)), "--routing", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        fail(f"{' '.join(command[:4])} .. exited with {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def compare(cadre, model, tokens, logits, routing):
    """Agreement of Cadre with transformers on one prompt."""
    theirs = cadre_logits(cadre, model, tokens)
    if theirs["tokens"] != tokens:
        fail(f"cadre logits answered for tokens {theirs['tokens']}, asked for {tokens}")
    if [layer["layer"] for layer in theirs["routing"]] != [layer["layer"] for layer in routing]:
        fail("cadre logits lists other MoE layers than the checkpoint has")
    picks = same = 0
    for ours, layer in zip(routing, theirs["routing"], strict=True):
        for mine, its in zip(ours["experts"].tolist(), layer["experts"], strict=True):
            picks += len(mine)
            same += len(set(mine) & set(its))
    return {
        "positions": len(tokens),
        "max_relative_difference": float(f"{relative_difference(theirs['logits'], logits):.3g}"),
        "picks": picks,
        "same_picks": same,
        "routing_gap": float(f"{routing_gap(routing):.3g}"),
    }


def arguments():
    parser = argparse.ArgumentParser(description="Golden logits and token ids of a trained checkpoint, by transformers.")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the golden files")
    parser.add_argument("--cadre", type=Path, help="the cadre binary to compare with")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        fail(f"{args.model} has no config.json; train the model first, or name a checkpoint folder")
    if args.cadre is not None and not args.cadre.is_file():
        fail(f"{args.cadre} does not exist; build it with `cargo build --release`")
    return args


def main():
    args = arguments()
    torch.set_num_threads(2)
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model, report = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    if any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        fail(f"transformers does not load {args.model} cleanly: {report}")
    model.eval()

    prompts, tensors, agreement = [], {}, []
    for index, text in enumerate(PROMPTS):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        logits, routing = forward(model, tokens)
        if not torch.isfinite(logits).all():
            fail(f"logits of prompt {index} are not finite")
        prompts.append({"text": text, "tokens": tokens, "argmax": logits.argmax(-1).tolist()})
        tensors[f"{index}.last"] = logits[-1].contiguous()
        tensors[f"{index}.columns"] = logits[:, ::COLUMN_STRIDE].contiguous()
        if args.cadre is not None:
            agreement.append(compare(args.cadre, args.model, tokens, logits, routing))

    texts = []
    for text in TEXTS:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        decoded = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        texts.append({"text": text, "tokens": tokens, "decoded": decoded})

    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "expected.json", {"column_stride": COLUMN_STRIDE, "prompts": prompts, "texts": texts})
    save_file(tensors, args.out / "expected.safetensors")
    (args.out / "expected.safetensors").chmod(0o644)
    manifest = {
        "script": "golden/make/nano.py",
        "requirements": "golden/make/requirements.txt",
        "versions": versions(),
        "checkpoint": {f.name: sha256(f) for f in sorted(args.model.iterdir()) if f.suffix in (".json", ".safetensors")},
        "expected": "float32, eager attention, eager experts",
    }
    if agreement:
        manifest["cadre"] = {"tolerance": TOLERANCE, "prompts": agreement}
    write_json(args.out / "MANIFEST.json", manifest)

    lossy = [item["text"] for item in texts if item["decoded"] != item["text"]]
    print(f"{len(prompts)} prompts, {len(texts)} texts ({len(lossy)} do not survive decoding) -> {args.out}")
    if agreement:
        print("\n| prompt | positions | max relative difference | same picks |\n|---|---|---|---|")
        for index, row in enumerate(agreement):
            print(f"| {index} | {row['positions']} | {row['max_relative_difference']:.2e} | {row['same_picks']}/{row['picks']} |")
        if max(row["max_relative_difference"] for row in agreement) > TOLERANCE:
            print(f"nano.py: Cadre and transformers differ by more than {TOLERANCE} of the largest logit")
            raise SystemExit(3)


if __name__ == "__main__":
    main()
