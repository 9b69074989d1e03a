"""Measurements of trained models that their logs do not have. Each is a function of (cadre, model folder, data folder) to numbers by name."""

import json
import math
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from stats import jensen_shannon

DOMAINS = ("north", "east", "south", "west")
# Routed experts that are taken away one at a time.
N_ABLATED = 8


class Unavailable(Exception):
    """Why a measurement cannot be made here."""


def run(*command):
    """Standard output of a command that must succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Unavailable(f"{' '.join(map(str, command))}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")
    return done.stdout


def heldout(data):
    """The held-out files as arguments."""
    return [word for domain in DOMAINS for word in ("--data", data / f"{domain}.heldout.jsonl")]


def specialisation(cadre, model, data):
    """js: divergence between the domains' shares of the experts, in bits, mean over layers; 0 when all are routed alike, 2 at most."""
    with tempfile.TemporaryDirectory() as folder:
        trace, profile = Path(folder) / "trace.parquet", Path(folder) / "profile.json"
        run(cadre, "trace", "-m", model, *heldout(data), "-o", trace)
        run(cadre, "trace", "show", trace, "--profile", profile)
        layers = json.loads(profile.read_text(encoding="utf-8"))["layers"]
    return {"js": statistics.fmean(jensen_shannon(layer["shares"]) for layer in layers)}


def difficulty(cadre, model, data):
    """experts.hard and experts.easy: mean experts of tokens after which several could come, and of those after which only one can;
    experts: of all tokens; experts.sd: standard deviation over tokens, mean over layers. Null experts do not count. Needs pyarrow, to read
    the trace."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise Unavailable("pyarrow is not installed") from error
    counts, spread, real = {"hard": [], "easy": []}, {}, real_experts(model)
    with tempfile.TemporaryDirectory() as folder:
        for domain in DOMAINS:
            documents = (data / f"{domain}.heldout.jsonl").read_text(encoding="utf-8").splitlines()
            trace = Path(folder) / f"{domain}.parquet"
            run(cadre, "trace", "-m", model, "--data", data / f"{domain}.heldout.jsonl", "-o", trace)
            table = parquet.read_table(trace, columns=["seq", "pos", "layer", "experts"]).to_pydict()
            marks = next_difficulties(documents, table["seq"], table["pos"])
            for sequence, position, layer, experts in zip(*(table[key] for key in ("seq", "pos", "layer", "experts"))):
                count = sum(expert < real.get(layer, math.inf) for expert in experts)
                spread.setdefault(layer, []).append(count)
                mark = marks.get((sequence, position))
                if mark is not None:
                    counts["hard" if mark == "1" else "easy"].append(count)
    return {
        "experts": statistics.fmean(map(statistics.fmean, spread.values())),
        "experts.hard": statistics.fmean(counts["hard"]),
        "experts.easy": statistics.fmean(counts["easy"]),
        "experts.sd": statistics.fmean(statistics.pstdev(values) for values in spread.values()),
    }


def real_experts(model):
    """{layer: experts that exist}, for models that may have null experts."""
    moe = json.loads((model / "config.json").read_text(encoding="utf-8")).get("cadre_moe", {})
    return dict(zip(moe.get("layers", []), moe.get("n_experts", [])))


def next_difficulties(documents, sequences, positions):
    """For every (sequence, position) the difficulty of the character that comes next: one token is one byte of ASCII, and a document
    that is longer than the context became several sequences, one after the other."""
    lengths = {}
    for sequence, position in zip(sequences, positions):
        lengths[sequence] = max(lengths.get(sequence, 0), position + 1)
    found, ordered = {}, iter(sorted(lengths.items()))
    for line in documents:
        hard, at = json.loads(line)["hard"], 0
        while at < len(hard):
            sequence, length = next(ordered)
            for position in range(length):
                if at + position + 1 < len(hard):
                    found[sequence, position] = hard[at + position + 1]
            at += length
        if at != len(hard):
            raise Unavailable("the trace's sequences are not the documents, byte by byte")
    return found


def ablation(cadre, model, data):
    """ablate.shared: by how much the held-out loss rises when the shared expert of every layer is silenced; ablate.routed: the same for
    a routed expert, the worst of those with the ids 0 to 7; ablate.ratio: the one by the other."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model"
        whole = perplexity_nll(cadre, model, data)

        def without(part):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(model, copy)
            silence(copy / "model.safetensors", part)
            return perplexity_nll(cadre, copy, data) - whole

        shared = without(".mlp.shared_experts.down_proj.weight")
        routed = max(without(f".mlp.experts.{expert}.down_proj.weight") for expert in range(N_ABLATED))
    return {"ablate.shared": shared, "ablate.routed": routed, "ablate.ratio": shared / routed if routed > 0 else float("inf")}


def perplexity_nll(cadre, model, data):
    """Mean over domains of nats per token, by the engine."""
    found = json.loads(run(cadre, "eval", "perplexity", "-m", model, *heldout(data), "-o", "json"))
    return statistics.fmean(domain["nll"] for domain in found["domains"].values())


def silence(path, part):
    """Writes zeros over all tensors of a safetensors file whose names end with `part`."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        wanted = [about["data_offsets"] for name, about in header.items() if name.endswith(part)]
        if not wanted:
            raise Unavailable(f"no tensor of {path.name} ends with {part}")
        for start, end in wanted:
            file.seek(8 + size + start)
            file.write(bytes(end - start))


PROBES = {"specialisation": specialisation, "difficulty": difficulty, "ablation": ablation}
