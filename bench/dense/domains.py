"""Turns published task files into domains: one JSONL file of `{"domain", "text"}` to look at and one to judge by, for each.

    python3 bench/dense/domains.py --out .cache/data/domains \\
        math=gsm8k-train.jsonl code=mbpp.jsonl medicine=pubmedqa-l.json

Files as their authors publish them: GSM8K (openai/grade-school-math, JSON lines with `question` and `answer`), MBPP (JSON lines
with `text` and `code`), PubMedQA (pubmedqa/pubmedqa, an object of records with `QUESTION`, `CONTEXTS`, `LONG_ANSWER`). Every
second record is held out. Needs only Python's standard library.
"""

import argparse
import json
from pathlib import Path


def text_of(record):
    """The text of a record, by the keys that it has."""
    if "QUESTION" in record:
        return "\n".join([record["QUESTION"], *record["CONTEXTS"], record["LONG_ANSWER"]])
    if "code" in record:
        return f'"""{record["text"]}"""\n{record["code"]}'.replace("\r\n", "\n")
    if "answer" in record:
        return f'{record["question"]}\n{record["answer"]}'
    raise SystemExit(f"a record of none of the known files: it has {', '.join(sorted(record))}")


def records(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return list(json.loads(text).values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chars", type=int, default=400_000, help="characters of each of the two files of a domain")
    parser.add_argument("domains", nargs="+", metavar="NAME=FILE")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for domain in args.domains:
        name, _, file = domain.partition("=")
        texts = [text_of(record) for record in records(Path(file))]
        for split, own in (("train", texts[0::2]), ("heldout", texts[1::2])):
            n_chars = 0
            with open(args.out / f"{name}.{split}.jsonl", "w", encoding="utf-8") as out:
                for text in own:
                    if n_chars >= args.chars:
                        break
                    n_chars += len(text)
                    out.write(json.dumps({"domain": name, "text": text}, ensure_ascii=False) + "\n")
            print(f"{name}.{split}.jsonl: {n_chars} characters")


if __name__ == "__main__":
    main()
