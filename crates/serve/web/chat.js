// The conversation as it is seen: what was asked, answers side by side, and their tokens, which can be pointed at.

import { said } from "./steering.js";

function node(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(text, act, label) {
  const made = node("button", "quiet small", text);
  made.type = "button";
  if (label) made.setAttribute("aria-label", label);
  made.addEventListener("click", act);
  return made;
}

const FINISH = {
  length: "at its length",
  stopped: "stopped",
};

export class Talk {
  /** `on` is told: `point(answer, piece)` what token is looked at (-1: none), `focus(turn, answer)`, `choose(turn, at)`, `another(turn)`. */
  constructor(root, scroller, on) {
    [this.root, this.scroller, this.on] = [root, scroller, on];
    this.bodies = new Map();
  }

  /** Draws everything anew. */
  show(turns, isText, isBusy) {
    this.bodies.clear();
    this.root.classList.toggle("is-text", isText);
    this.root.replaceChildren(...turns.map((turn, at) => this.#turn(turn, isBusy, at === turns.length - 1)));
    if (turns.length === 0) this.root.append(this.#empty(isText));
    this.follow(true);
  }

  #empty(isText) {
    const empty = node("div", "empty");
    empty.append(
      node("h2", "", isText ? "Begin a text" : "Ask something"),
      node("p", "soft", isText ? "This model continues what you write; it was not trained for conversations." : "The answer appears here, and beside it the experts that write it."),
    );
    return empty;
  }

  #turn(turn, isBusy, isLast) {
    const article = node("article", "turn");
    if (turn.text !== "") article.append(node("p", "asked", turn.text));
    const answers = node("div", turn.answers.length > 1 ? "answers many" : "answers");
    turn.answers.forEach((answer, at) => answers.append(this.#answer(turn, answer, at, isBusy, isLast)));
    article.append(answers);
    return article;
  }

  #answer(turn, answer, at, isBusy, isLast) {
    const section = node("section", "answer");
    section.setAttribute("aria-label", `Answer ${at + 1}`);
    section.addEventListener("focusin", () => this.on.focus(turn, answer));
    section.addEventListener("pointerdown", () => this.on.focus(turn, answer));
    if (turn.answers.length > 1 || !answer.steering.isEmpty) section.append(this.#head(turn, answer, at, isBusy));
    const body = node("p", "body");
    body.tabIndex = 0;
    body.setAttribute("aria-label", "Answer; arrow keys go from token to token");
    this.bodies.set(answer, { body, at: -1, apart: apart(turn, at) });
    answer.pieces.forEach((_, piece) => this.#span(answer, piece));
    this.#listen(body, answer);
    section.append(body, this.#foot(turn, answer, isBusy, isLast));
    return section;
  }

  #head(turn, answer, at, isBusy) {
    const head = node("div", "answer-head");
    head.append(node("span", "steered", answer.steering.isEmpty ? "Own routing" : answer.steering.describe()));
    if (turn.answers.length > 1) {
      const choose = button(turn.chosen === at ? "Goes on" : "Go on with this", () => this.on.choose(turn, at));
      choose.setAttribute("aria-pressed", String(turn.chosen === at));
      choose.disabled = isBusy;
      head.append(choose);
    }
    return head;
  }

  #foot(turn, answer, isBusy, isLast) {
    const foot = node("div", "foot");
    if (answer.error) {
      const problem = node("p", "problem", answer.error);
      problem.setAttribute("role", "alert");
      foot.append(problem);
    }
    if (answer.finish === null) {
      foot.append(node("span", "writing", answer.pieces.length === 0 ? "reading" : "writing"));
      return foot;
    }
    if (FINISH[answer.finish]) foot.append(node("span", "soft small", FINISH[answer.finish]));
    if (answer.text !== "") foot.append(button("Copy", () => navigator.clipboard?.writeText(answer.text), "Copy this answer"));
    if (isLast && !isBusy && answer === turn.answers.at(-1)) {
      foot.append(button(answer.error ? "Try again" : "Another", () => this.on.another(turn), answer.error ? undefined : "Another answer, drawn anew"));
    }
    return foot;
  }

  #span(answer, piece) {
    const { body, apart } = this.bodies.get(answer);
    const span = node("span", piece >= apart ? "token apart" : "token", answer.pieces[piece].text);
    span.dataset.at = piece;
    body.append(span);
  }

  #listen(body, answer) {
    const under = (event) => {
      const at = event.target.dataset?.at;
      return at === undefined ? -1 : Number(at);
    };
    body.addEventListener("pointerover", (event) => event.pointerType === "mouse" && this.on.point(answer, under(event)));
    body.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.on.point(answer, this.bodies.get(answer).at));
    body.addEventListener("click", (event) => this.mark(answer, under(event)));
    body.addEventListener("keydown", (event) => {
      const { at } = this.bodies.get(answer);
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") this.mark(answer, -1);
      else if (step) this.mark(answer, Math.max(0, Math.min(answer.pieces.length - 1, at + step)));
      else return;
      event.preventDefault();
    });
  }

  /** Marks a token as the one that is looked at; again, or -1, takes the mark back. */
  mark(answer, piece) {
    for (const [other, entry] of this.bodies) {
      entry.body.children[entry.at]?.classList.remove("marked");
      entry.at = other === answer && entry.at !== piece ? piece : -1;
      entry.body.children[entry.at]?.classList.add("marked");
    }
    this.on.point(answer, this.bodies.get(answer)?.at ?? -1);
  }

  /** The newest piece of an answer has come. */
  append(answer) {
    const entry = this.bodies.get(answer);
    if (!entry) return;
    this.#span(answer, answer.pieces.length - 1);
    const writing = entry.body.nextElementSibling?.querySelector(".writing");
    if (writing && writing.textContent !== "writing") writing.textContent = "writing";
    this.follow(false);
  }

  /** Tints tokens by a value from 0 to 1, `of(answer, piece)`. */
  tint(of) {
    for (const [answer, { body }] of this.bodies) {
      for (const span of body.children) {
        const value = of(answer, Number(span.dataset.at));
        if (value > 0) span.style.setProperty("--tint", `${Math.round(12 + 58 * value)}%`);
        else span.style.removeProperty("--tint");
        span.classList.toggle("tinted", value > 0);
      }
    }
  }

  /** Keeps the end in sight, if it was. */
  follow(always) {
    const { scroller } = this;
    const left = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
    if (always || left < 160) scroller.scrollTop = scroller.scrollHeight;
  }
}

/** The piece from which an answer says something else than the first one. */
function apart(turn, at) {
  if (at === 0) return Infinity;
  const [first, own] = [turn.answers[0].text, turn.answers[at]];
  let length = 0;
  for (let piece = 0; piece < own.pieces.length; piece++) {
    const { text } = own.pieces[piece];
    if (!first.startsWith(text, length)) return piece;
    length += text.length;
  }
  return Infinity;
}

/** Chips of a steering's rules, each with a way to take it back. */
export function chips(list, steering, take) {
  const all = steering.list();
  const shown = all.slice(0, 40).map(([layer, expert, rule]) => {
    const item = node("li", "chip", `L${layer} E${expert} ${said(rule)} `);
    const remove = button("\u00d7", () => take(layer, expert), `Take back: layer ${layer}, expert ${expert}`);
    item.append(remove);
    return item;
  });
  if (all.length > shown.length) shown.push(node("li", "soft", `and ${all.length - shown.length} more`));
  list.replaceChildren(...shown);
}
