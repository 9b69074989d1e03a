"""Makes golden/gguf/: small GGUF files as the gguf Python package writes them, and what is in them.

    PY="$(bash bench/peers/llama.sh)" && "$PY" golden/make/gguf_files.py

(Not called gguf.py, which would be imported in place of the package.)

all.gguf      every type of metadata, alone and in arrays, with the extremes of its range; tensors of several formats.
aligned.gguf  `general.alignment` 64.
split-0000N-of-00003.gguf  the tensors of all.gguf over three files.
expected.json {"entries": [{"key", "type", "value"}], "tensors": [{"name", "dtype", "shape", "hex"}]} of all.gguf, in
              the order of the file; shapes slowest first. Floats are decimals that read back as the same value.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q
from gguf import GGUFValueType as T

OUT = Path(__file__).resolve().parents[1] / "gguf"
SEED = 3

SCALARS = {
    T.UINT8: ("u8", [0, 255]),
    T.INT8: ("i8", [-128, 127]),
    T.UINT16: ("u16", [0, 65535]),
    T.INT16: ("i16", [-32768, 32767]),
    T.UINT32: ("u32", [0, 2**32 - 1]),
    T.INT32: ("i32", [-(2**31), 2**31 - 1]),
    T.FLOAT32: ("f32", [0.5, -3.4028234663852886e38, 1.401298464324817e-45]),
    T.BOOL: ("bool", [True, False]),
    T.STRING: ("text", ["plain", "gr\u00fcn \u4e2d\u6587 \U0001f600", " \n\u0000 "]),
    T.UINT64: ("u64", [0, 2**64 - 1]),
    T.INT64: ("i64", [-(2**63), 2**63 - 1]),
    T.FLOAT64: ("f64", [0.1, -1.7976931348623157e308]),
}

# name, format, shape (slowest first)
TENSORS = [
    ("token_embd.weight", Q.F32, (5, 3)),
    ("blk.0.ffn_gate_inp.weight", Q.F16, (4, 8)),
    ("blk.0.ffn_norm.weight", Q.BF16, (7,)),
    ("blk.0.ffn_gate_exps.weight", Q.Q8_0, (2, 3, 64)),
    ("blk.0.ffn_up_exps.weight", Q.MXFP4, (2, 3, 32)),
    ("blk.0.ffn_down_exps.weight", Q.Q4_K, (1, 2, 1, 256)),
    ("output.weight", Q.Q6_K, (1, 256)),
]


def entries():
    yield "general.architecture", "text", "test", T.STRING, None
    for kind, (name, values) in SCALARS.items():
        for at, value in enumerate(values):
            yield f"test.{name}.{at}", name, value, kind, None
        yield f"test.{name}.array", f"array of {name}", values, T.ARRAY, kind


def tensor_bytes():
    random = np.random.default_rng(SEED)
    for name, dtype, shape in TENSORS:
        block, size = gguf.GGML_QUANT_SIZES[dtype]
        raw = random.integers(0, 256, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8)
        yield name, dtype, shape, raw


def write(path, alignment=None, **split):
    writer = gguf.GGUFWriter(path, "test", **split)
    for key, _, value, kind, item in entries():
        if key != "general.architecture":
            writer.add_key_value(key, value, kind, item)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, dtype, _, raw in tensor_bytes():
        writer.add_tensor(name, raw, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    for old in OUT.glob("*"):
        old.unlink()
    write(OUT / "all.gguf")
    write(OUT / "aligned.gguf", alignment=64)
    write(OUT / "split.gguf", split_max_tensors=3)
    expected = {
        "entries": [{"key": key, "type": name, "value": value} for key, name, value, _, _ in entries()],
        "tensors": [
            {"name": name, "dtype": dtype.name, "shape": shape, "hex": raw.tobytes().hex()}
            for name, dtype, shape, raw in tensor_bytes()
        ],
    }
    (OUT / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    manifest = {
        "script": "golden/make/gguf_files.py",
        "versions": {"python": platform.python_version(), "gguf": version("gguf"), "numpy": np.__version__},
        "seed": SEED,
        "files": {path.name: path.stat().st_size for path in sorted(OUT.iterdir())},
    }
    (OUT / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")


main()
