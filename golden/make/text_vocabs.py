"""Adds GGUF twins to golden/text/: each tokenizer as a vocabulary-only GGUF file, and the ids that llama.cpp gives.

    LLAMA="$(bash bench/peers/llama.sh)" && "$LLAMA" golden/make/text_vocabs.py       # after text_tokenizers.py

FAMILY/vocab.gguf  written by the gguf package.
FAMILY/llama.json  where llama.cpp's ids are not those of expected.json: "rendered" and "literal" by index into the corpus.
"""

import json
from importlib.metadata import version
from pathlib import Path

import gguf
from llama_logits import SILENCE
from llama_cpp import Llama

OUT = Path(__file__).resolve().parents[1] / "text"
T = gguf.TokenType


def write_vocab(path, tokenizer, about):
    model = tokenizer["model"]
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    ids = {**model["vocab"], **{content: token["id"] for content, token in added.items()}}
    tokens = sorted(ids, key=ids.get)
    assert [ids[token] for token in tokens] == list(range(len(tokens)))

    def kind(token):
        if token in added:
            unknown = token == "<unk>"
            return T.UNKNOWN if unknown else T.CONTROL if added[token]["special"] else T.USER_DEFINED
        return T.BYTE if len(token) == 6 and token.startswith("<0x") else T.NORMAL

    # llama.cpp wants the shape of a model even for its vocabulary.
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(about["model"])
    writer.add_token_list(tokens)
    writer.add_token_types([kind(token) for token in tokens])
    if about["model"] == "gpt2":
        writer.add_tokenizer_pre(about["pre"])
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        writer.add_token_merges([" ".join(pair) for pair in pairs])
    else:
        # Rising ids are falling scores; control tokens and bytes have 0.
        writer.add_token_scores([float(-i) if kind(token) == T.NORMAL else 0.0 for i, token in enumerate(tokens)])
        writer.add_add_space_prefix(about["add_space_prefix"])
    eos = ids.get("<|im_end|>", ids.get("</s>"))
    writer.add_eos_token_id(eos)
    if about["bos"]:
        writer.add_bos_token_id(ids[about["bos"]])
        writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    corpus = json.loads((OUT / "corpus.json").read_text(encoding="utf-8"))
    for folder in sorted(path.parent for path in OUT.glob("*/gguf.json")):
        about = json.loads((folder / "gguf.json").read_text(encoding="utf-8"))
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        path = folder / "vocab.gguf"
        write_vocab(path, tokenizer, about)
        llama = Llama(str(path), vocab_only=True, verbose=False)
        differ = {"rendered": {}, "literal": {}}
        for i, text in enumerate(corpus):
            for mode, special in (("rendered", True), ("literal", False)):
                found = llama.tokenize(text.encode(), add_bos=False, special=special)
                reference = expected["rendered"][i]
                if mode == "literal":
                    reference = expected["literal"].get(str(i), reference)
                if found != reference:
                    differ[mode][str(i)] = found
        prompt = llama.tokenize(b"x", add_bos=True, special=True)
        assert prompt == expected["prompt"]["before"] + llama.tokenize(b"x", add_bos=False), (folder.name, prompt)
        (folder / "llama.json").write_text(json.dumps(differ, separators=(",", ":")) + "\n", encoding="utf-8")
        print(folder.name, {mode: sorted(map(int, texts)) for mode, texts in differ.items()})
    manifest = json.loads((OUT / "MANIFEST.json").read_text(encoding="utf-8"))
    manifest["llama"] = {name: version(name) for name in ("gguf", "llama_cpp_python")}
    (OUT / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
