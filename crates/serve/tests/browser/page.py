#!/usr/bin/env python3
"""The page at / in a real browser, on the embedded model: run by .ci/run, or by hand as

    crates/serve/tests/browser/page.py target/debug/cadre [--chromium /usr/bin/chromium] [--pictures FOLDER]

Prints one line with the result; leaves with 1 when something is wrong."""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from browser import Browser

ROOT = Path(__file__).resolve().parents[4]
PROMPT = "Once upon a time, there was a little"
IDLE = "document.getElementById('send').textContent !== 'Stop'"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
MARKDOWN = """# A *title* with `code`

Some **bold
words**, [a link](https://example.org/a), [no link](javascript:alert(1)) and snake_case_names.

1. one
   - inner
2. two

| a | b |
|---|---|
| 1 | ~~2~~ |

> quoted

```html
<b>no **tag**</b>
```

<img src=x onerror="window.harmed = true"> <script>window.harmed = true</script>"""
# What becomes of it, without the elements of tokens.
RENDERED = """<h3>A <em>title</em> with <code>code</code></h3><p>Some <strong>bold
words</strong>, <a>a link</a>, [no link](javascript:alert(1)) and snake_case_names.</p><ol><li><p>one</p><ul><li><p>inner</p></li></ul></li>\
<li><p>two</p></li></ol><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td><del>2</del></td></tr></tbody></table>\
<blockquote><p>quoted</p></blockquote><pre><code><b>no **tag**</b></code></pre>\
<p><img src=x onerror="window.harmed = true"> <script>window.harmed = true</script></p>"""
# Answers of the server are replaced by pieces of a text.
WRITE = """window.asked = fetch, window.fetch = (path, options) => path !== '/v1/chat/completions' ? asked(path, options) : new Response(new ReadableStream({
  async start(stream) {
    const send = (data) => stream.enqueue(new TextEncoder().encode(`data: ${data}\\n\\n`));
    for (const content of PIECES) {
      send(JSON.stringify({ choices: [{ delta: { content } }] }));
      await new Promise((go) => setTimeout(go, 1));
    }
    await new Promise((go) => setTimeout(go, 50));
    window.streamed = rendered();
    send('[DONE]');
    stream.close();
  },
}))"""
SHOWN = """window.rendered = () => {
  const told = (node) => {
    if (node.nodeType === 3 || node.classList.contains('token')) return node.textContent;
    const tag = node.tagName.toLowerCase();
    return `<${tag}>${[...node.childNodes].map(told).join('')}</${tag}>`;
  };
  return [...document.querySelector('.answer .body').childNodes].map(told).join('');
}"""


