// The page: what is loaded, what runs, what is looked at, and how these change each other.

import * as api from "./api.js";
import { scale, onTheme } from "./colours.js";
import { chips, Talk } from "./chat.js";
import { read } from "./files.js";
import { ExpertMap } from "./map.js";
import { Routing, Shape } from "./routing.js";
import { many, show as showTiles, tiles } from "./stats.js";
import { RULES, said, Steering } from "./steering.js";
import { Answer, Conversation, loadSettings, saveSettings } from "./store.js";

const byId = (id) => document.getElementById(id);
/** Tokens of a continued text, unless the settings say otherwise. */
const CONTINUED = 96;
/** Milliseconds between two looks at the server's numbers while it writes. */
const LOOK = 2000;
/** And between two counts over all tokens of an answer. */
const COUNT = 200;

const state = {
  model: null,
  shape: null,
  /** The model has no chat template: text is continued. */
  isText: false,
  conversation: new Conversation(""),
  settings: loadSettings(),
  steering: new Steering(),
  running: null,
  /** The answer whose experts are shown, its turn, and the piece of it that is pointed at. */
  turn: null,
  answer: null,
  piece: -1,
  scope: "live",
  selected: null,
  hovered: null,
  before: null,
  numbers: null,
  document: null,
  view: 0,
};

const talk = new Talk(byId("turns"), byId("scroll"), {
  point: (answer, piece) => look(answer, piece),
  focus: (turn, answer) => focus(turn, answer),
  choose: (turn, at) => choose(turn, at),
  another: (turn) => write(turn, randomSeed()),
});

const map = new ExpertMap(byId("map"), "Experts by layer; arrow keys move, Enter chooses", {
  see: (cell) => hover(cell),
  pick: (cell) => select(cell),
  act: (key, cell) => shortcut(key, cell),
});

const fileMap = new ExpertMap(byId("inspect-map"), "Experts of the file by layer; arrow keys move", {
  see: (cell) => tellFile(cell),
  pick: (cell) => fileMap.select(cell),
});

const randomSeed = () => Math.floor(Math.random() * 2 ** 31);

// ---- the model

async function connect() {
  try {
    state.model = await api.model();
  } catch (error) {
    byId("model").textContent = "Not connected";
    problem(error);
    if (error.status === 401) settings();
    return;
  }
  problem(null);
  const { model } = state;
  state.isText = model.has_chat_template === false;
  const knowsExperts = model.returns_routing === true && model.moe_layers?.length > 0;
  state.shape = knowsExperts ? new Shape(model.moe_layers, model.experts_per_layer.map((n) => n + (model.n_null ?? 0)), model.top_k) : null;
  byId("live").hidden = byId("steer").hidden = !knowsExperts;
  for (const part of document.querySelectorAll(".only-routing")) part.hidden = !knowsExperts;
  byId("main").classList.toggle("wide", (state.shape?.columns ?? 0) > 48);
  if (state.shape) {
    map.setShape(state.shape);
    byId("top-k").max = Math.max(...state.shape.counts);
    byId("top-k").placeholder = String(model.top_k);
  }
  byId("model").textContent = described(model);
  document.title = `${model.id} \u2013 Cadre`;
  state.conversation = Conversation.load(model.id);
  state.turn = state.conversation.turns.at(-1) ?? null;
  state.answer = state.turn?.answers[state.turn.chosen] ?? null;
  if (state.answer) state.scope = "answer";
  form();
  showAll();
  state.numbers = await api.metrics().catch(() => null);
  stats();
}

function described(model) {
  const parts = [model.id];
  if (model.n_params > 0) parts.push(`${many(model.n_params)} parameters, ${many(model.n_active_params)} active`);
  if (model.n_experts > 0) parts.push(`${model.top_k} of ${model.n_experts} experts in ${model.moe_layers?.length ?? model.n_layers} layers`);
  return parts.join(" \u00b7 ");
}

