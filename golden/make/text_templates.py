"""Makes golden/text/chat/: conversations rendered by chat templates of real models, as transformers renders them.

    recipes/data/vocabs.sh                                   # the templates, out of llama.cpp's repository
    PY="$(bash golden/make/env.sh)" && "$PY" golden/make/text_templates.py

conversations.json  [{"name", "messages", "tools", "add_generation_prompt", "extra"}].
templates/*.jinja   templates under Apache-2.0 or MIT, see templates/SOURCES.md.
rendered/*.json     {conversation: {"text"} | {"refused": words of raise_exception} | {"error": kind of failure}}.
real.json           for all templates of vocabs.sh, committed or not: sha256 of the template, and per conversation the
                    sha256 of the text, "refused" or "error".

The clock that templates may ask stands at NOW.
"""

import datetime
import hashlib
import json
import shutil

import jinja2
from common import ROOT, versions
from transformers.utils import chat_template_utils

OUT = ROOT / "golden" / "text" / "chat"
REAL = ROOT / ".cache" / "data" / "vocabs"
NOW = 1_763_812_800  # 2025-11-22 12:00 UTC
BOS, EOS = "<s>", "</s>"

# template: model it is from, licence
COMMITTED = {
    "Qwen-Qwen3-0.6B": ("Qwen/Qwen3-0.6B", "Apache-2.0"),
    "Qwen3-Coder": ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "Apache-2.0"),
    "openai-gpt-oss-120b": ("openai/gpt-oss-120b", "Apache-2.0"),
    "deepseek-ai-DeepSeek-V3.1": ("deepseek-ai/DeepSeek-V3.1", "MIT"),
    "GLM-4.6": ("zai-org/GLM-4.6", "MIT"),
    "ibm-granite-granite-3.3-2B-Instruct": ("ibm-granite/granite-3.3-2b-instruct", "Apache-2.0"),
    "ibm-granite-granite-4.0": ("ibm-granite/granite-4.0-h-tiny", "Apache-2.0"),
    "mistralai-Mistral-Nemo-Instruct-2407": ("mistralai/Mistral-Nemo-Instruct-2407", "Apache-2.0"),
    "microsoft-Phi-3.5-mini-instruct": ("microsoft/Phi-3.5-mini-instruct", "MIT"),
    "HuggingFaceTB-SmolLM3-3B": ("HuggingFaceTB/SmolLM3-3B", "Apache-2.0"),
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place, \"now\" or later <b>",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "City, e.g. K\u00f6ln"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
                "days": {"type": "integer", "minimum": 0, "maximum": 7},
                "scale": {"type": "number", "default": 1.0},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["place"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "description": "The time", "parameters": {"type": "object", "properties": {}}},
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def call(name, arguments, id):
    return {"type": "function", "id": id, "function": {"name": name, "arguments": arguments}}


def result(text, name, id):
    return {"role": "tool", "content": text, "name": name, "tool_call_id": id}


ASK = user("What is the weather in K\u00f6ln?")
ONE_CALL = [call("get_weather", {"place": "K\u00f6ln", "days": 2, "scale": 0.5, "tags": ["a", "b"]}, "abcdef123")]
TWO_CALLS = [call("get_weather", {"place": "Bonn"}, "abcdef123"), call("clock", {}, "abcdef456")]
ANSWERED = [ASK, assistant("", tool_calls=ONE_CALL), result('{"t": 21}', "get_weather", "abcdef123")]

