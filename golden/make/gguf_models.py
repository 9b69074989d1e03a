"""Makes golden/gguf_models/: checkpoints of golden/ as llama.cpp's own converter writes them, with llama.cpp's logits.

    bash bench/peers/llama.sh && PY="$(bash golden/make/env.sh)" && "$PY" golden/make/gguf_models.py [--all DIR]

Per file golden/gguf_models/NAME/model.gguf (f32 but for MXFP4 experts, no tokenizer) and expected.json, whose cases hold
the tokens and the logits [position][vocab] of llama.cpp: f32 keys and values, no flash attention, one thread.
MANIFEST.json says per file which folder of golden/ it comes from, its architecture in GGUF, and the largest difference
of llama.cpp from transformers over the prompts, relative to the largest logit. Where that is not rounding, `why` says what
llama.cpp does otherwise, and `difference_explained` how far the two are when transformers is made to do the same: the
script fails unless that is under 1e-5 (1e-3 for Gemma 3, see GELU). llama.cpp multiplies MXFP4 weights with inputs that
it rounds to eight bits: there the difference stays large; the same weights decoded to f32 agree to 1e-6.

--all DIR converts every folder of golden/ that the converter takes into DIR and prints the table, without touching golden/.
The converter's code is that of the pinned archive (bench/peers/llama.sh unpacks it); nothing in it is changed but that
the vocabulary is left out, as these folders have none.
"""

import argparse
import json
import logging as python_logging
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch

from checkpoints import distance, load, without
from models import deepseek_v2, deepseek_v3, gemma3_text, gpt_oss, llama
from variants import Without, renormalised, reroute

from common import ROOT, f32_list, fail, relative_difference, write_json

CONVERTER = ROOT / ".cache" / "llama.cpp"
LLAMA_PYTHON = ROOT / ".cache" / "venv" / "llama" / "bin" / "python"
OUT = ROOT / "golden" / "gguf_models"

KEPT = [
    "llama/smollm", "llama/llama3", "mixtral/plain", "mixtral/odd_sizes", "qwen2/tied_v4", "qwen2_moe/plain",
    "qwen3/plain", "qwen3_moe/plain", "qwen3_moe/raw_topk", "olmoe/plain", "granitemoe/plain", "phimoe/plain",
    "phimoe/longrope", "glm4_moe/plain", "deepseek_v2/groups", "deepseek_v3/yarn", "gpt_oss/bf16", "gpt_oss/mxfp4",
    "gemma3_text/pattern_6",
]  # fmt: skip

WINDOW = ("knows no sliding window for this architecture", Without({"sliding_window": None}))
FULL = ("knows no sliding window for this architecture", Without({"layer_types": ["full_attention"] * 2}))
GELU = "looks its GELU up in a table of 16-bit floats"
ROUTER = (
    "renormalises the softmax over the picked experts, where transformers has SparseMixer, and takes the norms as RMS "
    "norms with a bias, where transformers has layer norms"
)
SIZES = (
    "; the rope's mscale is sqrt(1 + ln(4) / ln(16)), from the lengths, not short_mscale or long_mscale; the long factors "
    "hold for every prompt once the context is longer than the original length"
)


def rope_of(architecture, **changes):
    """The rope_parameters of a variant's table, changed; ... drops a key."""
    rope = architecture | changes
    return Without({"rope_parameters": {key: value for key, value in rope.items() if value is not ...}})


def sparse_mixer_off(mscale=None, factors=None):
    """PhiMoE as llama.cpp computes it."""

    def rms_norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) + self.bias

    def apply(model):
        reroute(renormalised)(model)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.forward = types.MethodType(rms_norm, module)
        rotary = model.model.rotary_emb
        if mscale:
            rotary.config.rope_parameters |= {"short_mscale": mscale, "long_mscale": mscale}
        if factors:
            rotary.config.rope_parameters |= {"short_factor": rotary.config.rope_parameters[factors]}

    return Without(patch=apply)