function form() {
  byId("prompt").placeholder = !state.isText ? "Write a message" : state.conversation.turns.length > 0 ? "Write on, or send nothing" : "Write the beginning";
  byId("prompt-label").textContent = state.isText ? "Text to continue" : "Message";
  for (const part of document.querySelectorAll(".only-chat")) part.hidden = state.isText;
  const send = byId("send");
  send.textContent = state.running ? "Stop" : state.isText ? "Continue" : "Send";
  send.disabled = !state.model;
  byId("again").disabled = Boolean(state.running) || state.conversation.turns.length === 0;
  byId("new").disabled = Boolean(state.running);
}

/** Tells what went wrong, or that nothing does. */
function problem(error) {
  byId("problem").hidden = !error;
  byId("problem").textContent = error ? error.message : "";
}

// ---- writing

function request(at, answer) {
  const { model, settings, conversation } = state;
  const body = { model: model.id, stream: true, stream_options: { include_usage: true }, temperature: settings.temperature, top_p: settings.top_p, seed: answer.seed };
  const most = settings.max_tokens > 0 ? settings.max_tokens : state.isText ? CONTINUED : 0;
  if (most > 0) body.max_tokens = most;
  if (state.shape) {
    const cadre = answer.steering.json();
    if (settings.routing) cadre.return_routing = true;
    if (Object.keys(cadre).length > 0) body.cadre = cadre;
  }
  if (state.isText) return ["/v1/completions", { ...body, prompt: conversation.prompt(at) }];
  return ["/v1/chat/completions", { ...body, messages: conversation.messages(at, settings.system) }];
}

/** Adds an answer to a turn, written with the steering of now. */
async function write(turn, seed) {
  if (state.running || !state.model) return;
  const answer = new Answer(state.steering, seed);
  turn.answers.push(answer);
  const running = { abort: new AbortController(), timer: setInterval(lookAtNumbers, LOOK) };
  state.running = running;
  Object.assign(state, { turn, answer, piece: -1, scope: state.scope === "change" ? "change" : "live", before: state.numbers });
  showAll();
  form();
  announce("Writing");
  try {
    await receive(turn, answer, running.abort.signal);
  } catch (error) {
    if (error.name === "AbortError") answer.finish = "stopped";
    else if (await retryAsText(error, turn, answer)) return;
    else [answer.finish, answer.error] = ["error", told(error)];
    if (error.status === 401) settings();
  } finally {
    clearInterval(running.timer);
    if (state.running === running) state.running = null;
  }
  answer.finish ??= "stop";
  if (state.scope === "live") state.scope = "answer";
  showAll();
  form();
  announce(answer.error ?? `The answer is complete: ${answer.clock?.tokens ?? 0} tokens.`);
  // What had the focus may have been drawn anew; a touch screen would open its keyboard.
  if (document.activeElement === document.body && matchMedia("(pointer: fine)").matches) byId("prompt").focus({ preventScroll: true });
  save();
  await lookAtNumbers();
}

/** For those who hear the page. While an answer is written the numbers of an expert change too often to be read out. */
function announce(text) {
  byId("status").textContent = text;
  byId("readout").setAttribute("aria-live", state.running ? "off" : "polite");
}

function told(error) {
  const hint = error.code === "context_length_exceeded" ? " \u201cNew\u201d begins again with an empty one." : "";
  return error.message + hint;
}

/** A server that did not say so beforehand has no chat template: its model continues text. */
async function retryAsText(error, turn, answer) {
  if (error.code !== "no_chat_template" || state.isText) return false;
  clearInterval(state.running.timer);
  state.running = null;
  state.isText = true;
  turn.answers = turn.answers.filter((other) => other !== answer);
  await write(turn, answer.seed);
  return true;
}

