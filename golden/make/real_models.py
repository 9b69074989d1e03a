"""Makes golden/real_models/: what llama.cpp continues and scores with real models.

    PY="$(bash bench/peers/llama.sh)"
    "$PY" golden/make/real_models.py "$(bash recipes/data/smollm2.sh)" [the files that other scripts there fetch]

NAME.json, one per model of MODELS
    prompts      text, token ids, `next`: the 64 ids that llama.cpp picks greedily (end tokens are not heeded), and `gap`,
                 the smallest difference between its two largest logits on the way, over its ways to compute

llama.cpp computes in up to four ways here: by its defaults (16-bit keys and values, flash attention); with keys and values in
f32; those without repacking weights for its faster kernels; and, for files of at most MOST_DECODED bytes, with all weights
decoded to f32, so that inputs are not rounded to eight bits either. On open text these part within 64 tokens more often than not: the rounding of inputs moves
logits by a hundredth, and a small model is often that undecided. So CANDIDATES are texts whose continuation is clear, and
a prompt is taken, in their order, if all ways continue it alike with a gap of at least MIN_GAP. MANIFEST.json says how
many were passed over. (Perplexities are compared by bench/peers/parity_llama.py, which runs both sides.)
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import llama_cpp
from llama_logits import Model, decoded

from common import ROOT, fail, write_json

OUT = ROOT / "golden" / "real_models"
# By file name: the name here, and the file's digest.
MODELS = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": ("smollm2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "gemma-3-270m-q4_k_m.gguf": ("gemma3-270m", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
    "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf": (
        "qwen25-coder",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}
WINDOW = 512
COUNT = 64
WANTED = 10
MIN_GAP = 0.1
MOST_DECODED = 500_000_000


def again(text, start):
    """A text twice, and the start of a third time."""
    return f"{text}\n\n{text}\n\n{start}"


CANDIDATES = [
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,",
    again(
        "It was a bright cold day in April, and the clocks were striking. The harbour lay still under a thin mist, and "
        "the fishermen were mending their nets along the wall, talking of nothing but the price of herring and the long "
        "winter that would not end. A boy ran past with a loaf under his arm.",
        "It was a bright",
    ),
    again(
        "Mein Vater war ein Kaufmann, und wir lebten in einer kleinen Stadt am Fluss. Im Sommer badeten wir, im Winter "
        "liefen wir auf dem Eis, und am Sonntag kamen die Verwandten zum Essen und blieben bis in die Nacht.",
        "Mein Vater war",
    ),
    again(
        "def clamp(value, low, high):\n    if low > high:\n        raise ValueError('low is above high')\n    if value < low:\n"
        "        return low\n    if value > high:\n        return high\n    return value",
        "def clamp(",
    ),
    again(
        "SELECT customers.name, SUM(orders.total) AS spent FROM customers JOIN orders ON orders.customer_id = "
        "customers.id WHERE orders.year = 2021 GROUP BY customers.name ORDER BY spent DESC LIMIT 10;",
        "SELECT customers",
    ),
    "a b c d e f g h i j k l m n o p q r s t u v w x y z a b c d e f g h i j k l m n o p q r s t u v w x y z a b c d",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday, Tuesday, Wednesday, Thursday, Friday, "
    "Saturday, Sunday, Monday,",
    again(
        "Ingredients: two cups of flour, one teaspoon of salt, three eggs, half a cup of warm milk, a little butter and "
        "a pinch of nutmeg. Mix the flour and the salt, beat the eggs into the milk, and stir until smooth.",
        "Ingredients: two",
    ),
    again(
        "| city | country | river |\n|---|---|---|\n| Paris | France | Seine |\n| London | England | Thames |\n| Vienna | "
        "Austria | Danube |\n| Cairo | Egypt | Nile |",
        "| city | country",
    ),
    again(
        "{\"name\": \"valve\", \"id\": 4711, \"tags\": [\"brass\", \"half-inch\"], \"stock\": {\"north\": 12, \"south\": 0}, "
        "\"price\": 3.75, \"active\": true}",
        "{\"name\":",
    ),
    again(
        "January has thirty-one days, February has twenty-eight, March has thirty-one, April has thirty, May has "
        "thirty-one, June has thirty, July and August have thirty-one each, and September has thirty.",
        "January has",
    ),
    again(
        "fn gcd(mut a: u64, mut b: u64) -> u64 {\n    while b != 0 {\n        let r = a % b;\n        a = b;\n        b = r;\n"
        "    }\n    a\n}",
        "fn gcd(",
    ),
    again(
        "The committee met at nine. Present were the chairman, the treasurer, and four members; two had sent their "
        "apologies. The minutes of the last meeting were read and approved without a change.",
        "The committee met",
    ),
    "2 x 1 = 2\n2 x 2 = 4\n2 x 3 = 6\n2 x 4 = 8\n2 x 5 = 10\n2 x 6 =",
    again(
        "\u65e5\u672c\u8a9e \u043f\u0440\u0438\u0432\u0435\u0442 na\u00efve caf\u00e9 \u03b1\u03b2\u03b3 \U0001f600 3.14159 -- "
        "\u00abquoted\u00bb \u4e2d\u6587",
        "\u65e5\u672c",
    ),
    again(
        "<ul>\n  <li><a href=\"/one\">One</a></li>\n  <li><a href=\"/two\">Two</a></li>\n  <li><a href=\"/three\">Three</a></li>\n</ul>",
        "<ul>\n  <li>",
    ),
    again(
        "Dear Madam, thank you for your letter of the third. We regret that the parcel was late and have sent another "
        "by express; it should reach you on Thursday. Please keep the first one, should it arrive after all.",
        "Dear Madam,",
    ),
    "100, 99, 98, 97, 96, 95, 94, 93, 92, 91, 90, 89, 88, 87,",
    again(
        "use std::collections::HashMap;\n\nfn count_words(text: &str) -> HashMap<String, usize> {\n    let mut counts = "
        "HashMap::new();\n    for word in text.split_whitespace() {\n        let word = word.to_lowercase();\n        "
        "*counts.entry(word).or_insert(0) += 1;\n    }\n    counts\n}\n\nfn main() {\n    let counts = count_words(\"a b a\");\n"
        "    println!(\"{counts:?}\");\n}",
        "use std::collections",
    ),
    again(
        "The old bridge was built of grey stone brought down the river on flat boats, and it took eleven summers to "
        "finish. Three masons are named in the town's accounts; a fourth, who cut the lions at the southern end, was "
        "paid in wine and never wrote his name. In spring the water stands as high as the second arch.",
        "The old bridge",
    ),
    again(
        "El viejo molino estaba al final del camino, detrás de los olivos. Mi abuela decía que allí vivía un gato que "
        "sabía leer, y que por la noche se sentaba junto a la ventana con un libro abierto y una vela encendida.",
        "El viejo molino",
    ),
]


def agreed(models):
    """The first prompts that every model continues alike with a clear gap, and how many were passed over."""
    prompts, passed = [], 0
    for text in CANDIDATES:
        tokens = models[0].tokenize(text, special=True)
        ids, gap = models[0].greedy(tokens, COUNT)
        for model in models[1:]:
            if gap < MIN_GAP:
                break
            others, other_gap = model.greedy(tokens, COUNT)
            gap = min(gap, other_gap) if others == ids else 0.0
        if gap < MIN_GAP:
            passed += 1
            print(f"passed over (gap {gap:.3f}): {text[:40]!r}", flush=True)
            continue
        prompts.append({"text": text, "tokens": tokens, "next": ids, "gap": float(f"{gap:.3g}")})
        print(f"{len(prompts)}: gap {gap:.3f} {text[:40]!r}", flush=True)
        if len(prompts) == WANTED:
            return prompts, passed
    fail(f"only {len(prompts)} of the candidates are continued alike")


def make(path, name):
    """Writes one model's file. Returns its entry for the manifest."""
    threads = 1
    with tempfile.TemporaryDirectory() as scratch:
        default = Model(path, WINDOW, default_cache=True, threads=threads)
        ways = {
            "default": default,
            "f32_cache": Model(path, WINDOW, threads=threads, weights=default),
            "not_repacked": Model(path, WINDOW, threads=threads, repack=False),
        }
        if path.stat().st_size <= MOST_DECODED:
            plain = Path(scratch) / "decoded.gguf"
            decoded(path, plain)
            ways["f32_weights"] = Model(plain, WINDOW, threads=threads)
        prompts, passed = agreed(list(ways.values()))
        for model in reversed(ways.values()):
            model.close()
    write_json(OUT / f"{name}.json", {"prompts": prompts})
    return {"file": path.name, "sha256": MODELS[path.name][1], "fetch": f"recipes/data/{name}.sh", "ways": list(ways), "prompts_passed_over": passed}


def main():
    paths = [Path(argument) for argument in sys.argv[1:]]
    if not paths:
        fail("give model files: real_models.py MODEL.gguf [more]")
    for path in paths:
        if path.name not in MODELS or hashlib.sha256(path.read_bytes()).hexdigest() != MODELS[path.name][1]:
            fail(f"{path} is not a pinned model; fetch one with recipes/data/{{{','.join(name for name, _ in MODELS.values())}}}.sh")
    manifest = OUT / "MANIFEST.json"
    models = json.loads(manifest.read_text(encoding="utf-8"))["models"] if manifest.is_file() else {}
    for path in paths:
        name = MODELS[path.name][0]
        models[name] = make(path, name)
        head = {
            "script": "golden/make/real_models.py",
            "requirements": "golden/make/requirements-llama.txt",
            "llama_cpp_python": llama_cpp.__version__,
        }
        write_json(manifest, head | {"models": models})


if __name__ == "__main__":
    main()
