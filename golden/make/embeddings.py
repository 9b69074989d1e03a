"""Makes golden/embeddings/: vectors of texts by transformers, for what `cadre serve` answers at /v1/embeddings.

    PY="$(bash golden/make/env.sh)" && "$PY" golden/make/embeddings.py --model models/nano

The model is read in float32 without its head; a text's vector is the last hidden state (after the last norm), of its last token or the mean over
its tokens, of length 1. The texts were written by hand.

Files
    expected.json   `cases`: text, token ids, and the two vectors.
    MANIFEST.json   script, versions.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from common import ROOT, f32_list, write_cases

TEXTS = [
    "Once upon a time there was a little girl who lived near the forest.",
    "def add(a, b):\n    return a + b\n",
    "x",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModel.from_pretrained(args.model, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    cases = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            rows = model(ids).last_hidden_state[0].double()
        unit = lambda row: f32_list((row / row.norm()).float())
        cases.append({"text": text, "tokens": ids[0].tolist(), "mean": unit(rows.mean(0)), "last": unit(rows[-1])})
    write_cases(ROOT / "golden" / "embeddings", "embeddings.py", cases)


if __name__ == "__main__":
    main()
