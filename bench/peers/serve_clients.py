"""The clients of OpenAI and Anthropic against `cadre serve`: answers, streams, scores, forms, tools, vectors, experts and errors as they understand them.

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

TEMPLATE = """{% if tools %}tools: {{ tools | tojson }}
{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content or "" }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}
{% endfor %}assistant:"""
# What a tool is called with; any answer that fits is short.
PLACE = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"], "additionalProperties": False}


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
        tools(client)
        vectors(client)
        experts(client)
        errors(client, url)
        talker = anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0, timeout=120)
        messages(talker)
        message_tools(talker)
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


def tools(client):
    """A model that was not trained for tools calls them where it has to."""
    known = [{"type": "function", "function": {"name": name, "description": "Tells it.", "parameters": PLACE}} for name in ("weather", "news")]
    talk = [{"role": "user", "content": "How is the weather in Rome?"}]
    must = {"type": "function", "function": {"name": "weather"}}
    ask = {"model": "nano", "messages": talk, "tools": known, "temperature": 0, "max_completion_tokens": 80}
    whole = client.chat.completions.create(**ask, tool_choice=must)
    choice = whole.choices[0]
    call = choice.message.tool_calls[0]
    check("a call of a tool", choice.finish_reason == "tool_calls" and call.function.name == "weather", whole)
    check("its arguments fit", json.loads(call.function.arguments)["city"] in ("Rome", "Oslo"), call)
    parts = [part for event in client.chat.completions.create(**ask, tool_choice=must, stream=True)
             for part in event.choices[0].delta.tool_calls or []]
    streamed = "".join(part.function.arguments or "" for part in parts)
    check("a stream of it", (parts[0].function.name, streamed) == ("weather", call.function.arguments), parts)
    some = client.chat.completions.create(**ask, tool_choice="required").choices[0].message.tool_calls
    check("a call of any tool", some[0].function.name in ("weather", "news"), some)
    talk += [choice.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
    after = client.chat.completions.create(model="nano", messages=talk, tools=known, tool_choice="none", max_completion_tokens=8)
    check("an answer after its result", bool(after.choices[0].message.content), after)


def vectors(client):
    """The client asks for base64 unless told otherwise."""
    answer = client.embeddings.create(model="nano", input=["the cat", "the dog"])
    plain = client.embeddings.create(model="nano", input="the dog", encoding_format="float")
    check("vectors", [one.index for one in answer.data] == [0, 1] and abs(sum(x * x for x in answer.data[0].embedding) - 1) < 1e-5)
    check("the same as numbers", max(abs(a - b) for a, b in zip(answer.data[1].embedding, plain.data[0].embedding, strict=True)) < 1e-7)


def experts(client):
    """What is beyond OpenAI's interface goes through `extra_body`, and comes back."""
    ask = {"model": "nano", "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
    steered = client.completions.create(**ask, extra_body={"cadre": {"mask": {"2": [5, 7]}, "top_k": 2, "return_routing": True}})
    tokens = steered.choices[0].cadre["routing"]["tokens"]
    picked = [layer for token in tokens for layer in token["experts"]]
    check("experts of an answer", len(tokens) == 4 and all(len(layer) == 2 for layer in picked), tokens)
    check("masked ones are not among them", not {5, 7} & {expert for token in tokens for expert in token["experts"][2]}, tokens)
    refused("an expert that is not there", openai.BadRequestError,
            lambda: client.completions.create(**ask, extra_body={"cadre": {"mask": {"2": [99]}}}), "cadre.mask")


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


def message_tools(client):
    known = [{"name": "weather", "description": "Tells it.", "input_schema": PLACE}]
    talk = [{"role": "user", "content": "How is the weather in Rome?"}]
    ask = {"model": "nano", "max_tokens": 80, "tools": known, "tool_choice": {"type": "tool", "name": "weather"}}
    whole = client.messages.create(**ask, messages=talk)
    used = next(block for block in whole.content if block.type == "tool_use")
    check("a call of a tool", whole.stop_reason == "tool_use" and used.input["city"] in ("Rome", "Oslo"), whole)
    with client.messages.stream(**ask, messages=talk) as stream:
        final = stream.get_final_message()
    check("a stream of one", [block.name for block in final.content if block.type == "tool_use"] == ["weather"], final)
    result = {"type": "tool_result", "tool_use_id": used.id, "content": "Rain."}
    talk += [{"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    after = client.messages.create(model="nano", max_tokens=8, messages=talk, tools=known, tool_choice={"type": "none"})
    check("an answer after its result", after.usage.output_tokens > 0, after)


if __name__ == "__main__":
    main()
