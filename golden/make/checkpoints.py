"""Makes golden/<model_type>/: tiny random checkpoints of every architecture, with what transformers computes from them.

    PY="$(bash golden/make/env.sh)" && "$PY" golden/make/checkpoints.py [MODEL_TYPE ...]

The tables are in golden/make/models/. Each folder is a normal checkpoint (config.json, safetensors) plus expected.json:
    {"cases": [{"tokens": [ids], "logits": [[f32; vocab] per position],
                "routing": [{"layer": model layer, "experts": [[ids] per position], "weights": [[f32] per position]}]}]}
A case has the shape of `cadre logits --tokens .. --routing -o json`. Dense layers do not appear in `routing`; experts are
ordered by falling sorting key of the router; weights are those that multiply the experts' outputs.

The numbers are computed from the folder as it lies on disk, read back with AutoModelForCausalLM in float32 (narrower
weights are widened first; FP8 and MXFP4 weights are decoded by layouts.py), eager attention and eager experts.
MANIFEST.json holds the versions and per variant: the seed; `routing_gap`, the smallest difference between neighbouring
picks and of every other decision of the router (the seed is the first with a gap over 1e-3, so that rounding cannot
change a pick); `noise`, how far transformers' other kernels (SDPA, batched experts) are from the eager ones, relative to
the largest logit; and `without`: for each feature, how far the logits move when it is left out. The script fails when
that is under 1e-2: a reader that forgets the feature must not pass.
"""

import importlib
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import layouts
from common import ROOT, f32_list, fail, forward, moe_layers, relative_difference, routing_gap, versions, write_json

MIN_GAP = 1e-3
VISIBLE = 1e-2
MODEL_TYPES = [
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "llama", "mistral", "qwen2", "qwen3", "granitemoe", "phimoe", "glm4_moe",
    "deepseek_v3", "deepseek_v2", "gpt_oss", "gemma3_text",
]  # fmt: skip


def spread(name, tensor, init, tied):
    """(mean, standard deviation) of a tensor: large enough that routing, norms, biases and positions all matter."""
    for pattern, (mean, deviation) in init.items():
        if re.search(pattern, name):
            return mean, deviation if deviation != "fan1" else tensor.shape[1] ** -0.5
    if name.endswith(("bias", "_bias")):
        return 0.0, 0.3
    if tensor.ndim == 1:
        return 1.0, 0.2
    if name.endswith("embed_tokens.weight"):
        return 0.0, 0.3 if tied else 1.0  # an embedding that is also the head must be small, or every logit is huge
    scale = 2.0 if name.endswith(("mlp.gate.weight", "router.weight")) else 1.0
    return 0.0, (scale, tensor.shape[-1] ** 0.5)


def randomise(model, init, seed):
    """Draws every parameter and the routers' correction biases, in the order of their names."""
    generator = torch.Generator().manual_seed(seed)
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()) + sorted(buffers):
            noise = torch.randn(tensor.shape, generator=generator)
            mean, deviation = spread(name, tensor, init, model.config.tie_word_embeddings)
            if isinstance(deviation, tuple):
                tensor.copy_(noise * deviation[0] / deviation[1])
            else:
                tensor.copy_(mean + deviation * noise if mean else deviation * noise)