CONVERSATIONS = [
    ("user", [user("Hello")], {}),
    ("no_prompt", [user("Hello"), assistant("Hi there.")], {"add_generation_prompt": False}),
    ("no_prompt_after_user", [user("Hello")], {"add_generation_prompt": False}),
    ("system", [system("Be brief."), user("Hello")], {}),
    ("turns", [system("S"), user("1"), assistant("2"), user("3"), assistant("4"), user("5")], {}),
    ("white_space", [system("  S \n"), user("\n\n 1 \n"), assistant(" 2\n\n"), user("\t3 ")], {}),
    ("unicode", [user("\u4f60\u597d <|im_end|> \U0001f468\u200d\U0001f469\u200d\U0001f467 <b>&amp;</b> \"'\\")], {}),
    ("tools", [ASK], {"tools": [WEATHER, CLOCK]}),
    ("tools_system", [system("Be brief."), ASK], {"tools": [WEATHER]}),
    ("tool_call", [ASK, assistant("", tool_calls=ONE_CALL)], {"tools": [WEATHER], "add_generation_prompt": False}),
    ("tool_result", ANSWERED, {"tools": [WEATHER]}),
    ("tool_answer", [*ANSWERED, assistant("21 degrees."), user("Thanks")], {"tools": [WEATHER]}),
    ("tool_two", [ASK, assistant("Let me see.", tool_calls=TWO_CALLS), result("21", "get_weather", "abcdef123"),
                  result("12:00", "clock", "abcdef456")], {"tools": [WEATHER, CLOCK]}),
    ("tool_text_arguments", [ASK, assistant("", tool_calls=[call("clock", '{"a": 1}', "abcdef123")]),
                             result("12:00", "clock", "abcdef123")], {"tools": [CLOCK]}),
    ("tool_null_content", [ASK, assistant(None, tool_calls=ONE_CALL), result("21", "get_weather", "abcdef123")],
     {"tools": [WEATHER]}),
    ("thinking_off", [system("S"), user("Hello")], {"extra": {"enable_thinking": False, "thinking": False}}),
    ("thinking_on", [user("Hello")], {"extra": {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}}),
    ("reasoning", [user("1+1?"), assistant("2", reasoning_content="One and one."), user("2+2?"),
                   assistant("4", reasoning_content="Two and two.")], {"add_generation_prompt": False}),
    ("reasoning_in_text", [user("1+1?"), assistant("<think>\nOne and one.\n</think>\n\n2"), user("2+2?")], {}),
    ("reasoning_and_tools", [ASK, assistant("", reasoning="Ask the tool.", tool_calls=ONE_CALL),
                             result("21", "get_weather", "abcdef123")], {"tools": [WEATHER]}),
    ("parts", [{"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " again"}]}], {}),
    ("two_users", [user("1"), user("2")], {}),
    ("assistant_first", [assistant("1"), user("2")], {}),
    ("unknown_role", [user("1"), {"role": "critic", "content": "2"}], {}),
    ("late_system", [user("1"), assistant("2"), system("3"), user("4")], {}),
]


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc).replace(tzinfo=None)


def conversations():
    plain = {"tools": None, "add_generation_prompt": True, "extra": {}}
    return [{"name": name, "messages": messages, **plain, **options} for name, messages, options in CONVERSATIONS]


def render(template, conversation):
    try:
        rendered, _ = chat_template_utils.render_jinja_template(
            conversations=[conversation["messages"]],
            tools=conversation["tools"],
            chat_template=template,
            add_generation_prompt=conversation["add_generation_prompt"],
            **{"bos_token": BOS, "eos_token": EOS, **conversation["extra"]},
        )
        return {"text": rendered[0]}
    except jinja2.exceptions.UndefinedError:
        return {"error": "UndefinedError"}
    except jinja2.exceptions.TemplateError as error:
        return {"refused": str(error)} if type(error) is jinja2.exceptions.TemplateError else {"error": type(error).__name__}
    except Exception as error:  # what Python makes of a template that does not fit
        return {"error": type(error).__name__}


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main():
    chat_template_utils.datetime = Clock
    cases = conversations()
    for folder in ("templates", "rendered"):
        (OUT / folder).mkdir(parents=True, exist_ok=True)
    dump = lambda value: json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    (OUT / "conversations.json").write_text(dump(cases), encoding="utf-8")
    real = {}
    sources = {path.stem: path for path in (REAL / "templates").glob("*.jinja")}
    for name in sorted(sources):
        template = sources[name].read_bytes().decode("utf-8")
        results = {case["name"]: render(template, case) for case in cases}
        short = lambda result: digest(result["text"]) if "text" in result else next(iter(result))
        real[name] = {"sha256": digest(template), **{case: short(result) for case, result in results.items()}}
        if name in COMMITTED:
            shutil.copyfile(sources[name], OUT / "templates" / f"{name}.jinja")
            (OUT / "rendered" / f"{name}.json").write_text(dump(results), encoding="utf-8")
    (OUT / "real.json").write_text(dump(real), encoding="utf-8")
    lines = [f"| `{name}.jinja` | {model} | {licence} |" for name, (model, licence) in COMMITTED.items()]
    about = "Chat templates as they come with their models, taken unchanged from `models/templates/` of llama.cpp\n"
    about += "(source archive of llama-cpp-python 0.3.36).\n\n| file | model | licence |\n|---|---|---|\n"
    (OUT / "templates" / "SOURCES.md").write_text(f"{about}{chr(10).join(lines)}\n", encoding="utf-8")
    manifest = {"script": "golden/make/text_templates.py", "now": NOW, "bos": BOS, "eos": EOS, "versions": versions()}
    manifest["versions"]["jinja2"] = jinja2.__version__
    (OUT / "MANIFEST.json").write_text(dump(manifest), encoding="utf-8")


if __name__ == "__main__":
    main()