# Folder -> (what llama.cpp does otherwise, transformers made to do the same). The script insists that the two then agree.
DIFFERENT = {
    "deepseek_v2/groups": (
        "ranks groups by the sum of their two best experts, where transformers takes the best one",
        Without(patch=deepseek_v2.groups_by_two_best),
    ),
    "deepseek_v3/mtp": (
        "takes mscale_all_dim for mscale as well",
        rope_of(deepseek_v3.rope(100.0, **deepseek_v3.YARN), mscale=0.4, mscale_all_dim=0.4),
    ),
    "gemma3_text/pattern_6": (GELU, Without()),
    "gemma3_text/pattern_v4": (
        "scales queries by 1/sqrt(head_dim) whatever query_pre_attn_scalar says, takes every sixth layer as full, and "
        + GELU,
        Without({"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention"] * 3}),
    ),
    "gemma3_text/layer_types": (
        "takes every sixth layer as full, without the factor; scales queries by 1/sqrt(head_dim); and " + GELU,
        Without(
            {
                "query_pre_attn_scalar": 10,
                "layer_types": ["sliding_attention"] * 2,
                "rope_parameters": gemma3_text.rope(10.0, 10.0),
            }
        ),
    ),
    "gpt_oss/bf16": (
        "truncates yarn's correction range although the config says truncate false",
        rope_of(gpt_oss.rope(100.0, **gpt_oss.YARN), truncate=True),
    ),
    "gpt_oss/mxfp4": ("rounds the inputs of MXFP4 matrices to eight bits", None),
    "llama/yarn_v4": (
        "reads neither yarn's attention factor nor its betas for this architecture: the defaults hold",
        rope_of(llama.rope(1000.0, **llama.YARN)),
    ),
    "mixtral/window": WINDOW,
    "qwen2/window": ("knows no sliding window for this architecture", Without({"layer_types": ["full_attention"] * 3})),
    "qwen2_moe/window": FULL,
    "qwen3/window": FULL,
    "qwen3_moe/raw_topk": ("renormalises whatever norm_topk_prob says", Without({"norm_topk_prob": True})),
    "qwen3_moe/top1": ("renormalises whatever norm_topk_prob says", Without({"norm_topk_prob": True})),
    "phimoe/plain": (ROUTER, sparse_mixer_off()),
    "phimoe/longrope": (ROUTER + SIZES, sparse_mixer_off(1.5**0.5, "long_factor")),
    "phimoe/longrope_long": (ROUTER + SIZES, sparse_mixer_off(1.5**0.5, "long_factor")),
}