async function receive(turn, answer, signal) {
  const start = performance.now();
  answer.clock = { tokens: 0, seconds: 0 };
  const [path, body] = request(state.conversation.turns.indexOf(turn), answer);
  for await (const event of api.events(path, body, signal)) {
    if (event.usage) [answer.clock.prompt, answer.clock.tokens] = [event.usage.prompt_tokens, event.usage.completion_tokens];
    const choice = event.choices?.[0];
    if (!choice) continue;
    const text = choice.delta?.content ?? choice.text ?? "";
    const { cadre } = choice;
    if (cadre?.routing) keepRouting(answer, cadre);
    if (text !== "") {
      answer.clock.first ??= (performance.now() - start) / 1000;
      answer.clock.seconds = (performance.now() - start) / 1000 - answer.clock.first;
      answer.pieces.push({ text, end: cadre?.n_tokens ?? (answer.pieces.at(-1)?.end ?? 0) + 1 });
      answer.clock.tokens = answer.pieces.at(-1).end;
      talk.append(answer);
    }
    if (choice.finish_reason) answer.finish = choice.finish_reason;
    changed();
  }
}

function keepRouting(answer, cadre) {
  answer.routing ??= new Routing(state.shape.rows, state.shape.topK);
  for (const token of cadre.routing.tokens) answer.routing.add(token.position - cadre.n_prompt, token.experts, token.weights);
}

async function lookAtNumbers() {
  state.numbers = await api.metrics().catch(() => state.numbers);
  stats();
}

function save() {
  state.conversation.save();
}

// ---- what is looked at

function focus(turn, answer) {
  if (state.answer === answer) return;
  Object.assign(state, { turn, answer, piece: -1 });
  if (!state.running) state.scope = state.scope === "live" ? "answer" : state.scope;
  paint();
  stats();
}

function look(answer, piece) {
  if (answer !== state.answer) {
    const turn = state.conversation.turns.find((one) => one.answers.includes(answer));
    focus(turn, answer);
  }
  state.piece = piece;
  paint();
}

function choose(turn, at) {
  turn.chosen = at;
  focus(turn, turn.answers[at]);
  showAll();
  save();
}

let dirty = false;
let counted = 0;
/** Something came in: the map is drawn once per frame, what takes longer now and then. */
function changed() {
  if (dirty) return;
  dirty = true;
  requestAnimationFrame((now) => {
    dirty = false;
    paintMap();
    if (now - counted < COUNT) return;
    counted = now;
    readout();
    tint();
    stats();
  });
}

function showAll() {
  talk.show(state.conversation.turns, state.isText, Boolean(state.running));
  steering();
  paint();
  stats();
}

function stats() {
  showTiles(byId("tiles"), tiles(state.answer, state.shape, state.before, state.numbers));
}

const SCOPES = { live: "Now", answer: "Answer", change: "Change" };

/** The values of the map, how they are meant, and the largest of them. */
function values() {
  const { shape, answer, turn, piece, scope } = state;
  const routing = answer?.routing;
  if (!routing) return { values: null, about: "nothing recorded yet" };
  if (piece >= 0) {
    const { from, to } = range(answer, piece);
    const [first, last] = [routing.find(from), routing.find(to - 1)];
    const text = answer.pieces[piece].text;
    if (first < 0) return { values: null, about: `\u201c${text}\u201d was written last and not read` };
    return { values: routing.mean(shape, first, (last < 0 ? first : last) + 1), about: `weight for \u201c${text}\u201d` };
  }
  const mean = (one) => one.mean(shape, one.start, one.n);
  const first = turn?.answers[0]?.routing;
  if (scope === "change" && first && first !== routing) {
    const own = mean(first);
    return { values: mean(routing).map((value, i) => value - own[i]), kind: "change", about: "mean weight, against the first answer" };
  }
  if (scope === "live") return { values: routing.trail(shape), about: "weight, newest tokens" };
  return { values: mean(routing), about: "mean weight over the answer" };
}

/** The tokens of a piece of text. */
function range(answer, piece) {
  return { from: answer.pieces[piece - 1]?.end ?? 0, to: answer.pieces[piece].end };
}

function paint() {
  paintMap();
  readout();
  tint();
}