def build(model_type, config):
    """A model in float32 with the eager kernels."""
    settings = AutoConfig.for_model(model_type, **config)
    settings._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def load(folder, attention, experts):
    """Reads a folder as any user of transformers would, in float32."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, experts_implementation=experts
    ).eval()


def add_mtp(tensors, n_layers, hidden, generator):
    """A multi-token-prediction block behind the last layer: its layer and the tensors that only it has."""
    last = f"model.layers.{n_layers - 1}."
    new = f"model.layers.{n_layers}."

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    tensors |= {new + name[len(last) :]: noise(*t.shape) for name, t in tensors.items() if name.startswith(last)}
    for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight"):
        tensors[new + name] = noise(hidden)
    tensors[new + "eh_proj.weight"] = noise(hidden, 2 * hidden)
    tensors[new + "embed_tokens.weight"] = noise(*tensors["model.embed_tokens.weight"].shape)
    tensors[new + "shared_head.head.weight"] = noise(*tensors["model.embed_tokens.weight"].shape)
    return tensors


def write_checkpoint(folder, model_type, arch, variant, seed):
    """Writes one checkpoint folder. Returns the decoded weights and wrong decodings, for the layouts that have them."""
    model = build(model_type, arch.base | variant.config)
    randomise(model, arch.init, seed)
    model.save_pretrained(folder)
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    generator = torch.Generator().manual_seed(seed + 1000)
    tensors = layouts.runtime_tensors(model) if variant.layout == "runtime" else layouts.read_tensors(folder)
    if variant.mtp:
        tensors = add_mtp(tensors, model.config.num_hidden_layers, model.config.hidden_size, generator)
    decoded, wrong = None, {}
    if variant.layout in ("fp8", "mxfp4"):
        tensors, decoded, wrong = getattr(layouts, variant.layout)(tensors, arch.keep_f32, generator)
    else:
        tensors = layouts.cast(tensors, getattr(torch, variant.dtype), arch.keep_f32)
    layouts.write_tensors(folder, tensors)
    config = layouts.read_config(folder) | {"dtype": variant.dtype}
    if variant.spelling == "v4":
        config = arch.v4(config) if arch.v4 else layouts.v4_config(config, arch.v4_renames, arch.v4_extra(config))
    config = {key: value for key, value in (config | variant.extra).items() if value is not ...}
    layouts.write_config(folder, config)
    if variant.shards > 1:
        layouts.shard(folder, variant.shards)
    return decoded, wrong


def readable(folder, tensors, scratch):
    """A copy of a quantised folder with f32 weights, for transformers to read."""
    copy = scratch / "decoded"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    config = layouts.read_config(folder)
    config.pop("quantization_config")
    layouts.write_config(copy, config)
    layouts.write_tensors(copy, tensors)
    return copy


def prompts(vocab_size, lengths):
    """Random prompts that end with a repeat of their beginning; a single token is the last of the vocabulary."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for length in lengths:
        if length == 1:
            made.append([vocab_size - 1])
        else:
            start = torch.randint(0, vocab_size, (length - 2,), generator=generator).tolist()
            made.append(start + start[:2])
    return made


def without(model_type, model, change):
    """The model with one feature left out."""
    config = model.config.to_dict()
    for key in ("architectures", "dtype", "transformers_version", "_name_or_path", "model_type"):
        config.pop(key, None)
    other = build(model_type, config | change.config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for pattern, value in change.fill.items():
            hits = [t for name, t in other.state_dict(keep_vars=True).items() if re.search(pattern, name)]
            if not hits:
                fail(f"{model_type}: no tensor matches {pattern}")
            for tensor in hits:
                tensor.fill_(value)
    if change.patch:
        change.patch(other)
    return other


def distance(model, cases):
    """How far another model's logits are from the expected ones, the largest over the prompts."""
    return max(relative_difference(forward(model, tokens)[0], logits) for tokens, logits in cases)


def step_by_step(model, tokens):
    """Logits computed one token at a time through transformers' cache."""
    cache, rows = None, []
    with torch.no_grad():
        for token in tokens:
            out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, -1].float())
    return torch.stack(rows)


def noise(folder, variant, cases):
    """How far other kernels of transformers are from the eager ones."""
    for attention in ("sdpa", "eager"):
        try:
            other = load(folder, attention, "batched_mm")
            if variant.patch:
                variant.patch(other)
            return distance(other, cases)
        except ValueError:
            continue
    return 0.0


