"""Makes golden/text/real/: ids of the corpus in real vocabularies that are too big to commit.

    recipes/data/vocabs.sh
    PY="$(bash golden/make/env.sh)" && "$PY" golden/make/text_real.py                      # tokenizer.json
    LLAMA="$(bash bench/peers/llama.sh)" && "$LLAMA" golden/make/text_real.py --llama      # GGUF vocabularies

NAME.json        {"rendered", "literal"} of a model's tokenizer.json, see text_tokenizers.py.
gguf/NAME.json   {"rendered", "literal"} as llama.cpp gives them.
"""

import json
import sys
from pathlib import Path

from text_corpus import CORPUS

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / ".cache" / "data" / "vocabs"
OUT = ROOT / "golden" / "text" / "real"
GGUF = ["command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "qwen35",
        "refact", "starcoder"]


def write(path, rendered, literal):
    path.parent.mkdir(parents=True, exist_ok=True)
    differ = {str(i): ids for i, ids in enumerate(literal) if ids != rendered[i]}
    value = {"rendered": rendered, "literal": differ}
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n", encoding="utf-8")


def from_tokenizers():
    from tokenizers import Tokenizer

    for name in ("qwen3", "deepseek_v3", "gptoss"):
        tokenizer = Tokenizer.from_file(str(REAL / name / "tokenizer.json"))
        rendered = [tokenizer.encode(text, add_special_tokens=False).ids for text in CORPUS]
        tokenizer.encode_special_tokens = True
        literal = [tokenizer.encode(text, add_special_tokens=False).ids for text in CORPUS]
        write(OUT / f"{name}.json", rendered, literal)


def from_llama():
    import llama_logits  # noqa: F401, silences llama.cpp
    from llama_cpp import Llama

    for name in GGUF:
        llama = Llama(str(REAL / f"ggml-vocab-{name}.gguf"), vocab_only=True, verbose=False)
        ids = lambda special: [llama.tokenize(text.encode(), add_bos=False, special=special) for text in CORPUS]
        write(OUT / "gguf" / f"{name}.json", ids(True), ids(False))


if __name__ == "__main__":
    from_llama() if "--llama" in sys.argv else from_tokenizers()
