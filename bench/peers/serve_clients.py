"""The clients of OpenAI and Anthropic against `cadre serve`: answers, streams, scores, forms and errors as they understand them.

    PY="$(bash bench/peers/clients.sh)" && "$PY" bench/peers/serve_clients.py [path of cadre]

Starts a server of the embedded model with a chat template, and prints a line per check; exits with 1 when one fails.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import anthropic
import openai

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def check(what, holds, found=""):
    print(f"{'ok  ' if holds else 'FAIL'} {what} {found if not holds else ''}")
    if not holds:
        sys.exit(1)


def refused(what, kind, call, param=None):
    try:
        call()
    except kind as error:
        check(what, param is None or error.param == param, error)
    else:
        check(what, False, "no error")


def main():
    cadre = sys.argv[1] if len(sys.argv) > 1 else "target/release/cadre"
    folder = pathlib.Path(tempfile.mkdtemp())
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    environment = {**os.environ, "CADRE_API_KEY": "secret"}
    server = subprocess.Popen(
        [cadre, "serve", "--port", "0", "--chat-template-file", str(template)],
        stdout=subprocess.PIPE, text=True, env=environment)
    try:
        url = server.stdout.readline().strip()
        client = openai.OpenAI(base_url=url + "/v1", api_key="secret", max_retries=0, timeout=120)
        completions(client)
        chats(client)
        forms(client)
        errors(client, url)
        messages(anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0, timeout=120))
    finally:
        server.terminate()
        check("the server ends in good order", server.wait(60) == 0)


def completions(client):
    names = [model.id for model in client.models.list()]
    check("models", names == ["nano"], names)
    whole = client.completions.create(model="nano", prompt="Once upon a time", max_tokens=20, temperature=0)
    check("a completion", whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 20, whole)
    stream = client.completions.create(model="nano", prompt="Once upon a time", max_tokens=20, temperature=0,
                                       stream=True, stream_options={"include_usage": True})
    events = list(stream)
    text = "".join(event.choices[0].text for event in events if event.choices)
    check("a stream of it", text == whole.choices[0].text, text)
    check("its usage", events[-1].usage == whole.usage or events[-1].usage.total_tokens == whole.usage.total_tokens)
    scored = client.completions.create(model="nano", prompt=[[5, 6, 7, 8]], max_tokens=1, echo=True, logprobs=2)
    scores = scored.choices[0].logprobs
    check("scores of a prompt", scores.token_logprobs[0] is None and len(scores.token_logprobs) == 5, scores)
    many = client.completions.create(model="nano", prompt=["a", "b"], n=2, seed=1, max_tokens=5)
    check("several prompts and choices", [choice.index for choice in many.choices] == [0, 1, 2, 3], many)


def chats(client):
    messages = [{"role": "user", "content": "Where is the cat?"}]
    whole = client.chat.completions.create(model="nano", messages=messages, max_completion_tokens=24, seed=3,
                                           logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    check("a chat", choice.message.role == "assistant" and bool(choice.message.content), whole)
    check("its scores", all(len(one.top_logprobs) == 2 for one in choice.logprobs.content), choice)
    stream = client.chat.completions.create(model="nano", messages=messages, max_completion_tokens=24, seed=3, stream=True)
    text = "".join(event.choices[0].delta.content or "" for event in stream)
    check("a stream of it", text == choice.message.content, text)
    stop = choice.message.content[5:8]
    stopped = client.chat.completions.create(model="nano", messages=messages, seed=3, max_completion_tokens=24, stop=stop)
    check("a stop string", stopped.choices[0].finish_reason == "stop", stopped)
    # The client's helper takes an answer that was cut off by its length for an error.
    with client.chat.completions.stream(model="nano", messages=messages, max_completion_tokens=24, seed=3, stop=stop) as helped:
        final = helped.get_final_completion()
    check("a stream by the client's helper", final.choices[0].message.content == stopped.choices[0].message.content, final)


def forms(client):
    schema = {"type": "object", "properties": {"mood": {"enum": ["glad", "sad"]}, "n": {"type": "integer", "maximum": 99, "minimum": 0}},
              "required": ["mood", "n"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": "How is the cat?"}], max_completion_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "cat", "schema": schema, "strict": True}})
    value = json.loads(answer.choices[0].message.content)
    check("an answer of a schema", set(value) == {"mood", "n"} and value["mood"] in ("glad", "sad"), answer)


def errors(client, url):
    make = client.completions.create
    refused("a wrong temperature", openai.BadRequestError,
            lambda: make(model="nano", prompt="a", temperature=3), "temperature")
    refused("an unknown field", openai.BadRequestError,
            lambda: make(model="nano", prompt="a", extra_body={"gramar": "x"}), "gramar")
    refused("an unknown model", openai.NotFoundError, lambda: make(model="gpt-9", prompt="a"), "model")
    refused("a prompt that is too long", openai.BadRequestError, lambda: make(model="nano", prompt=[[5] * 1000]))
    stranger = openai.OpenAI(base_url=url + "/v1", api_key="other", max_retries=0)
    refused("a wrong key", openai.AuthenticationError, lambda: stranger.models.list())


def messages(client):
    talk = [{"role": "user", "content": "Where is the cat?"}]
    whole = client.messages.create(model="nano", max_tokens=24, messages=talk, system="Be brief.", extra_body={"top_k": 1})
    check("a message", whole.content[0].type == "text" and whole.usage.output_tokens > 0, whole)
    with client.messages.stream(model="nano", max_tokens=24, messages=talk, system="Be brief.", extra_body={"top_k": 1}) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    check("a stream of it", text == whole.content[0].text == final.content[0].text, text)
    check("why it ended", whole.stop_reason == final.stop_reason == "max_tokens", final)
    try:
        client.messages.create(model="nano", max_tokens=1, messages=talk, extra_body={"temperature": 7})
    except anthropic.BadRequestError as error:
        check("a wrong temperature, told to it", error.body["error"]["type"] == "invalid_request_error", error)
    else:
        check("a wrong temperature, told to it", False, "no error")


if __name__ == "__main__":
    main()
