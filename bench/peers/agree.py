"""Where llama.cpp agrees with itself, and whether Cadre agrees with it there.

    cargo build --release
    PY="$(bash bench/peers/llama.sh)"
    "$PY" bench/peers/agree.py MODEL.gguf [more] [--decode] [--no-record]

Quantised weights are multiplied by inputs rounded to 8 bits, and every setting of llama.cpp rounds a little otherwise. So an
open prompt has a fixed continuation only where the settings agree. For each model: 64 greedy tokens after each of ten prompts by
`cadre run` and by each of SETTINGS; on how many prompts all settings agree, and whether Cadre gives the same tokens on those.
Where it does not, or where settings differ, the first token that differs is looked at: the gap between the logits of both
candidates in every setting and in Cadre, and with --decode that of the weights decoded to f32, where nothing is rounded (which
needs eight times the room, in the folder for temporary files). A difference is rounding if the gaps of the settings are as small as
they are far from each other and from the exact one; it is a mistake to be found if not.

Prints tables and appends a line of JSON per model to bench/record/agree.jsonl. Exit code 3 if Cadre differs where all settings
agree and its gap is further from theirs than four times what they are from each other.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
# Both folders have a module `common`; the one of the benchmarks is meant.
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "golden" / "make"), str(Path(__file__).parent)]

from common import append_record, now, revision  # noqa: E402
from llama_logits import Model, decoded  # noqa: E402
from parity_llama import COUNT, PROMPTS, WINDOW, agreement, cadre  # noqa: E402

SETTINGS = {
    "defaults": {"default_cache": True},
    "no flash attention": {"default_cache": True, "flash": False},
    "flash attention": {"default_cache": True, "flash": True},
    "f32 cache": {},
    "prompt 1 at a time": {"default_cache": True, "ubatch": 1},
    "prompt 8 at a time": {"default_cache": True, "ubatch": 8},
    "not repacked": {"default_cache": True, "repack": False},
    "f32 cache, not repacked": {"repack": False},
}
# How much further Cadre may be from the settings than they are from each other: they are few, and alike.
SPREADS = 4


def each_setting(path, threads):
    """Every setting with its model, one after the other, sharing weights."""
    shared = {}
    for name, options in SETTINGS.items():
        repack = options.get("repack", True)
        model = Model(path, WINDOW, threads=threads, weights=shared.get(repack), **options)
        shared.setdefault(repack, model)
        yield name, model
        if model is not shared[repack]:
            model.close()
    for model in shared.values():
        model.close()


def cadre_logits(args, path, tokens):
    """Logits behind the last token."""
    listed = ",".join(map(str, tokens))
    out = cadre(args.cadre, "logits", "-m", path, "--tokens", listed, "-o", "json", "-t", args.threads)
    return np.asarray(json.loads(out)["logits"][-1], np.float64)


def first_split(prompt):
    """The longest start that all of llama.cpp's settings and Cadre have in common, and the tokens that follow in each."""
    lists = list(prompt["found"].values()) + [prompt["cadre"]]
    common = min(agreement(lists[0], ids) for ids in lists[1:])
    if any(len(ids) <= common for ids in lists):
        return None
    return lists[0][:common], [ids[common] for ids in lists]


def candidates(nexts):
    """The two tokens that are compared: what most settings take, and what another takes."""
    counts = sorted(set(nexts), key=lambda token: (-nexts.count(token), token))
    return counts[0], nexts[-1] if nexts[-1] != counts[0] else counts[1]


def ask(args, path):
    """Prompts with the continuations of Cadre and of every setting, and gaps where they first differ."""
    prompts = []
    for text in PROMPTS:
        answer = json.loads(
            cadre(args.cadre, "run", "-m", path, "-p", text, "-n", COUNT, "--temp", 0, "-o", "json", "-t", args.threads)
        )
        prompts.append({"text": text, "tokens": answer["prompt_tokens"], "cadre": answer["tokens"], "found": {}})
    for name, model in each_setting(path, args.threads):
        for prompt in prompts:
            if prompt["tokens"] != (theirs := model.tokenize(prompt["text"], special=True)):
                raise ValueError(f"{prompt['text']!r} is {prompt['tokens']} for Cadre and {theirs} for llama.cpp")
            # Cadre stops at an end token, llama.cpp's list goes on.
            prompt["found"][name] = model.greedy(prompt["tokens"], COUNT)[0][: len(prompt["cadre"])]
        print(f"... {name}", file=sys.stderr, flush=True)
    split = [(prompt, parts) for prompt in prompts if (parts := first_split(prompt))]
    for prompt, (start, nexts) in split:
        one, other = candidates(nexts)
        prompt["split"] = {"at": len(start), "candidates": [one, other], "gaps": {}}
    # Logits behind the common start, all settings again: a split is known only when all have run.
    for name, model in each_setting(path, args.threads):
        for prompt, (start, _) in split:
            row = model.logits(prompt["tokens"])[-1]
            for token in start:
                row = model.forward([token])[-1]
            note_gap(prompt, name, row)
    for prompt, (start, _) in split:
        note_gap(prompt, "cadre", cadre_logits(args, path, prompt["tokens"] + start))
    return prompts