@contextlib.contextmanager
def server(program, *options):
    command = [program, "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(20)


def answers(browser):
    """Texts of the answers that are shown."""
    return browser.value("[...document.querySelectorAll('.answer .body')].map((body) => body.textContent)")


def colours(browser, canvas):
    """How many colours a canvas has."""
    return browser.value(
        f"""(() => {{
          const canvas = document.querySelector({json.dumps(canvas)});
          const data = new Uint32Array(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer);
          return new Set(data).size;
        }})()"""
    )


def fills(browser, canvas, least):
    """Waits until a canvas has more than so many colours: it is drawn a frame later."""
    end = time.monotonic() + 10
    while colours(browser, canvas) <= least:
        assert time.monotonic() < end, f"{canvas} has {colours(browser, canvas)} colours"
        time.sleep(0.03)


def stored(browser):
    return json.loads(browser.value("localStorage.getItem('cadre.conversation.1')"))


def asked_directly(url, answer):
    """The text and experts that the same request gets without the page."""
    cadre = {"return_routing": True}
    for key, rule in answer["rules"].items():
        layer, expert = key.split(":")
        for name in rule:
            cadre.setdefault(name, {}).setdefault(layer, []).append(int(expert))
    body = {"prompt": PROMPT, "max_tokens": 96, "temperature": 0, "top_p": 1, "seed": answer["seed"], "cadre": cadre}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        choice = json.load(response)["choices"][0]
    return choice["text"], choice["cadre"]["routing"]["tokens"]


def write(browser):
    """The text is written bit by bit, and the map fills."""
    browser.wait("!document.getElementById('send').disabled", about="the page connects")
    before = colours(browser, "#map canvas")
    browser.value(
        """window.seen = new Set(), new MutationObserver(() => {
          window.seen.add(document.querySelectorAll('.token').length);
        }).observe(document.getElementById('turns'), { childList: true, subtree: true })"""
    )
    browser.click("#prompt")
    browser.type(PROMPT)
    browser.key("Enter", 13, "\r")
    browser.wait(f"document.querySelectorAll('.token').length > 20 && {IDLE}", about="an answer is written")
    steps = browser.value("window.seen.size")
    assert steps > 5, f"the answer came in {steps} steps"
    browser.wait(f"document.getElementById('tiles').textContent.includes('tok/s')")
    fills(browser, "#map canvas", before + 10)


def choose(browser):
    """By keyboard, an expert that the answer used; its layer and number."""
    browser.value("document.querySelector('#map .map-cursor').focus()")
    for _ in range(16):
        if " tokens, mean weight" in browser.text("#readout"):
            break
        browser.key("ArrowRight", 39)
    told = browser.text("#readout")
    assert " tokens, mean weight" in told, told
    browser.key("Enter", 13, "\r")
    browser.wait("!document.getElementById('editor').hidden", about="the editor opens")
    words = told.replace(",", " ").replace(":", " ").split()
    return int(words[1]), int(words[3])


def steer(browser, url):
    """A muted expert is picked no more, and the other answer stays beside the new one."""
    first = answers(browser)[0]
    layer, expert = choose(browser)
    assert browser.value("document.querySelectorAll('.token.tinted').length") > 0, "its tokens are tinted"
    browser.click('#rules button[data-rule="mute"]')
    browser.click("#again")
    browser.wait(f"document.querySelectorAll('.answer').length === 2 && {IDLE}", about="a second answer")
    shown = answers(browser)
    assert shown[0] == first, "the first answer stays"
    assert f"L{layer} E{expert} muted" in browser.text(".answer:nth-child(2) .steered")
    assert "picked by none" in browser.text("#readout"), browser.text("#readout")
    for text, answer in zip(shown, stored(browser)["turns"][0]["answers"], strict=True):
        direct, tokens = asked_directly(url, answer)
        assert text == direct, f"the page shows {text!r}, the server says {direct!r}"
        picked = any(expert in token["experts"][layer] for token in tokens)
        assert picked != bool(answer["rules"]), f"expert {expert} of layer {layer}"
    browser.click("#scope button:nth-child(3)")
    browser.wait("document.getElementById('legend-about').textContent.includes('against')")


def reload(browser, url):
    """The conversation is there again, with what its experts did."""
    before = answers(browser)
    browser.open(url + "/")
    browser.wait("document.querySelectorAll('.answer').length === 2", about="the conversation comes back")
    assert answers(browser) == before
    browser.wait("document.getElementById('legend-about').textContent.includes('mean weight')")
    fills(browser, "#map canvas", 10)


def made(program, folder):
    """Files that Cadre writes: what is opened, and how the page calls it."""

    def cadre(*words):
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    text, trace, statistics, plan = (folder / name for name in ("text.jsonl", "t.parquet", "t.json", "plan.json"))
    text.write_text(json.dumps({"domain": "prose", "text": "Once upon a time there was a fox. " * 8}) + "\n")
    cadre("trace", "--data", str(text), "-o", str(trace))
    statistics.write_text(cadre("trace", "show", str(trace), "-o", "json"))
    cadre("plan", "prune", "--trace", str(trace), "--keep", "0.5", "-o", str(plan))
    return [(ROOT / "models/nano/profile.json", "Profile"), (statistics, "Trace of qwen3_moe"), (plan, "Plan by router-mass")]


def formats(browser, program):
    """Answers of a conversation are Markdown, as they come and afterwards; HTML in them is text."""
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
        template.write(TEMPLATE)
        template.flush()
        with server(program, "--chat-template-file", template.name) as url:
            browser.open(url + "/")
            browser.wait("!document.getElementById('send').disabled", about="the page connects")
            browser.value(SHOWN)
            pieces = [MARKDOWN[at : at + 3] for at in range(0, len(MARKDOWN), 3)]
            browser.value(WRITE.replace("PIECES", json.dumps(pieces)) + ", 0")
            browser.click("#prompt")
            browser.type("Show me")
            browser.key("Enter", 13, "\r")
            browser.wait(f"window.streamed && {IDLE}", about="the answer is complete")
            for shown in (browser.value("streamed"), browser.value("rendered()")):
                assert shown == RENDERED, shown
            link = browser.value("(({ href, target, rel }) => [href, target, rel])(document.querySelector('.body a'))")
            assert link == ["https://example.org/a", "_blank", "noopener noreferrer"], link
            # Tokens can be pointed at wherever they stand; one of them may stand in two places.
            browser.click(".body strong .token")
            assert browser.value("document.querySelectorAll('.token.marked').length") >= 1
            browser.open(url + "/")
            browser.wait("document.querySelectorAll('.answer').length === 1", about="the conversation comes back")
            browser.value(SHOWN)
            assert browser.value("rendered()") == RENDERED
            assert browser.value("window.harmed === undefined && !document.querySelector('.answer :is(img, script)')")


def files(browser, program):
    """Files are shown; what a plan drops is masked."""
    with tempfile.TemporaryDirectory() as folder:
        for path, title in made(program, Path(folder)):
            nodes = browser.call("DOM.getDocument")["root"]["nodeId"]
            field = browser.call("DOM.querySelector", nodeId=nodes, selector="#file")["nodeId"]
            browser.call("DOM.setFileInputFiles", nodeId=field, files=[str(path)])
            browser.wait(f"document.getElementById('inspect-title').textContent === '{title}'", about=f"{title} opens")
            fills(browser, "#inspect-map canvas", 5)
    browser.click("#inspect-mask")
    # Half of the 16 experts of each of 6 layers.
    browser.wait("document.getElementById('chips').textContent.includes('and 8 more')")
    browser.click("#clear")


def look(browser, pictures):
    """Dark, and a phone."""
    for width, height, dark, phone in [(1280, 860, False, False), (1280, 860, True, False), (390, 844, True, True), (390, 844, False, True)]:
        browser.look(width, height, dark=dark, phone=phone, calm=True)
        for tab in ("chat", "experts") if phone else ("chat",):
            if phone:
                browser.click(f"#tab-{tab}")
            wide = browser.value("document.documentElement.scrollWidth")
            assert wide <= width, f"{wide} wide on a screen of {width}"
            if pictures:
                browser.picture(f"{pictures}/{width}-{'dark' if dark else 'light'}-{tab}.png")
        # White or nearly so, or black or nearly so.
        light = browser.value("parseInt(getComputedStyle(document.body).backgroundColor.slice(4)) > 128")
        assert light != dark, "the page follows the system"
    browser.look(1280, 860)
    browser.click("#inspect-close")


def refuse(browser):
    """What the server refuses is told as a sentence."""
    browser.click("#settings-button")
    browser.value("document.getElementById('set-max').value = 100000")
    browser.click("#settings-form button[type=submit]")
    browser.click("#prompt")
    browser.type("And then")
    browser.key("Enter", 13, "\r")
    browser.wait("document.querySelector('.answer .problem')?.textContent.includes('context')", about="the refusal is told")
    browser.click("#new")
    browser.wait("document.querySelectorAll('.turn').length === 0")


def check(program, chromium, pictures):
    with server(program) as url:
        browser = Browser(chromium)
        try:
            browser.look(1280, 860)
            # The most probable text, which is long enough.
            greedy = "localStorage.setItem('cadre.settings.1', JSON.stringify({ temperature: 0 }))"
            browser.call("Page.addScriptToEvaluateOnNewDocument", source=greedy)
            browser.open(url + "/")
            write(browser)
            steer(browser, url)
            reload(browser, url)
            files(browser, program)
            look(browser, pictures)
            assert browser.troubles == [], browser.troubles
            refuse(browser)
            before = list(browser.troubles)
            formats(browser, program)
            assert browser.troubles == before, browser.troubles
        except Exception:
            if pictures:
                browser.picture(f"{pictures}/failed.png")
            raise
        finally:
            browser.end()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cadre")
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    parser.add_argument("--pictures")
    given = parser.parse_args()
    if not given.chromium:
        sys.exit("page: chromium is not installed")
    check(given.cadre, given.chromium, given.pictures)
    print("page: ok (text streams, the map fills, a muted expert is picked no more, a reload keeps the conversation, files, dark, phone, refusals, Markdown)")


if __name__ == "__main__":
    main()
