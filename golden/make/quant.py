"""Makes golden/quant/: blocks of every GGUF format as gguf dequantises them, rows as ggml quantises them, dot products.

    python3 -m venv .cache/venv/llama
    .cache/venv/llama/bin/pip install llama-cpp-python==0.3.36 gguf==0.19.0
    .cache/venv/llama/bin/python golden/make/quant.py

decode.safetensors  per format `X.bytes` (random blocks, scales ordinary, zero, negative, subnormal and large) and
                    `X.values`, by gguf.quants; Q8_K, which gguf lacks, by ggml's C.
encode.safetensors  `rows` (ordinary and adversarial, 256 values each) and per format `X.bytes`: the rows quantised by
                    ggml_quantize_chunk. gguf's own quantisers are compared; where they differ is in the manifest.
importance.safetensors  `importance` (a row of numbers for each of the rows above) and per format `X.bytes`: the rows
                    quantised by ggml_quantize_chunk with that importance matrix.
dot.safetensors     `x` (activations), their Q8_0, Q8_1 and Q8_K bytes by ggml's x86 code, and per format `X.bytes`
                    (rows of weights) with `X.products`, by ggml_vec_dot_*.
"""

import ctypes
import json
import platform
import struct
from importlib.metadata import version
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gguf import quants

OUT = Path(__file__).resolve().parents[1] / "quant"
LIBRARIES = Path(llama_cpp.__file__).parent / "lib"
BASE = ctypes.CDLL(LIBRARIES / "libggml-base.so")
CPU = ctypes.CDLL(LIBRARIES / "libggml-cpu.so")

# format: values and bytes per block, offsets of its f16 scales, what it is multiplied by in ggml
FORMATS = {
    "Q8_0": (32, 34, [0], "q8_0"),
    "Q4_0": (32, 18, [0], "q8_0"),
    "Q4_1": (32, 20, [0, 2], "q8_1"),
    "Q5_0": (32, 22, [0], "q8_0"),
    "Q5_1": (32, 24, [0, 2], "q8_1"),
    "Q2_K": (256, 84, [80, 82], "q8_K"),
    "Q3_K": (256, 110, [108], "q8_K"),
    "Q4_K": (256, 144, [0, 2], "q8_K"),
    "Q5_K": (256, 176, [0, 2], "q8_K"),
    "Q6_K": (256, 210, [208], "q8_K"),
    "Q8_K": (256, 292, [], None),
    "IQ4_NL": (32, 18, [0], "q8_0"),
    "IQ4_XS": (256, 136, [0], "q8_K"),
    "MXFP4": (32, 17, [], "q8_0"),
}
WRITTEN = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
ACTIVATIONS = {"q8_0": (32, 34), "q8_1": (32, 36), "q8_K": (256, 292)}


