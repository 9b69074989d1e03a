"""Makes golden/text/: small tokenizers of every family and the ids they give, as the tokenizers package computes them.

    PY="$(bash golden/make/env.sh)" && "$PY" golden/make/text_tokenizers.py
    LLAMA="$(bash bench/peers/llama.sh)" && "$LLAMA" golden/make/text_vocabs.py     # then: GGUF twins

(Not called tokenizers.py, which would be imported in place of the package.)

The byte-level families share one vocabulary that was trained without cutting text into words, so its merges reach over
every seam: any mistake of a pre-tokenizer changes ids. The SentencePiece families likewise.

corpus.json           the texts.
FAMILY/tokenizer.json the tokenizer.
FAMILY/expected.json  "rendered": ids with special tokens parsed and nothing added; "literal": ids with special tokens as
                      text, where they differ; "prompt": what add_special_tokens puts around a text; "decoded": the text of
                      "rendered" without special tokens, where it differs from the text.
FAMILY/gguf.json      what text_vocabs.py needs to know.
"""

import json

from common import ROOT, versions
from text_corpus import CORPUS, TRAINING
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

OUT = ROOT / "golden" / "text"
BYTE_LEVEL_SIZE = 1100
SPM_SIZE = 900

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+SUFFIX"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*SUFFIX"
)
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = CASED.replace("SUFFIX", CONTRACTION) + r"|\p{N}{1,3}" + REST
TEKKEN = CASED.replace("SUFFIX", "") + r"|\p{N}" + REST
DEEPSEEK3 = [
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
]

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN_ADDED = ["<tool_call>", "</tool_call>"]


def splits(*expressions):
    steps = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def digits_then_gpt2():
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )


# name: (pre-tokenizer, value of tokenizer.ggml.pre, keywords of `byte_level`)
BYTE_LEVEL = {
    "gpt2": (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True), "gpt-2", {}),
    "qwen2": (splits(QWEN2), "qwen2", {"normalizer": normalizers.NFC()}),
    "llama3": (splits(LLAMA3), "llama-bpe", {"ignore_merges": True, "bos": "<|endoftext|>"}),
    "smollm": (digits_then_gpt2(), "smollm", {}),
    "deepseek_v3": (splits(*DEEPSEEK3), "deepseek-v3", {"bos": "<|endoftext|>"}),
    "o200k": (splits(O200K), "gpt-4o", {}),
    "tekken": (splits(TEKKEN), "tekken", {"ignore_merges": True, "bos": "<|endoftext|>"}),
    "olmo": (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True), "olmo", {"space_tokens": True}),
    "stripping": (splits(QWEN2), None, {"stripping": True}),
}


def train_bytes():
    """One byte-level vocabulary whose merges know nothing of words."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=BYTE_LEVEL_SIZE, min_frequency=2, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    trained.train_from_iterator(TRAINING * 3 + CORPUS * 2, trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def byte_level(vocab, merges, pre, normalizer=None, ignore_merges=False, bos=None, space_tokens=False, stripping=False):
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_ADDED])
    if space_tokens:
        tokenizer.add_tokens([AddedToken(" " * n, special=False, normalized=True) for n in range(6, 1, -1)])
    if stripping:
        tokenizer.add_special_tokens([AddedToken("[INST]", special=True, normalized=False, lstrip=True, rstrip=True)])
        tokenizer.add_tokens(
            [
                AddedToken("text", special=False, normalized=False, single_word=True),
                AddedToken("\u00c5ngstrom", special=False, normalized=True),
                AddedToken("x", special=False, normalized=False, lstrip=True),
            ]
        )
    post = processors.ByteLevel(trim_offsets=False)
    if bos:
        template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
        post = processors.Sequence([post, template])
    tokenizer.post_processor = post
    return tokenizer


def train_spm():
    """A SentencePiece-like vocabulary: control tokens, bytes, then pieces by falling score, characters last."""
    mark = "\u2581"
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", mark)
    trainer = trainers.BpeTrainer(
        vocab_size=SPM_SIZE, min_frequency=2, limit_alphabet=260, show_progress=False, max_token_length=10
    )
    trained.train_from_iterator([mark + text for text in TRAINING * 3 + CORPUS * 2], trainer)
    model = json.loads(trained.to_str())["model"]
    merged = ["".join(pair) for pair in model["merges"]]
    chars = [token for token in sorted(model["vocab"], key=model["vocab"].get) if len(token) == 1]
    control = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = list(dict.fromkeys(merged)) + chars
    vocab = {token: i for i, token in enumerate(control + byte_tokens + pieces)}
    # As the converter of transformers does: all ways to split a piece, pieces by score, ways by their ids.
    merges = []
    for piece in pieces:
        ways = [(piece[:at], piece[at:]) for at in range(1, len(piece)) if piece[:at] in vocab and piece[at:] in vocab]
        merges += sorted(ways, key=lambda way: (vocab[way[0]], vocab[way[1]]))
    return vocab, merges


def sentencepiece(vocab, merges, kind):
    mark = "\u2581"
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    replace = decoders.Replace(mark, " ")
    steps = [replace, decoders.ByteFallback(), decoders.Fuse()]
    if kind == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(mark), normalizers.Replace(" ", mark)])
        steps.append(decoders.Strip(" ", 1, 0))
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(mark, prepend_scheme="first", split=False)
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", mark)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("[INST]", special=False, normalized=False)])
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = template
    return tokenizer


def expected(tokenizer):
    ids = lambda text, add=False: tokenizer.encode(text, add_special_tokens=add).ids
    rendered = [ids(text) for text in CORPUS]
    tokenizer.encode_special_tokens = True
    literal = [ids(text) for text in CORPUS]
    tokenizer.encode_special_tokens = False
    around = ids("x", True)
    at = around.index(ids("x")[0])
    decoded = [tokenizer.decode(found, skip_special_tokens=True) for found in rendered]
    return {
        "prompt": {"before": around[:at], "after": around[at + len(ids("x")) :]},
        "rendered": rendered,
        "literal": {str(i): found for i, found in enumerate(literal) if found != rendered[i]},
        "decoded": {str(i): text for i, text in enumerate(decoded) if text != CORPUS[i]},
    }


def write(name, tokenizer, gguf):
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    dump = lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(tokenizer.to_str() + "\n", encoding="utf-8")
    (folder / "expected.json").write_text(dump(expected(tokenizer)) + "\n", encoding="utf-8")
    if gguf is not None:
        (folder / "gguf.json").write_text(dump(gguf) + "\n", encoding="utf-8")


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "corpus.json").write_text(json.dumps(CORPUS, indent=0) + "\n", encoding="utf-8")
    vocab, merges = train_bytes()
    for name, (pre, ggml, options) in BYTE_LEVEL.items():
        tokenizer = byte_level(vocab, merges, pre, **options)
        gguf = {"model": "gpt2", "pre": ggml, "bos": options.get("bos")} if ggml else None
        write(name, tokenizer, gguf)
    vocab, merges = train_spm()
    for kind in ("llama", "metaspace", "gemma"):
        gguf = None if kind == "metaspace" else {"model": "llama", "bos": "<s>", "add_space_prefix": kind == "llama"}
        write(f"spm_{kind}", sentencepiece(vocab, merges, kind), gguf)
    manifest = {"script": "golden/make/text_tokenizers.py", "versions": versions()}
    (OUT / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