function paintMap() {
  if (!state.shape) return;
  const { values: raw, kind = "heat", about } = values();
  const largest = raw?.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;
  map.paint(raw?.map((value) => value / largest) ?? null, kind, state.steering);
  const shown = largest.toLocaleString("en", { maximumSignificantDigits: 2 });
  legend(kind, raw ? shown : "1", about);
  scopes();
}

function legend(kind, largest, about) {
  const colours = scale(kind);
  // The scale runs as the map's root does.
  const stops = [0, 0.05, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95, 1].map((at) => {
    const value = kind === "heat" ? Math.sqrt(at) : 0.5 + 0.5 * Math.sign(at - 0.5) * Math.sqrt(Math.abs(2 * at - 1));
    return `${colours[Math.round(255 * value)]} ${100 * at}%`;
  });
  byId("legend").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  byId("legend-low").textContent = kind === "change" ? `\u2212${largest}` : "0";
  byId("legend-high").textContent = kind === "change" ? `+${largest}` : largest;
  byId("legend-about").textContent = about;
}

function scopes() {
  const root = byId("scope");
  if (root.children.length === 0) {
    for (const [name, text] of Object.entries(SCOPES)) root.append(toggle(text, () => rescope(name)));
  }
  Object.keys(SCOPES).forEach((name, i) => {
    root.children[i].setAttribute("aria-pressed", String(state.scope === name));
    root.children[i].disabled = name === "change" && (state.turn?.answers.length ?? 0) < 2;
  });
}

function rescope(name) {
  Object.assign(state, { scope: name, piece: -1 });
  const { turn } = state;
  if (name === "change" && state.answer === turn.answers[0]) state.answer = turn.answers.at(-1);
  if (state.answer) talk.mark(state.answer, -1);
  paint();
}

function toggle(text, act) {
  const made = document.createElement("button");
  [made.type, made.textContent] = ["button", text];
  made.setAttribute("aria-pressed", "false");
  made.addEventListener("click", act);
  return made;
}

/** Tokens of the answers are tinted by their weight for the chosen expert. */
function tint() {
  const { selected } = state;
  talk.tint((answer, piece) => {
    if (!selected || !answer.routing) return 0;
    const { from, to } = range(answer, piece);
    let largest = 0;
    for (let index = from; index < to; index++) {
      const at = answer.routing.find(index);
      if (at >= 0) answer.routing.each(at, at + 1, (_, row, expert, weight) => {
        if (row === selected.row && expert === selected.expert) largest = Math.max(largest, weight);
      });
    }
    return Math.min(1, largest);
  });
}

// ---- an expert

function tell(cell) {
  const parts = [`Layer ${cell.layer}, expert ${cell.expert}`];
  const routing = state.answer?.routing;
  if (routing) {
    const { tokens, picked, weight } = routing.of(cell.row, cell.expert);
    parts.push(picked === 0 ? `picked by none of ${tokens} tokens` : `picked by ${picked} of ${tokens} tokens, mean weight ${weight.toFixed(2)}`);
  }
  const rule = state.steering.rule(cell.layer, cell.expert);
  return `${parts.join(": ")}${rule ? `; now ${said(rule)}` : ""}.`;
}

function readout() {
  const cell = state.hovered ?? state.selected;
  const text = cell ? tell(cell) : "Layers go down, experts across. Choose one to change what it does.";
  if (byId("readout").textContent !== text) byId("readout").textContent = text;
  if (cell) map.name(text);
}

function hover(cell) {
  state.hovered = cell;
  readout();
}

function select(cell) {
  const same = cell && state.selected?.row === cell.row && state.selected?.expert === cell.expert;
  state.selected = same ? null : cell;
  map.select(state.selected);
  editor();
  readout();
  tint();
}

function shortcut(key, cell) {
  const rule = state.steering.rule(cell.layer, cell.expert);
  const keys = { x: "mask", m: "mute", f: "force" };
  if (keys[key]) set(cell, keys[key], rule?.[keys[key]] ? undefined : true);
  else if (key === "+" || key === "=") set(cell, "bias", (rule?.bias ?? 0) + 1);
  else if (key === "-") set(cell, "bias", (rule?.bias ?? 0) - 1);
  else if (key === "Delete" || key === "Backspace") steer(state.steering.without(cell.layer, cell.expert));
  else if (key === "Escape") select(null);
  else return false;
  return true;
}