def write_safetensors(path, tensors):
    """The file format in full: length of a JSON header, the header, the data."""
    names = {np.dtype(np.uint8): "U8", np.dtype(np.float32): "F32"}
    header, at = {}, 0
    for name, array in tensors.items():
        end = at + array.nbytes
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def c_quantize(library, symbol, rows, block, n_bytes):
    """Rows of f32 through a C function `(x, y, n)`."""
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    out = np.zeros((rows.shape[0], rows.shape[1] // block * n_bytes), np.uint8)
    function = getattr(library, symbol)
    function.restype = None
    for row, bytes_of_row in zip(rows, out):
        function(pointer(row), pointer(bytes_of_row), ctypes.c_int64(row.size))
    return out


def quantize(name, rows, importance=None):
    """Rows of f32 as llama-quantize writes them, each with its row of `importance` where there is one."""
    block, n_bytes, _, _ = FORMATS[name]
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    out = np.zeros((rows.shape[0], rows.shape[1] // block * n_bytes), np.uint8)
    function = BASE.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    kind = ctypes.c_int(int(gguf.GGMLQuantizationType[name]))
    zero, one = ctypes.c_int64(0), ctypes.c_int64(1)
    for at, (row, bytes_of_row) in enumerate(zip(rows, out)):
        weights = None if importance is None else pointer(importance[at])
        written = function(kind, pointer(row), pointer(bytes_of_row), zero, one, ctypes.c_int64(row.size), weights)
        assert written == bytes_of_row.size, (name, written)
    return out


def random_blocks(rng, name, n, wild):
    """Blocks of random bytes with finite scales: ordinary ones, and with `wild` also extreme ones."""
    _, n_bytes, offsets, _ = FORMATS[name]
    blocks = rng.integers(0, 256, (n, n_bytes), dtype=np.uint8)
    extremes = [0.0, -0.0, 6e-8, 3e-5, -1.5, 65504.0, 1.0]
    for i, block in enumerate(blocks):
        for offset in offsets:
            scale = np.float16(rng.uniform(0.001, 0.01) * (1 if rng.random() < 0.8 else -1))
            if wild and i < len(extremes):
                scale = np.float16(extremes[i])
            block[offset : offset + 2] = np.frombuffer(scale.tobytes(), np.uint8)
        if name == "MXFP4":
            exponents = [0, 1, 2, 3, 127, 252, 120] if wild else []
            block[0] = exponents[i] if i < len(exponents) else rng.integers(118, 122)
        if name == "Q8_K":
            scale = np.float32(rng.uniform(-0.1, 0.1))
            block[:4] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks


def decode(rng):
    tensors = {}
    for name, (block, _, _, _) in FORMATS.items():
        blocks = random_blocks(rng, name, 16 if block == 32 else 8, wild=True)
        if name == "Q8_K":
            values = np.zeros((len(blocks), 256), np.float32)
            BASE.dequantize_row_q8_K(pointer(blocks), pointer(values), ctypes.c_int64(values.size))
        else:
            values = quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
        assert np.isfinite(values).all(), name
        tensors[f"{name}.bytes"] = blocks
        tensors[f"{name}.values"] = values.astype(np.float32).reshape(len(blocks), block)
    write_safetensors(OUT / "decode.safetensors", tensors)


def adversarial_rows(rng):
    """Rows of 256 values. Magnitudes stay above 1e-36: below, ggml's C converts out of range."""
    ramp = (np.arange(256) - 128) / 16
    just_below = np.array([2.0**k * (1 - 2.0**-24 * j) for k in (1, 2, 3, 4, 6, 7, -1, -3) for j in (1, 2)])
    rows = {
        "normal": rng.normal(size=256),
        "small": rng.normal(size=256) * 0.02,
        "f16 subnormal scales": rng.normal(size=256) * 1e-5,
        "tiny": rng.normal(size=256) * 1e-12,
        "below the epsilon": rng.normal(size=256) * 1e-17,
        "tinier": rng.normal(size=256) * 1e-30,
        "large": rng.normal(size=256) * 1e4,
        "too large for some": rng.normal(size=256) * 1e6,
        "zeros": np.zeros(256),
        "negative zeros": np.full(256, -0.0),
        "ones": np.ones(256),
        "minus ones": -np.ones(256),
        "ramp": ramp,
        "descending ramp": -ramp,
        "positive": np.abs(rng.normal(size=256)),
        "negative": -np.abs(rng.normal(size=256)),
        "one outlier": np.where(np.arange(256) == 100, 500.0, rng.normal(size=256) * 0.01),
        "one value": np.where(np.arange(256) == 37, -3.0, 0.0),
        "ties of the largest magnitude": np.where(np.arange(256) % 7 == 3, -2.0, np.where(np.arange(256) % 5 == 0, 2.0, 0.5)),
        "halves": rng.integers(-15, 16, 256) / 2,
        "quarter steps": rng.integers(-31, 32, 256) / 4,
        "two levels": np.where(rng.random(256) < 0.5, -0.25, 1.75),
        "groups of zeros": np.where(np.arange(256) // 16 % 3 == 0, rng.normal(size=256), 0.0),
        "groups of unlike size": rng.normal(size=256) * 10.0 ** (-(np.arange(256) // 32) % 5),
        "heavy tails": rng.standard_t(2, 256),
        "offset": 10 + rng.normal(size=256) * 0.1,
        "just below powers of two": np.repeat(just_below, 16),
    }
    # The largest value of a group of 32 is just below a power of two in half of the last row.
    return list(rows), np.array(list(rows.values()), np.float32)


def encode(rng):
    names, rows = adversarial_rows(rng)
    tensors = {"rows": rows}
    differ = {}
    for name in WRITTEN:
        tensors[f"{name}.bytes"] = quantize(name, rows)
        try:
            with np.errstate(all="ignore"):
                ours = quants.quantize(rows, gguf.GGMLQuantizationType[name])
        except NotImplementedError:
            continue
        unlike = (ours.reshape(len(rows), -1) != tensors[f"{name}.bytes"]).any(axis=1)
        differ[name] = [row for row, is_unlike in zip(names, unlike) if is_unlike]
    write_safetensors(OUT / "encode.safetensors", tensors)
    return names, rows, differ


def importance(rng, names, rows):
    """Importance as imatrix files have it: mean squares of inputs, some columns never used, some a thousand times more."""
    weights = rng.standard_normal(rows.shape) ** 2 * 10.0 ** rng.integers(-2, 3, rows.shape)
    weights[:, rng.random(rows.shape[1]) < 0.05] = 0.0
    weights[names.index("ramp")] = 1.0
    weights[names.index("halves"), 64:96] = 0.0
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    tensors = {"importance": weights}
    for name in WRITTEN:
        tensors[f"{name}.bytes"] = quantize(name, rows, weights)
    write_safetensors(OUT / "importance.safetensors", tensors)


def dot(rng):
    CPU.ggml_cpu_init()
    n = 1024
    x = (rng.normal(size=(3, n)) * [[1.0], [0.05], [30.0]]).astype(np.float32)
    x[1, 300] = 4.0
    tensors = {"x": x}
    acts = {}
    for kind, (block, n_bytes) in ACTIVATIONS.items():
        acts[kind] = c_quantize(CPU, f"quantize_row_{kind}", x, block, n_bytes)
        tensors[f"x.{kind.upper()}"] = acts[kind]
    for name, (block, n_bytes, _, kind) in FORMATS.items():
        if kind is None:
            continue
        weights = random_blocks(rng, name, 4 * n // block, wild=False).reshape(4, -1)
        function = getattr(CPU, f"ggml_vec_dot_{name.lower().replace('_k', '_K')}_{kind}")
        function.restype = None
        products = np.zeros((3, 4), np.float32)
        for t in range(3):
            for r in range(4):
                result = ctypes.c_float()
                zero = ctypes.c_size_t(0)
                function(
                    ctypes.c_int(n), ctypes.byref(result), zero, pointer(weights[r]), zero, pointer(acts[kind][t]), zero,
                    ctypes.c_int(1),
                )
                products[t, r] = result.value
        tensors[f"{name}.bytes"] = weights
        tensors[f"{name}.products"] = products
    write_safetensors(OUT / "dot.safetensors", tensors)


def main():
    OUT.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    decode(rng)
    names, rows, differ = encode(rng)
    dot(rng)
    importance(np.random.default_rng(2), names, rows)
    manifest = {
        "script": "golden/make/quant.py",
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "gguf": version("gguf"),
            "llama-cpp-python": llama_cpp.__version__,
            "arch": platform.machine(),
        },
        "rows": names,
        "rows that gguf quantises to other bytes than ggml": differ,
    }
    (OUT / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