def note_gap(prompt, name, row):
    """Remembers by how much the first candidate is ahead of the second."""
    one, other = prompt["split"]["candidates"]
    prompt["split"]["gaps"][name] = round(float(row[one]) - float(row[other]), 4)


def ask_exact(args, path, prompts):
    """The same gaps with weights decoded to f32, by Cadre."""
    split = [prompt for prompt in prompts if "split" in prompt]
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "decoded.gguf"
        decoded(path, plain)
        for prompt in split:
            start = prompt["cadre"][: prompt["split"]["at"]]
            note_gap(prompt, "exact", cadre_logits(args, plain, prompt["tokens"] + start))


def judge(prompt):
    """Whether all settings agree, whether Cadre does so with them, and whether a difference is more than rounding."""
    found = list(prompt["found"].values())
    together = all(ids == found[0] for ids in found)
    same = together and prompt["cadre"] == found[0]
    if not together or same or "split" not in prompt:
        return together, same, False
    gaps = dict(prompt["split"]["gaps"])
    ours, exact = gaps.pop("cadre"), gaps.pop("exact", None)
    theirs = list(gaps.values()) + ([] if exact is None else [exact])
    spread = max(theirs) - min(theirs)
    away = max(min(theirs) - ours, ours - max(theirs))
    return together, same, away > SPREADS * spread


def report(path, prompts):
    """Prints the tables; the summary."""
    print(f"\n{path.name}\n\n| prompt | settings agree | for | Cadre too | for | first difference: gaps |\n|---|---|---|---|---|---|")
    wrong, n_together, n_same, n_some = 0, 0, 0, 0
    for prompt in prompts:
        found, ours = list(prompt["found"].values()), prompt["cadre"]
        together, same, is_wrong = judge(prompt)
        wrong, n_together, n_same = wrong + is_wrong, n_together + together, n_same + same
        n_some += ours in found
        themselves = min(agreement(found[0], ids) for ids in found)
        best = max(agreement(ours, ids) for ids in found)
        gaps = ", ".join(f"{name} {gap:+.3f}" for name, gap in prompt.get("split", {}).get("gaps", {}).items())
        said = ["yes" if together else "no", themselves, "yes" if same else "no", f"{best} of {len(ours)}", gaps]
        print(f"| {prompt['text'][:30]!r} | {' | '.join(map(str, said))}{' WRONG' if is_wrong else ''} |", flush=True)
    print(f"\nall {len(SETTINGS)} settings agree on {n_together} of {len(prompts)} prompts, Cadre with them on {n_same} of these; "
          f"with at least one setting on {n_some}")  # fmt: skip
    return {"all_settings_agree": n_together, "cadre_agrees_there": n_same, "cadre_agrees_with_one": n_some, "wrong": wrong}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--cadre", type=Path, default=ROOT / "target" / "release" / "cadre", help="the program")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decode", action="store_true", help="also with weights decoded to f32")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    code = 0
    for path in args.models:
        prompts = ask(args, path)
        if args.decode:
            ask_exact(args, path, prompts)
        summary = report(path, prompts)
        code = code or (3 if summary["wrong"] else 0)
        if not args.no_record:
            line = {"benchmark": "agree", "date": now(), "commit": revision(), "model": path.name, "tokens": COUNT}
            splits = [{"prompt": p["text"], **p["split"]} for p in prompts if "split" in p]
            append_record("agree", line | {"settings": list(SETTINGS), "prompts": len(prompts)} | summary | {"first_differences": splits})
    sys.exit(code)


if __name__ == "__main__":
    main()