function set(cell, name, value) {
  steer(state.steering.with(cell.layer, cell.expert, name, value));
}

function steer(next) {
  state.steering = next;
  steering();
  paint();
}

function editor() {
  const { selected } = state;
  byId("editor").hidden = !selected;
  if (!selected) return;
  const rule = state.steering.rule(selected.layer, selected.expert) ?? {};
  const row = byId("rules");
  if (row.children.length === 0) {
    for (const name of ["mask", "mute", "force"]) {
      const made = toggle(name[0].toUpperCase() + name.slice(1), () => {
        const now = state.steering.rule(state.selected.layer, state.selected.expert);
        set(state.selected, name, now?.[name] ? undefined : true);
      });
      made.title = RULES[name].about;
      made.dataset.rule = name;
      row.append(made);
    }
  }
  for (const made of row.children) made.setAttribute("aria-pressed", String(Boolean(rule[made.dataset.rule])));
  byId("bias").value = rule.bias ?? 0;
  byId("bias-value").textContent = rule.bias ? said({ bias: rule.bias }) : "0";
}

function steering() {
  if (!state.shape) return;
  chips(byId("chips"), state.steering, (layer, expert) => steer(state.steering.without(layer, expert)));
  const { numbers, isEmpty } = state.steering;
  for (const [id, name] of [["top-k", "top_k"], ["top-p", "top_p"]]) {
    if (document.activeElement !== byId(id)) byId(id).value = numbers[name] ?? "";
  }
  byId("clear").disabled = byId("copy-steering").disabled = isEmpty;
  editor();
}

function number(id, name) {
  const text = byId(id).value;
  steer(state.steering.withNumber(name, text === "" ? undefined : Number(text)));
}

// ---- files

async function open(file) {
  if (!file) return;
  try {
    const found = read(file.name, await file.slice(0, 64 << 20).text());
    if (found.steering) {
      if (!state.shape) throw new Error("This server\u2019s model has no experts that can be steered.");
      steer(Steering.from(found.steering, state.shape));
    } else {
      showFile(found.document, file.name);
    }
    problem(null);
    tab("experts");
  } catch (error) {
    problem(error);
  }
}

function showFile(document_, name) {
  Object.assign(state, { document: document_, view: 0 });
  byId("inspect").hidden = false;
  byId("inspect-title").textContent = document_.title;
  byId("inspect-facts").textContent = `${name}: ${document_.facts}`;
  byId("inspect-views").replaceChildren(...(document_.views.length > 1 ? document_.views.map((view, i) => toggle(view.name, () => showView(i))) : []));
  byId("inspect-notes").replaceChildren(...document_.notes.map((note) => Object.assign(document.createElement("li"), { textContent: note })));
  byId("inspect-actions").hidden = !(document_.mask && state.shape && Object.keys(document_.mask).length > 0);
  byId("inspect-table").replaceChildren(...(document_.rows ? [table(document_)] : []));
  fileMap.setShape(document_.shape);
  showView(0);
  byId("inspect").scrollIntoView({ block: "start" });
}

function table({ head, rows }) {
  const made = document.createElement("table");
  const line = (parent, cells, tag) => {
    const row = parent.insertRow();
    for (const text of cells) row.append(Object.assign(document.createElement(tag), { textContent: text }));
  };
  line(made.createTHead(), head, "th");
  const body = made.createTBody();
  for (const cells of rows) line(body, cells, "td");
  return made;
}

function showView(at) {
  state.view = at;
  const view = state.document.views[at];
  [...byId("inspect-views").children].forEach((made, i) => made.setAttribute("aria-pressed", String(i === at)));
  const largest = view.fixed ? 1 : view.values.reduce((most, value) => Math.max(most, value), 0) || 1;
  fileMap.paint(view.values.map((value) => value / largest), view.kind, null);
  tellFile(null);
}

