"""Steps of requests that share experts, next to taking requests in turns: what a pass needs, and what is read from disk.

    cargo build --release && python3 bench/steps.py --cadre target/release/cadre --mem-budget 22MiB

Starts `cadre serve --step-requests N` for each order, asks it for answers to texts of different domains (recipes/data/sample.jsonl) all
at once, and reads `/metrics`. The answers of both orders have to be the same. Prints Markdown. Needs only Python's standard
library.
"""

import argparse
import json
import statistics
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def prompts(files, domains, n, length):
    """`n` pieces of texts, domains in turns."""
    texts = {domain: [] for domain in domains}
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                document = json.loads(line)
                if document["domain"] in texts:
                    text = document["text"]
                    pieces = range(0, max(1, len(text) - length), 2 * length)
                    texts[document["domain"]] += [text[at : at + length] for at in pieces]
    order = [texts[domain][i] for i in range(n) for domain in domains if i < len(texts[domain])]
    if len(order) < n:
        raise SystemExit(f"the text has {len(order)} pieces of {', '.join(domains)}, not {n}")
    return order[:n]


def ask(url, prompt, n_tokens, answers, at):
    body = {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=600) as answer:
        answers[at] = json.load(answer)["choices"][0]["text"]


def metrics(url):
    numbers = {}
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as page:
        for line in page.read().decode().splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                numbers[name.split("{")[0]] = float(value)
    return numbers


def run(args, order, texts):
    command = [args.cadre, "serve", "-m", args.model, "--port", "0", "-np", str(len(texts)), "--step-requests", str(args.step)]
    command += ["--step-order", order, "-t", str(args.threads), "-c", str(args.ctx_size), "-b", str(args.batch_size)]
    command += ["--mem-budget", args.mem_budget] if args.mem_budget else []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().strip()
        if not url:
            raise SystemExit(f"the server does not start: {' '.join(command)}")
        answers = [None] * len(texts)
        start = time.monotonic()
        clients = [
            threading.Thread(target=ask, args=(url, text, args.tokens, answers, at)) for at, text in enumerate(texts)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        seconds = time.monotonic() - start
        numbers = metrics(url)
    finally:
        server.terminate()
        server.wait()
    steps = numbers["cadre:steps_total"]
    return answers, {
        "experts of a step": numbers["cadre:step_experts_total"] / steps,
        "tokens of a step": numbers["cadre:step_tokens_total"] / steps,
        "read from disk, KB/token": numbers.get("cadre:expert_bytes_read_total", 0.0)
        / numbers["vllm:generation_tokens_total"]
        / 1e3,
        "longest wait, steps": numbers["cadre:step_longest_wait"],
        "tokens/s": args.tokens * len(texts) / seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cadre", required=True)
    parser.add_argument("--model", default=str(ROOT / "models/nano"))
    parser.add_argument("--mem-budget")
    parser.add_argument("--data", action="append", help="JSON lines; recipes/data/sample.jsonl")
    parser.add_argument("--domains", default="code,german")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--step", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--ctx-size", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--chars", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    files = args.data or [ROOT / "recipes/data/sample.jsonl"]
    texts = prompts(files, args.domains.split(","), args.requests, args.chars)
    found = {"turns": [], "experts": []}
    expected = None
    for _ in range(args.rounds):
        for order, rounds in found.items():
            answers, numbers = run(args, order, texts)
            expected = expected or answers
            if answers != expected:
                raise SystemExit(f"the answers in the order `{order}` differ")
            rounds.append(numbers)
    names = list(found["turns"][0])
    print("| order | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for order, rounds in found.items():
        medians = [statistics.median(one[name] for one in rounds) for name in names]
        print(f"| {order} | " + " | ".join(f"{value:.1f}" for value in medians) + " |")


if __name__ == "__main__":
    main()
