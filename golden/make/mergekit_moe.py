"""Makes golden/mergekit/: what mergekit-moe makes of tiny dense models.

    PY="$(bash golden/make/mergekit.sh)" && "$PY" golden/make/mergekit_moe.py

Two random models of each kind (llama, qwen3, qwen2) with a byte-level tokenizer, and for every configuration the tensors of
mergekit's output: routers whole, of all others the shape, the first values and the sum.

    {"cases": [{"config": "NAME.yml", "dtype": "bfloat16", "tensors": {NAME: {"shape": [..], "values": [..], "sum": x}}}]}

`source_model` is the name of a folder beside the configuration. mergekit computes the hidden states in bfloat16, so router
rows of the mode `hidden` are as coarse; everything else is copied.
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from common import ROOT, f32_list, versions, write_json
from mergekit.merge import MergeOptions
from mergekit.moe.config import MoEMergeConfig
from mergekit.scripts.moe import build

OUT = ROOT / "golden" / "mergekit"
SIZES = dict(
    vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0,
    eos_token_id=1,
)  # fmt: skip
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}

CODE = ["fn main() {}", "let x = 1;"]
PROSE = ["The cat sat.", "Once upon a time there was"]


def experts(kind, **more):
    """Two experts for code and prose, the second with `more`."""
    return [
        {"source_model": f"{kind}_a", "positive_prompts": CODE},
        {"source_model": f"{kind}_b", "positive_prompts": PROSE, **more},
    ]


CONFIGS = {
    "llama_hidden": {"base_model": "llama_a", "gate_mode": "hidden", "dtype": "float32", "experts": experts("llama")},
    "llama_negative": {
        "base_model": "llama_b", "gate_mode": "hidden", "dtype": "bfloat16", "experts_per_token": 1,
        "experts": experts("llama", negative_prompts=["fn", "12 + 30"]),
    },
    "llama_average": {
        # Prompts of one length: mergekit's mean counts the padding before shorter ones.
        "base_model": "llama_a", "gate_mode": "hidden_avg", "dtype": "float32",
        "experts": [
            {"source_model": "llama_a", "positive_prompts": ["let x = 1", "let y = 2"]},
            {"source_model": "llama_b", "positive_prompts": ["The cat i", "the dog i"]},
        ],
    },
    "llama_embed": {
        "base_model": "llama_a", "gate_mode": "cheap_embed", "dtype": "float32",
        "experts": experts("llama", negative_prompts=["x"], residual_scale=0.1),
    },
    "qwen3_hidden": {"base_model": "qwen3_a", "gate_mode": "hidden", "experts": experts("qwen3")},
    "qwen2_shared": {
        "base_model": "qwen2_a", "gate_mode": "cheap_embed", "architecture": "qwen", "experts": experts("qwen2"),
        "shared_experts": [{"source_model": "qwen2_a", "positive_prompts": ["all"], "residual_scale": 0.5}],
    },
}  # fmt: skip


def byte_tokenizer():
    """The 256 bytes after a begin and an end token, nothing merged."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *bytes_])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_model(kind, name, seed):
    config_class, model_class = KINDS[kind]
    torch.manual_seed(seed)
    model = model_class(config_class(**SIZES)).to(torch.bfloat16)
    for name_, parameter in model.named_parameters():
        # Wider than at the beginning of training, so that layers change what passes them; and biases that are not 0.
        if parameter.ndim > 1:
            parameter.data.mul_(8.0)
        elif name_.endswith("bias"):
            parameter.data.normal_(0.0, 0.2)
    model.save_pretrained(OUT / name)
    (OUT / name / "generation_config.json").unlink(missing_ok=True)
    byte_tokenizer().save_pretrained(OUT / name)


def outcome(name, config):
    (OUT / f"{name}.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        options = MergeOptions(device="cpu", write_model_card=False)
        build(MoEMergeConfig.model_validate(config), folder, options, device="cpu", allow_all_same=False)
        tensors = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            tensors.update(load_file(file))
    listed = {}
    for tensor_name, tensor in sorted(tensors.items()):
        flat = tensor.float().flatten()
        whole = tensor_name.endswith("gate.weight")
        listed[tensor_name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "values": f32_list(flat if whole else flat[:16]),
            "sum": float(f"{tensor.double().sum().item():.9g}"),
        }
    return {"config": f"{name}.yml", "tensors": listed}


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    for seed, kind in enumerate(KINDS):
        for at, letter in enumerate("ab"):
            make_model(kind, f"{kind}_{letter}", 10 * seed + at)
    # Models are named by their folder.
    os.chdir(OUT)
    cases = [outcome(name, config) for name, config in CONFIGS.items()]
    write_json(OUT / "expected.json", {"cases": cases})
    from importlib.metadata import version

    manifest = {
        "script": "golden/make/mergekit_moe.py",
        "requirements": ["golden/make/requirements.txt", "golden/make/requirements-mergekit.txt"],
        "versions": {**versions(), "mergekit": version("mergekit")},
    }
    write_json(OUT / "MANIFEST.json", manifest)


if __name__ == "__main__":
    main()
