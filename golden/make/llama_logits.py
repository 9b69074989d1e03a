"""What llama.cpp computes from a GGUF file: logits of token lists, greedy continuations, perplexity.

    PY="$(bash bench/peers/llama.sh)"
    "$PY" golden/make/llama_logits.py logits     MODEL.gguf --tokens 1,2,3 [--tokens ..]  > logits.json
    "$PY" golden/make/llama_logits.py greedy     MODEL.gguf --text "Once upon" -n 64      > tokens.json
    "$PY" golden/make/llama_logits.py perplexity MODEL.gguf --file recipes/data/sample.jsonl --context 512

Everything goes through llama.cpp's C interface as llama-cpp-python ships it. By default: keys and values in f32, no flash
attention, one thread, full-size window caches. --default-cache takes llama.cpp's own defaults instead (f16 keys and
values, flash attention where it likes).
"""

import argparse
import ctypes
import json
import math
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

F32 = 0
FLASH_OFF = 0
FLASH_ON = 1


class Silence:
    """Keeps llama.cpp's log out of the way, but remembers its errors."""

    def __init__(self):
        self.errors = []

        @llama_cpp.llama_log_callback
        def log(level, text, _data):
            if level >= 4:
                self.errors.append(text.decode("utf-8", "replace"))

        self.callback = log
        llama_cpp.llama_log_set(log, ctypes.c_void_p(0))


SILENCE = Silence()


class Model:
    """One GGUF file with one sequence.

    `flash` forces flash attention on or off, `ubatch` is how many tokens are read at once, and `weights` is another Model of
    the same file whose weights are used.
    """

    def __init__(self, path, n_ctx=512, default_cache=False, threads=1, repack=True, flash=None, ubatch=None, weights=None):
        SILENCE.errors.clear()
        self.owns_weights = weights is None
        self.model = weights.model if weights else self.load(path, repack)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = n_ctx
        context.n_batch = n_ctx
        context.n_ubatch = ubatch or n_ctx
        context.n_threads = context.n_threads_batch = threads
        if not default_cache:
            context.type_k = context.type_v = F32
            context.flash_attn_type = FLASH_OFF
            context.swa_full = True
        if flash is not None:
            context.flash_attn_type = FLASH_ON if flash else FLASH_OFF
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise ValueError(f"llama.cpp makes no context for {path}: {' '.join(SILENCE.errors).strip()}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.n_ctx = n_ctx
        self.position = 0

    @staticmethod
    def load(path, repack):
        """The weights of a file."""
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        # Repacked blocks are multiplied by other kernels, which round otherwise.
        params.use_extra_bufts = repack
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise ValueError(f"llama.cpp does not load {path}: {' '.join(SILENCE.errors).strip()}")
        return model

    def close(self):
        """Gives the memory back."""
        llama_cpp.llama_free(self.context)
        if self.owns_weights:
            llama_cpp.llama_model_free(self.model)

    def reset(self):
        """Forgets the sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.position = 0

    def forward(self, tokens):
        """Reads tokens behind the ones before; logits [len(tokens), n_vocab]."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i] = token
                batch.pos[i] = self.position + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = 1
            if (code := llama_cpp.llama_decode(self.context, batch)) != 0:
                raise ValueError(f"llama_decode returned {code}: {' '.join(SILENCE.errors).strip()}")
            rows = [
                np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, i), (self.n_vocab,)).copy()
                for i in range(len(tokens))
            ]
        finally:
            llama_cpp.llama_batch_free(batch)
        self.position += len(tokens)
        return np.stack(rows)

    def tokenize(self, text, special=False):
        """Token ids of a text, with what the file says about a token at the beginning."""
        data = text.encode("utf-8")
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, room, True, special)
        return list(ids[:count])

    def logits(self, tokens):
        """Logits of every position of one list."""
        self.reset()
        return self.forward(tokens)

    def greedy(self, tokens, count):
        """The ids that follow, and the smallest gap between the two largest logits on the way."""
        self.reset()
        row = self.forward(tokens)[-1]
        ids, gap = [], math.inf
        for _ in range(count):
            second, first = np.partition(row, -2)[-2:]
            gap = min(gap, float(first - second))
            ids.append(int(row.argmax()))
            row = self.forward(ids[-1:])[-1]
        return ids, gap

    def perplexity(self, documents, window):
        """(perplexity, predictions) over lists of tokens, cut as `cadre eval perplexity` cuts them.

        Every token but the first of a document is predicted once, from the tokens before it in its window; windows of
        `window` tokens follow each other without overlap, and the last token of one predicts the first of the next.
        """
        loss, count = 0.0, 0
        for tokens in documents:
            for start in range(0, len(tokens) - 1, window):
                targets = tokens[start + 1 : start + window + 1]
                rows = self.logits(tokens[start : start + len(targets)]).astype(np.float64)
                top = rows.max(-1, keepdims=True)
                total = np.log(np.exp(rows - top).sum(-1)) + top[:, 0]
                loss += float((total - rows[np.arange(len(rows)), targets]).sum())
                count += len(rows)
        return math.exp(loss / count), count


def read_documents(path):
    """The texts of a file: the `text` fields of JSON lines, or the file as a whole."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
    return [text]


def decoded(path, out):
    """A copy of a GGUF file with every weight in f32."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, weights.reshape(tuple(reversed(tensor.shape.tolist()))).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["logits", "greedy", "perplexity"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", action="append", default=[], help="comma-separated ids; may be given again")
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--file", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("-n", type=int, default=64, help="tokens of a continuation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--default-cache", action="store_true")
    args = parser.parse_args()
    model = Model(args.model, args.context, args.default_cache, args.threads)
    lists = [[int(token) for token in tokens.split(",")] for tokens in args.tokens]
    lists += [model.tokenize(text) for text in args.text]
    if args.what == "perplexity":
        texts = read_documents(args.file) if args.file else []
        value, count = model.perplexity(lists + [model.tokenize(text) for text in texts], args.context)
        json.dump({"perplexity": value, "tokens": count}, sys.stdout)
    elif args.what == "greedy":
        json.dump([{"tokens": tokens, "next": model.greedy(tokens, args.n)[0]} for tokens in lists], sys.stdout)
    else:
        json.dump([{"tokens": tokens, "logits": model.logits(tokens).tolist()} for tokens in lists], sys.stdout)
    print()


if __name__ == "__main__":
    main()