def prepared(folder, scratch):
    """A copy of a folder in the spelling that the converter knows."""
    copy = scratch / folder.parent.name / folder.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    # The published Phi-3.5-MoE files spell the class differently from transformers 5.
    renamed = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}
    config["architectures"] = [renamed.get(name, name) for name in config["architectures"]]
    if config["model_type"] == "phimoe":
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        length = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
        config["original_max_position_embeddings"] = length
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if config["model_type"] == "gemma3_text":
        # Read only to count the vocabulary.
        vocabulary = {"model": {"vocab": {str(i): i for i in range(config["vocab_size"])}}, "added_tokens": []}
        (copy / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return copy


def convert(folder, out):
    """Runs llama.cpp's converter on one folder, without a vocabulary. Returns the architecture's name in GGUF."""
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    config = ModelBase.load_hparams(folder, False)
    model_class = get_model_class(get_model_architecture(config, ModelType.TEXT), mmproj=False)
    with torch.inference_mode():
        model = model_class(folder, gguf.LlamaFileType.ALL_F32, out, eager=True)

        def no_vocabulary():
            model.gguf_writer.add_tokenizer_model("none")
            if not any(key.endswith(".vocab_size") for key in model.gguf_writer.kv_data[0]):
                model.gguf_writer.add_vocab_size(config["vocab_size"])

        model.set_vocab = no_vocabulary
        model.write()
    return gguf.MODEL_ARCH_NAMES[model.model_arch]


def llama_logits(file, cases):
    """llama.cpp's logits of the cases' prompts."""
    command = [LLAMA_PYTHON, ROOT / "golden" / "make" / "llama_logits.py", "logits", file]
    for case in cases:
        command += ["--tokens", ",".join(map(str, case["tokens"]))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(next((line for line in done.stderr.splitlines() if line.startswith("ValueError")), done.stderr))
    return [np.array(answer["logits"], dtype=np.float32) for answer in json.loads(done.stdout)]


def one(name, out, scratch):
    """Converts golden/NAME to `out` and runs it.

    Returns (architecture, cases with llama.cpp's logits, difference from transformers, difference once transformers
    does what DIFFERENT says that llama.cpp does).
    """
    folder = ROOT / "golden" / name
    arch = convert(prepared(folder, scratch), out)
    cases = json.loads((folder / "expected.json").read_text(encoding="utf-8"))["cases"]
    answers = llama_logits(out, cases)
    far = max(relative_difference(got, case["logits"]) for got, case in zip(answers, cases, strict=True))
    explained = None
    if (change := DIFFERENT.get(name, (None, None))[1]) is not None:
        model = without(folder.parent.name, load(folder, "eager", "eager"), change)
        explained = distance(model, [(case["tokens"], got) for got, case in zip(answers, cases, strict=True)])
    cases = [{"tokens": c["tokens"], "logits": f32_list(a)} for c, a in zip(cases, answers, strict=True)]
    return arch, cases, far, explained


def table(directory):
    """Converts everything that the converter takes and prints how far llama.cpp is from transformers."""
    print("| checkpoint | llama.cpp - transformers | why |\n|---|---|---|")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for expected in sorted((ROOT / "golden").glob("*/*/expected.json")):
            name = f"{expected.parent.parent.name}/{expected.parent.name}"
            if not (expected.parent / "config.json").is_file():
                continue
            out = directory / (name.replace("/", "-") + ".gguf")
            try:
                _, _, far, explained = one(name, out, Path(scratch))
                why = DIFFERENT.get(name, ("", None))[0] + (f" (then {explained:.1e})" if explained is not None else "")
                print(f"| {name} | {far:.1e} | {why} |", flush=True)
            except Exception as error:  # whatever the converter or llama.cpp says
                print(f"| {name} | - | {str(error).splitlines()[0][:150]} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", type=Path, metavar="DIR", help="convert everything into DIR and print a table")
    args = parser.parse_args()
    for needed in (CONVERTER / "convert_hf_to_gguf.py", LLAMA_PYTHON):
        if not needed.exists():
            fail(f"{needed} is missing; run bench/peers/llama.sh first")
    sys.path[:0] = [str(CONVERTER / "gguf-py"), str(CONVERTER)]
    python_logging.disable(python_logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    if args.all:
        table(args.all)
        return
    files = {}
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made"
        for name in KEPT:
            folder = made / name.replace("/", "-")
            folder.mkdir(parents=True)
            arch, cases, far, explained = one(name, folder / "model.gguf", Path(scratch))
            rest = far if name not in DIFFERENT else explained
            if rest is not None and rest > (1e-3 if name.startswith("gemma3") else 1e-5):
                fail(f"{name}: llama.cpp and transformers differ by {rest:.1e}")
            write_json(folder / "expected.json", {"cases": cases})
            entry = {"from": f"golden/{name}", "arch": arch, "difference": float(f"{far:.2g}")}
            if name in DIFFERENT:
                entry["why"] = DIFFERENT[name][0]
            if explained is not None:
                entry["difference_explained"] = float(f"{explained:.2g}")
            files[folder.name] = entry
            print(folder.name, files[folder.name], flush=True)
        # Only a complete set replaces the old one.
        shutil.rmtree(OUT, ignore_errors=True)
        shutil.copytree(made, OUT)
    manifest = {
        "script": "golden/make/gguf_models.py",
        "requirements": ["golden/make/requirements.txt", "golden/make/requirements-llama.txt"],
        "llama_cpp_python": "0.3.36",
        "expected": "llama.cpp on the CPU: f32 keys and values, no flash attention, one thread",
        "files": files,
    }
    write_json(OUT / "MANIFEST.json", manifest)


if __name__ == "__main__":
    main()