function tellFile(cell) {
  const view = state.document?.views[state.view];
  const at = cell ?? fileMap.selected;
  const text = at && view ? `Layer ${at.layer}, expert ${at.expert}: ${view.tell(at.row, at.expert)}.` : "Point at an expert to read what the file says of it.";
  byId("inspect-readout").textContent = text;
  if (at) fileMap.name(text);
}

function maskDropped() {
  try {
    steer(Steering.from({ mask: state.document.mask }, state.shape));
    problem(null);
  } catch (error) {
    problem(error);
  }
}

// ---- the rest of the page

function tab(name) {
  byId("main").dataset.tab = name;
  for (const one of ["chat", "experts"]) byId(`tab-${one}`).setAttribute("aria-pressed", String(one === name));
}

function settings() {
  const { settings } = state;
  byId("set-system").value = settings.system;
  byId("set-temperature").value = settings.temperature;
  byId("set-top-p").value = settings.top_p;
  byId("set-max").value = settings.max_tokens;
  byId("set-routing").checked = settings.routing;
  byId("set-key").value = api.key.get();
  if (!byId("settings").open) byId("settings").showModal();
}

function keepSettings() {
  const number = (id, fallback) => (byId(id).value === "" ? fallback : Number(byId(id).value));
  state.settings = {
    system: byId("set-system").value,
    temperature: number("set-temperature", 0.7),
    top_p: number("set-top-p", 1),
    max_tokens: Math.max(0, Math.floor(number("set-max", 0))),
    routing: byId("set-routing").checked,
  };
  saveSettings(state.settings);
  const key = byId("set-key").value;
  const isNew = key !== api.key.get();
  api.key.set(key);
  if (isNew || !state.model) connect();
}

function submit() {
  if (state.running) return state.running.abort.abort();
  const text = byId("prompt").value;
  const canGoOn = state.isText && state.conversation.turns.length > 0;
  if (text.trim() === "" && !canGoOn) return undefined;
  const turn = { text, answers: [], chosen: 0 };
  state.conversation.turns.push(turn);
  byId("prompt").value = "";
  grow();
  return write(turn, randomSeed());
}

function grow() {
  const { style } = byId("prompt");
  style.height = "auto";
  style.height = `${Math.min(220, byId("prompt").scrollHeight + 2)}px`;
}

function begin() {
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  byId("prompt").addEventListener("input", grow);
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!state.running) submit();
  });
  byId("new").addEventListener("click", () => {
    state.conversation = new Conversation(state.model?.id ?? "");
    Object.assign(state, { turn: null, answer: null, piece: -1, scope: "live" });
    save();
    problem(null);
    form();
    showAll();
    byId("prompt").focus();
  });
  byId("again").addEventListener("click", () => {
    const turn = state.conversation.turns.at(-1);
    if (turn) write(turn, turn.answers[0]?.seed ?? randomSeed());
  });
  byId("clear").addEventListener("click", () => steer(new Steering()));
  byId("copy-steering").addEventListener("click", () => navigator.clipboard?.writeText(JSON.stringify(state.steering.json())));
  byId("bias").addEventListener("input", () => set(state.selected, "bias", Number(byId("bias").value)));
  byId("top-k").addEventListener("change", () => number("top-k", "top_k"));
  byId("top-p").addEventListener("change", () => number("top-p", "top_p"));
  byId("open").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", () => open(byId("file").files[0]).then(() => (byId("file").value = "")));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    open(event.dataTransfer?.files[0]);
  });
  byId("inspect-close").addEventListener("click", () => (byId("inspect").hidden = true));
  byId("inspect-mask").addEventListener("click", maskDropped);
  byId("tab-chat").addEventListener("click", () => tab("chat"));
  byId("tab-experts").addEventListener("click", () => tab("experts"));
  byId("settings-button").addEventListener("click", settings);
  byId("settings").addEventListener("close", keepSettings);
  addEventListener("pagehide", save);
  onTheme(paint);
  form();
  stats();
  connect();
}

begin();
