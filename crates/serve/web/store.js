// The conversation: turns with one or several answers each, kept in the browser within bounds.

import { Routing } from "./routing.js";
import { Steering } from "./steering.js";

const CONVERSATION = "cadre.conversation.1";
const SETTINGS = "cadre.settings.1";
/** Letters that are kept: browsers give a site about five million. */
const MOST = 2_000_000;

export const DEFAULTS = { system: "", temperature: 0.7, top_p: 1, max_tokens: 0, routing: true };

/** One answer. */
export class Answer {
  constructor(steering, seed) {
    this.steering = steering;
    this.seed = seed;
    /** Pieces of text as they came, each with the number of tokens up to its end. */
    this.pieces = [];
    this.routing = null;
    this.finish = null;
    this.error = null;
    this.clock = null;
  }

  get text() {
    return this.pieces.map((piece) => piece.text).join("");
  }

  /** For storage. */
  plain(withRouting) {
    const { seed, pieces, finish, error, clock } = this;
    const { rules, numbers } = this.steering;
    const kept = withRouting ? { pieces: pieces.map((piece) => [piece.text, piece.end]), routing: this.routing?.pack() } : { pieces: [[this.text, pieces.at(-1)?.end ?? 0]] };
    return { rules, numbers, seed, finish, error, clock, ...kept };
  }

  static from(plain) {
    const answer = new Answer(new Steering(plain.rules, plain.numbers), plain.seed);
    answer.pieces = plain.pieces.map(([text, end]) => ({ text, end }));
    answer.routing = plain.routing ? Routing.unpack(plain.routing) : null;
    answer.finish = plain.finish ?? "stop";
    [answer.error, answer.clock] = [plain.error, plain.clock];
    return answer;
  }
}

export class Conversation {
  constructor(model) {
    this.model = model;
    /** `{text, answers, chosen}`: what was asked, and the answers, one of which the conversation goes on with. */
    this.turns = [];
  }

  /** What the model is to read before it answers turn `at`, as messages. */
  messages(at, system) {
    const messages = system.trim() === "" ? [] : [{ role: "system", content: system }];
    for (const turn of this.turns.slice(0, at)) {
      messages.push({ role: "user", content: turn.text }, { role: "assistant", content: turn.answers[turn.chosen].text });
    }
    return [...messages, { role: "user", content: this.turns[at].text }];
  }

  /** The same for a model that only continues text: everything in one. */
  prompt(at) {
    const before = this.turns.slice(0, at).map((turn) => turn.text + turn.answers[turn.chosen].text);
    return before.join("") + this.turns[at].text;
  }

  /** Stores it; routing of the oldest answers gives way first, and then the oldest turns. True when all of it was kept. */
  save() {
    const { model, turns } = this;
    for (let bare = 0, first = 0; first <= turns.length; ) {
      const kept = turns.slice(first).map((turn, i) => ({
        text: turn.text,
        chosen: turn.chosen,
        answers: turn.answers.map((answer) => answer.plain(i + first >= bare)),
      }));
      const text = JSON.stringify({ model, turns: kept });
      try {
        if (text.length <= MOST) {
          localStorage.setItem(CONVERSATION, text);
          return bare === 0;
        }
      } catch {
        // No room, or storage is switched off: try with less.
      }
      if (bare < turns.length) bare += 1;
      else first += 1;
    }
    return false;
  }

  /** What was stored for this model, or an empty one. */
  static load(model) {
    const conversation = new Conversation(model);
    try {
      const stored = JSON.parse(localStorage.getItem(CONVERSATION) ?? "null");
      if (stored?.model === model) {
        conversation.turns = stored.turns.map((turn) => ({ ...turn, answers: turn.answers.map(Answer.from) }));
      }
    } catch {
      // Of another version, or damaged.
    }
    return conversation;
  }
}

export function loadSettings() {
  try {
    return { ...DEFAULTS, ...JSON.parse(localStorage.getItem(SETTINGS) ?? "{}") };
  } catch {
    return { ...DEFAULTS };
  }
}

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // They hold until the page is closed.
  }
}
