// The server: what it serves, answers as they are written, and numbers; every failure is an Error with a sentence.

const KEY = "cadre.key";

/** The key is kept for this tab alone. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

/** What a server answered that is not an answer. */
export class Refused extends Error {
  constructor(message, status, code) {
    super(message);
    [this.status, this.code] = [status, code];
  }
}

function sentence(text) {
  const trimmed = String(text ?? "").trim();
  if (trimmed === "") return "Something went wrong, and the server did not say what.";
  const first = trimmed[0].toUpperCase() + trimmed.slice(1);
  return /[.!?]$/.test(first) ? first : `${first}.`;
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get() !== "") headers.authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is it still running?", 0);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const wait = response.headers.get("retry-after");
  const message = sentence(body.error?.message ?? `The server answered with status ${response.status}`);
  throw new Refused(wait ? `${message} It asks to wait ${wait} s.` : message, response.status, body.error?.code);
}

/** The model that is served: its id and what is known of it. */
export async function model() {
  const list = await (await ask("/v1/models")).json();
  const first = list.data?.[0];
  if (!first) throw new Refused("The server has no model.", 0);
  return { id: first.id, context: first.max_model_len, ...first.meta };
}

/** The numbers of /metrics by name; what has labels is added up. Histograms come as their sums and counts. */
export async function metrics() {
  const text = await (await ask("/metrics")).text();
  const numbers = {};
  for (const line of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(\{[^}]*\})? (\S+)/.exec(line);
    if (found && !found[1].endsWith("_bucket")) numbers[found[1]] = (numbers[found[1]] ?? 0) + Number(found[3]);
  }
  return numbers;
}

/** Events of an answer as it is written, parsed. */
export async function* events(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const response = await ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Refused("The answer broke off: the server has ended, or the connection was lost.", 0);
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(sentence(event.error.message), 200, event.error.code);
      yield event;
    }
  }
}