def check_visible(model_type, name, model, cases, variant, decodings):
    """Every way to leave something out must show in the logits."""
    seen = {}
    for feature, change in variant.without.items():
        other = without(model_type, model, change)
        if variant.patch and not change.patch:
            variant.patch(other)
        seen[feature] = distance(other, cases)
    for feature, folder in decodings.items():
        seen[feature] = distance(load(folder, "eager", "eager"), cases)
    for feature, difference in seen.items():
        if not difference > VISIBLE:
            fail(f"{model_type}/{name}: leaving out {feature} moves the logits by {difference:.2e} only")
    return {feature: float(f"{difference:.2g}") for feature, difference in seen.items()}


def expect(folder, model, variant):
    """Runs the prompts: (cases for expected.json, [(tokens, logits)], smallest routing gap)."""
    cases, pairs, gap = [], [], float("inf")
    for tokens in prompts(model.config.vocab_size, variant.lengths):
        logits, routing = forward(model, tokens)
        gap = min(gap, routing_gap(routing))
        pairs.append((tokens, logits))
        rows = [
            {"layer": r["layer"], "experts": r["experts"].tolist(), "weights": f32_list(r["weights"])} for r in routing
        ]
        case = {"tokens": tokens, "logits": f32_list(logits), "routing": rows}
        cases.append(case | ({"prefill_only": True} if variant.prefill_only else {}))
        if not variant.prefill_only and (off := relative_difference(step_by_step(model, tokens), logits)) > 1e-5:
            fail(f"{folder.name}: transformers itself differs by {off:.2e} between prefill and steps")
    return cases, pairs, gap


def make_variant(model_type, arch, name, folder):
    """Tries seeds from 1 until no decision of a router is close to a tie; returns the manifest entry."""
    variant = arch.variants[name]
    scratch = folder.parent
    for seed in range(1, 400):
        shutil.rmtree(folder, ignore_errors=True)
        decoded, wrong = write_checkpoint(folder, model_type, arch, variant, seed)
        source = folder if decoded is None else readable(folder, decoded, scratch)
        model = load(source, "eager", "eager")
        if variant.patch:
            variant.patch(model)
        cases, pairs, gap = expect(folder, model, variant)
        if gap <= MIN_GAP:
            continue
        far = noise(source, variant, pairs)
        decodings = {}
        for feature, tensors in wrong.items():
            decodings[feature] = scratch / feature
            shutil.copytree(readable(folder, tensors, scratch), decodings[feature], dirs_exist_ok=True)
        visible = check_visible(model_type, name, model, pairs, variant, decodings)
        write_json(folder / "expected.json", {"cases": cases})
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes files that only the owner can read
        entry = {
            "purpose": variant.purpose,
            "config": variant.spelling,
            "dtype": variant.dtype,
            "layout": variant.layout,
            "shards": variant.shards,
            "seed": seed,
            "moe_layers": moe_layers(model),
            "routing_gap": float(f"{gap:.3g}") if gap != float("inf") else None,
            "noise": float(f"{far:.3g}"),
            "bytes": sum(f.stat().st_size for f in folder.iterdir()),
            "without": visible,
        }
        return {key: value for key, value in entry.items() if value is not None}
    fail(f"{model_type}/{name}: no seed below 400 gives a routing gap above {MIN_GAP}")


def make(model_type):
    """Replaces golden/<model_type>."""
    arch = importlib.import_module(f"models.{model_type}").ARCHITECTURE
    out = ROOT / "golden" / model_type
    variants = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in arch.variants:
            variants[name] = make_variant(model_type, arch, name, Path(scratch) / name)
            shown = {k: variants[name].get(k) for k in ("seed", "routing_gap", "noise", "bytes", "without")}
            print(model_type, name, shown, flush=True)
        # Only a complete set replaces the old one.
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for name in arch.variants:
            shutil.copytree(Path(scratch) / name, out / name)
    manifest = {
        "script": "golden/make/checkpoints.py",
        "requirements": "golden/make/requirements.txt",
        "versions": versions(),
        "expected": "float32, eager attention, eager experts, one thread",
        "variants": variants,
    }
    write_json(out / "MANIFEST.json", manifest)


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for model_type in sys.argv[1:] or MODEL_TYPES:
        make(model_type)


if __name__ == "__main__":
    main()
