// The conversation as it is seen: what was asked, answers side by side, and their tokens, which can be pointed at.

import { parse } from "./markdown.js";
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

  /** Draws everything anew. What is said in conversations is Markdown, texts that go on are not. */
  show(turns, isText, isBusy) {
    this.bodies.clear();
    this.isText = isText;
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
    const body = node("div", "body");
    body.tabIndex = 0;
    body.setAttribute("aria-label", "Answer; arrow keys go from token to token");
    this.bodies.set(answer, { body, at: -1, apart: apart(turn, at), starts: [], end: 0, blocks: [] });
    this.#write(answer);
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

  /** Draws the pieces that are not drawn yet. */
  #write(answer) {
    const entry = this.bodies.get(answer);
    const { body, starts, blocks } = entry;
    const first = starts.length;
    for (const { text } of answer.pieces.slice(first)) {
      starts.push(entry.end);
      entry.end += text.length;
    }
    if (this.isText) {
      for (let piece = first; piece < starts.length; piece++) body.append(span(entry, piece, answer.pieces[piece].text));
      return;
    }
    // More text may change the last block, and what the one before it is: those are drawn anew.
    const from = blocks.at(-2)?.from ?? blocks.at(-1)?.from ?? 0;
    for (const block of blocks.splice(-2)) block.made.remove();
    for (const block of parse(answer.text, from)) {
      const made = built(entry, block);
      blocks.push({ from: block.from, made });
      body.append(made);
    }
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
    const spans = ({ body, at }) => body.querySelectorAll(`.token[data-at="${at}"]`);
    for (const [other, entry] of this.bodies) {
      for (const span of spans(entry)) span.classList.remove("marked");
      entry.at = other === answer && entry.at !== piece ? piece : -1;
      for (const span of spans(entry)) span.classList.add("marked");
    }
    this.on.point(answer, this.bodies.get(answer)?.at ?? -1);
  }

  /** Pieces of an answer have come. */
  append(answer) {
    const entry = this.bodies.get(answer);
    if (!entry) return;
    if (this.isText) {
      this.#write(answer);
    } else if (!entry.isDue) {
      // Drawing a long block anew takes time: once per frame.
      entry.isDue = true;
      requestAnimationFrame(() => {
        entry.isDue = false;
        if (this.bodies.get(answer) !== entry) return;
        this.#write(answer);
        this.follow(false);
      });
    }
    const writing = entry.body.nextElementSibling?.querySelector(".writing");
    if (writing && writing.textContent !== "writing") writing.textContent = "writing";
    this.follow(false);
  }

  /** Tints tokens by a value from 0 to 1, `of(answer, piece)`. */
  tint(of) {
    for (const [answer, { body }] of this.bodies) {
      for (const span of body.querySelectorAll(".token")) {
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

/** A token, or the part of it that stands in one place. */
function span(entry, piece, text) {
  const made = node("span", piece >= entry.apart ? "token apart" : "token", text);
  made.dataset.at = piece;
  made.classList.toggle("marked", piece === entry.at);
  return made;
}

/** The elements of a block of Markdown, with tokens in them. */
function built(entry, { tag, children, href, start, language }) {
  const made = document.createElement(tag);
  if (href) Object.assign(made, { href, target: "_blank", rel: "noopener noreferrer" });
  if (start > 1) made.start = start;
  if (language) made.dataset.language = language;
  for (const child of children) made.append(...(child.leaf ? tokens(entry, child.leaf) : [built(entry, child)]));
  return made;
}

/** The tokens of a text that lies in an answer. */
function tokens({ starts, ...entry }, { text, at }) {
  const made = [];
  for (let from = 0; from < text.length; ) {
    const piece = starts.findLastIndex((start) => start <= at[from]);
    const end = starts[piece + 1] ?? Infinity;
    let to = from + 1;
    while (to < text.length && at[to] < end) to += 1;
    made.push(span(entry, piece, text.slice(from, to)));
    from = to;
  }
  return made;
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
