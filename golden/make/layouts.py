"""Owns how a golden checkpoint lies on disk: shards, runtime names, FP8 and MXFP4 weights, the version-4 config.json.

Every function works on a folder that transformers' save_pretrained wrote, with the weights in one model.safetensors.
"""

import json
import re

import torch
from safetensors.torch import load_file, save_file

BLOCK = 128
FP4_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def read_tensors(folder):
    """All tensors of model.safetensors."""
    return load_file(folder / "model.safetensors")


def write_tensors(folder, tensors):
    """Replaces model.safetensors."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_config(folder):
    """config.json as a dict."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def write_config(folder, config):
    """Replaces config.json."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def cast(tensors, dtype, keep):
    """Narrows every f32 tensor to `dtype`, except those whose name matches `keep`."""
    return {
        name: tensor if re.search(keep, name) or tensor.dtype != torch.float32 else tensor.to(dtype)
        for name, tensor in tensors.items()
    }


def shard(folder, n_shards):
    """Splits model.safetensors into n_shards of whole tensors, with the index that Hugging Face writes."""
    tensors = read_tensors(folder)
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


def v4_config(config, renames, extra):
    """The config.json that transformers 4 wrote: rope_theta and rope_scaling at the top level, torch_dtype.

    `renames` maps keys to their older name; `extra` is added last, and an extra of ... drops the key.
    """
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    rope = dict(config["rope_parameters"])
    if "rope_theta" in rope:
        old["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        kind = rope.pop("rope_type")
        old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    old["torch_dtype"] = config["dtype"]
    old["transformers_version"] = "4.51.0"
    for new_name, old_name in renames.items():
        if new_name in old:
            old[old_name] = old.pop(new_name)
    old |= extra
    return {key: old[key] for key in sorted(old) if old[key] is not ...}


def runtime_tensors(model):
    """The tensors under the names of the running model, as tools that dump the state dict write them."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def fp8(tensors, keep, generator):
    """Quantises the linear layers of attention and feed-forward blocks to E4M3 with one factor per 128x128 block.

    Returns (tensors on disk, dequantised f32 tensors, the same with every block's factor replaced by the first one's).
    The factors differ by up to 4x between blocks, so that a mixed-up block shows.
    """
    disk, plain, wrong = {}, {}, {}
    for name in sorted(tensors):
        tensor = tensors[name].float()
        if not name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            disk[name] = tensors[name] if re.search(keep, name) else tensors[name].to(torch.bfloat16)
            plain[name] = wrong[name] = disk[name].float()
            continue
        rows, columns = tensor.shape
        grid = (-(-rows // BLOCK), -(-columns // BLOCK))
        factors = torch.empty(grid)
        for i in range(grid[0]):
            for j in range(grid[1]):
                block = tensor[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
                spread = 1.0 + 3.0 * torch.rand((), generator=generator)
                factors[i, j] = block.abs().max() / 448.0 * spread
        spread_out = factors.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
        quantised = (tensor / spread_out).to(torch.float8_e4m3fn)
        disk[name] = quantised
        disk[name + "_scale_inv"] = factors
        plain[name] = quantised.float() * spread_out
        wrong[name] = quantised.float() * factors[0, 0]
    return disk, plain, {"one_scale": wrong}


def mxfp4(tensors, keep, generator):
    """Replaces gpt_oss' expert matrices by random MXFP4 blocks: nibbles [E, rows, columns/32, 16] and exponents.

    Returns (tensors on disk, f32 tensors with the blocks decoded, decoded with the nibbles of each byte swapped). Byte j
    of a block holds values 2j (low nibble) and 2j+1; a value is FP4_VALUES[nibble] * 2^(exponent - 127).
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    table = torch.tensor(FP4_VALUES)
    disk, plain, wrong = {}, {}, {}
    for name in sorted(tensors):
        tensor = tensors[name]
        if not re.search(r"mlp\.experts\.(gate_up|down)_proj$", name):
            disk[name] = tensor if re.search(keep, name) else tensor.to(torch.bfloat16)
            plain[name] = wrong[name] = disk[name].float()
            continue
        experts, columns, rows = tensor.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 126, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        low, high = table[(blocks & 15).long()], table[(blocks >> 4).long()]
        factor = torch.exp2(scales.float() - 127.0).unsqueeze(-1).unsqueeze(-1)

        def decode(first, second):
            values = torch.stack((first, second), dim=-1) * factor
            return values.reshape(experts, rows, columns).transpose(1, 2).contiguous()

        disk[name + "_blocks"], disk[name + "_scales"] = blocks, scales
        plain[name], wrong[name] = decode(low, high), decode(high, low)
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        if not torch.equal(theirs, plain[name]):
            raise ValueError(f"transformers decodes {name} differently")
    return disk, plain, {"swapped_nibbles": wrong}
