"""Load on a server that speaks OpenAI's interface: streams of mixed lengths from many clients at once.

    python3 bench/peers/serve_load.py http://127.0.0.1:8080 --clients 64 --seconds 60

Prints one JSON document: tokens per second in all, and the median and 95th percentile of the time to the first token and between
two tokens. Every answer is drawn greedily, so that two equal requests must have equal answers: a stream that got another one's
tokens is counted in `mixed_up`. `--pid` of the server tells its resident memory in between. `--vanish 0.5` makes that share of the clients leave in the middle of their answers. Standard library
only, so that it runs beside any server: llama.cpp's is started with

    python -m llama_cpp.server --model FILE.gguf --n_ctx 4096 --n_threads 2 --interrupt_requests false
"""

import argparse
import http.client
import json
import random
import resource
import threading
import time
import urllib.parse

WORDS = "the miller went home to the mill and the cat sat on the road while rain fell over hills and fields".split()


class Client(threading.Thread):
    def __init__(self, seed, args, shared):
        super().__init__(daemon=True)
        self.random = random.Random(seed)
        self.args = args
        self.shared = shared
        self.first, self.between, self.errors, self.tokens, self.answers = [], [], [], 0, 0

    def run(self):
        while time.monotonic() < self.shared.end:
            # Few different requests, so that the same one is asked by several clients.
            which = random.Random(self.random.randrange(40))
            prompt = " ".join(which.choices(WORDS, k=which.choice([4, 20, 60, 200])))
            n_tokens = which.choice([8, 32, 96])
            leaves = self.random.random() < self.args.vanish
            try:
                self.ask(prompt, n_tokens, leaves)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.errors.append(f"{type(error).__name__}: {error}")

    def ask(self, prompt, n_tokens, leaves):
        url = urllib.parse.urlparse(self.args.url)
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=300)
        body = json.dumps({"model": self.args.model, "prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "stream": True})
        start = time.monotonic()
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {response.read(300)}")
        last, text, n_events = None, "", 0
        while line := response.readline():
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            now = time.monotonic()
            (self.first.append(now - start) if last is None else self.between.append(now - last))
            last = now
            text += json.loads(line[6:])["choices"][0]["text"]
            n_events += 1
            self.tokens += 1
            if leaves and n_events >= n_tokens // 2:
                connection.close()
                return
        connection.close()
        self.answers += 1
        with self.shared.lock:
            known = self.shared.texts.setdefault((prompt, n_tokens), text)
            self.shared.mixed_up += known != text


class Shared:
    def __init__(self, seconds):
        self.end = time.monotonic() + seconds
        self.lock = threading.Lock()
        self.texts = {}
        self.mixed_up = 0


class Memory(threading.Thread):
    """Resident memory of a process, every second, in MiB."""

    def __init__(self, pid, end):
        super().__init__(daemon=True)
        self.pid, self.end, self.samples = pid, end, []

    def run(self):
        while time.monotonic() < self.end:
            with open(f"/proc/{self.pid}/statm") as file:
                self.samples.append(int(file.read().split()[1]) * resource.getpagesize() / 2**20)
            time.sleep(1)

    def told(self):
        """The mean of each tenth of the time."""
        parts = [self.samples[i * len(self.samples) // 10:(i + 1) * len(self.samples) // 10] for i in range(10)]
        return [round(sum(part) / len(part)) for part in parts if part]


def percentiles(values):
    values = sorted(values)
    at = lambda share: values[min(len(values) - 1, int(share * len(values)))] if values else None
    return {"p50": at(0.5), "p95": at(0.95), "n": len(values)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--model", default=None)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--vanish", type=float, default=0)
    parser.add_argument("--pid", type=int)
    args = parser.parse_args()
    shared, start = Shared(args.seconds), time.monotonic()
    clients = [Client(seed, args, shared) for seed in range(args.clients)]
    memory = args.pid and Memory(args.pid, shared.end)
    for thread in clients + ([memory] if memory else []):
        thread.start()
    for client in clients:
        client.join()
    took = time.monotonic() - start
    errors = [error for client in clients for error in client.errors]
    print(json.dumps({
        "clients": args.clients,
        "seconds": took,
        "answers": sum(client.answers for client in clients),
        "tokens_per_second": sum(client.tokens for client in clients) / took,
        "time_to_first_token": percentiles([x for client in clients for x in client.first]),
        "between_tokens": percentiles([x for client in clients for x in client.between]),
        "resident_mib": memory.told() if memory else None,
        "mixed_up": shared.mixed_up,
        "errors": len(errors),
        "first_errors": errors[:3],
    }))


if __name__ == "__main__":
    main()
