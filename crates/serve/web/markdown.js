// Markdown, as models write it, as a tree of what it says. HTML is text here like any other, and so is every tag name that is not below.

/** How deep quotes, lists and emphasis go; what is deeper stays as it is written. */
const DEEPEST = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(\s+|$)/;
const BAR = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
/** Where links may lead. */
const SCHEMES = ["http:", "https:", "mailto:"];

/** A piece of the answer's text; for every letter, where in the answer it is. */
class Text {
  constructor(text, at, start) {
    [this.text, this.at, this.start] = [text, at, start];
  }

  slice(from, to = this.text.length) {
    return new Text(this.text.slice(from, to), this.at.slice(from, to), this.at[from] ?? this.start);
  }

  /** Without white space at its ends. */
  trim() {
    const from = this.text.length - this.text.trimStart().length;
    return this.slice(from, Math.max(from, this.text.trimEnd().length));
  }

  /** Lines as one text. */
  static join(lines) {
    const at = [];
    lines.forEach((line, i) => {
      if (i > 0) at.push(line.start - 1);
      at.push(...line.at);
    });
    return new Text(lines.map((line) => line.text).join("\n"), at, lines[0]?.start ?? 0);
  }
}

const isBlank = (line) => line.text.trim() === "";
const element = (tag, children, more) => ({ tag, children, ...more });
const leaf = (text) => ({ leaf: text });

/**
 * The blocks of `text` from letter `from` on, which begins one. Each has a `tag` and `children`, or is a `leaf`, a Text; those at the top say
 * where they are, `from`.
 */
export function parse(text, from = 0) {
  let start = from;
  const lines = text.slice(from).split("\n").map((line) => {
    const first = start;
    start += line.length + 1;
    return new Text(line, Array.from({ length: line.length }, (_, i) => first + i), first);
  });
  return blocks(lines, 0);
}

function blocks(lines, depth) {
  const found = [];
  for (let i = 0; i < lines.length; ) {
    if (isBlank(lines[i])) {
      i += 1;
      continue;
    }
    const [node, next] = block(lines, i, depth);
    found.push({ ...node, from: lines[i].start });
    i = next;
  }
  return found;
}

/** The block that begins at line `i`, and the line after it. */
function block(lines, i, depth) {
  const { text } = lines[i];
  const fence = FENCE.exec(text);
  if (fence) return fenced(lines, i, fence);
  const heading = HEADING.exec(text);
  if (heading) {
    // The page has the largest two of its own.
    const tag = `h${Math.min(6, heading[1].length + 2)}`;
    const from = text.length - heading[2].length;
    const to = from + heading[2].replace(/\s+#+\s*$/, "").trimEnd().length;
    return [element(tag, inline(lines[i].slice(from, to), depth)), i + 1];
  }
  if (RULE.test(text)) return [element("hr", []), i + 1];
  if (depth < DEEPEST && QUOTE.test(text)) return quote(lines, i, depth);
  if (depth < DEEPEST && ITEM.test(text)) return list(lines, i, depth);
  if (isTable(lines, i)) return table(lines, i, depth);
  let to = i + 1;
  while (to < lines.length && !isBlank(lines[to]) && !interrupts(lines, to)) to += 1;
  return [element("p", inline(Text.join(lines.slice(i, to)).trim(), depth)), to];
}

/** Whether a line ends the paragraph before it. */
function interrupts(lines, i) {
  const { text } = lines[i];
  const item = ITEM.exec(text);
  const begins = item && item[3] !== "" && (Number.isNaN(Number.parseInt(item[2], 10)) || Number.parseInt(item[2], 10) === 1);
  return FENCE.test(text) || HEADING.test(text) || RULE.test(text) || QUOTE.test(text) || begins || isTable(lines, i);
}

function fenced(lines, i, [, marker, about]) {
  const end = new RegExp(`^ {0,3}${marker[0]}{${marker.length},}\\s*$`);
  let to = i + 1;
  while (to < lines.length && !end.test(lines[to].text)) to += 1;
  const code = element("code", [leaf(Text.join(lines.slice(i + 1, to)))]);
  return [element("pre", [code], { language: about.trim().split(/\s+/)[0] }), to + 1];
}

function quote(lines, i, depth) {
  const inner = [];
  let to = i;
  for (; to < lines.length && QUOTE.test(lines[to].text); to++) inner.push(lines[to].slice(QUOTE.exec(lines[to].text)[0].length));
  return [element("blockquote", blocks(inner, depth + 1)), to];
}

const isOrdered = (item) => /\d/.test(item[2]);
/** Two items are of one list when they are marked alike. */
const kind = (item) => (isOrdered(item) ? item[2].at(-1) : item[2]);

function list(lines, i, depth) {
  const first = ITEM.exec(lines[i].text);
  const items = [];
  let at = i;
  while (at < lines.length) {
    const item = ITEM.exec(lines[at].text);
    if (!item || kind(item) !== kind(first) || item[1].length > first[1].length + 3 || (items.length > 0 && RULE.test(lines[at].text))) break;
    const [inner, next] = itemLines(lines, at, item);
    items.push(element("li", blocks(inner, depth + 1)));
    at = next;
  }
  return [element(isOrdered(first) ? "ol" : "ul", items, isOrdered(first) ? { start: Number.parseInt(first[2], 10) } : {}), at];
}

/** The lines of an item, without its mark and indentation, and the line after it. */
function itemLines(lines, at, item) {
  const indent = item[1].length;
  const inner = [lines[at].slice(item[0].length)];
  let to = at + 1;
  for (; to < lines.length; to++) {
    const line = lines[to];
    if (isBlank(line)) {
      const after = lines.slice(to).findIndex((one) => !isBlank(one));
      if (after < 0) return [inner, lines.length];
      const { text } = lines[to + after];
      const isInner = text.length - text.trimStart().length >= indent + 2;
      if (!isInner) return [inner, sameList(text, item) ? to + after : to];
      inner.push(line);
      continue;
    }
    const deep = line.text.length - line.text.trimStart().length;
    if (deep >= indent + 2) inner.push(line.slice(Math.min(deep, item[0].length)));
    else if (isBlank(lines[to - 1]) || ITEM.test(line.text) || interrupts(lines, to)) break;
    else inner.push(line.slice(deep));
  }
  return [inner, to];
}

function sameList(text, item) {
  const other = ITEM.exec(text);
  return other !== null && kind(other) === kind(item);
}

const isTable = (lines, i) => lines[i].text.includes("|") && i + 1 < lines.length && lines[i + 1].text.includes("|") && BAR.test(lines[i + 1].text);

function table(lines, i, depth) {
  const row = (line, tag) => element("tr", cells(line).map((cell) => element(tag, inline(cell, depth))));
  const rows = [];
  let to = i + 2;
  for (; to < lines.length && lines[to].text.includes("|"); to++) rows.push(row(lines[to], "td"));
  return [element("table", [element("thead", [row(lines[i], "th")]), element("tbody", rows)]), to];
}

function cells(line) {
  const found = [];
  let from = /^\s*\|/.exec(line.text)?.[0].length ?? 0;
  for (let i = from; i <= line.text.length; i++) {
    const isEnd = i === line.text.length;
    if (!isEnd && (line.text[i] !== "|" || line.text[i - 1] === "\\")) continue;
    if (!isEnd || line.text.slice(from).trim() !== "") found.push(line.slice(from, i).trim());
    from = i + 1;
  }
  return found;
}

const MARKS = [["***", "strong", "em"], ["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];

/** Text with code, emphasis and links. */
function inline(text, depth) {
  const found = [];
  // Marks that nothing closes from here on.
  const open = new Set();
  let from = 0;
  const close = (to) => to > from && found.push(leaf(text.slice(from, to)));
  for (let i = 0; i < text.text.length; ) {
    const special = depth < DEEPEST ? span(text, i, depth, open) : null;
    if (!special) {
      i += 1;
      continue;
    }
    close(i);
    found.push(...special.nodes);
    i = from = special.to;
  }
  close(text.text.length);
  return found;
}

/** What begins at letter `i`, if it is more than a letter: its nodes, and the letter after it. */
function span(text, i, depth, open) {
  const all = text.text;
  const letter = all[i];
  if (letter === "\\" && /[!-/:-@[-`{-~]/.test(all[i + 1] ?? "")) return { nodes: [leaf(text.slice(i + 1, i + 2))], to: i + 2 };
  if (letter === "`") return code(text, i, open);
  if (letter === "[") return link(text, i, depth, open);
  for (const [mark, ...tags] of MARKS) {
    if (!all.startsWith(mark, i)) continue;
    const end = open.has(mark) ? -1 : closing(all, i, mark);
    if (end < 0) {
      if (opens(all, i, mark)) open.add(mark);
      continue;
    }
    const inner = inline(text.slice(i + mark.length, end), depth + 1);
    return { nodes: tags.reduceRight((nodes, tag) => [element(tag, nodes)], inner), to: end + mark.length };
  }
  return null;
}

const isWord = (letter) => letter !== undefined && /[\p{L}\p{N}_]/u.test(letter);

function opens(all, i, mark) {
  const next = all[i + mark.length];
  return next !== undefined && next.trim() !== "" && next !== mark[0] && !(mark[0] === "_" && isWord(all[i - 1]));
}

/** Where `mark`, which stands at `i`, is closed; -1 where it is not. */
function closing(all, i, mark) {
  if (!opens(all, i, mark)) return -1;
  for (let j = all.indexOf(mark, i + mark.length + 1); j >= 0; j = all.indexOf(mark, j + 1)) {
    const isAlone = all[j - 1] !== mark[0] && all[j + mark.length] !== mark[0];
    const isNested = mark.length > 1 && all[j - 1] !== mark[0];
    const isInWord = mark[0] === "_" && isWord(all[j + mark.length]);
    if ((isAlone || isNested) && !isInWord && all[j - 1].trim() !== "" && all[j - 1] !== "\\") return j;
  }
  return -1;
}

function code(text, i, open) {
  const all = text.text;
  const [ticks] = /^`+/.exec(all.slice(i));
  const past = i + ticks.length;
  for (let j = open.has(ticks) ? -1 : all.indexOf(ticks, past); j >= 0; j = all.indexOf(ticks, j)) {
    const length = /^`+/.exec(all.slice(j))[0].length;
    if (length === ticks.length) {
      const inner = text.slice(past, j);
      const isPadded = /^ .*[^ ].* $/s.test(inner.text);
      return { nodes: [element("code", [leaf(isPadded ? inner.slice(1, -1) : inner)])], to: j + length };
    }
    j += length;
  }
  open.add(ticks);
  return { nodes: [leaf(text.slice(i, past))], to: past };
}

function link(text, i, depth, open) {
  if (open.has("]")) return null;
  const found = /^\[([^\]\n]*)\]\(([^\s()]*(?:\([^\s()]*\)[^\s()]*)*)\)/.exec(text.text.slice(i, i + 4096));
  if (!found) {
    if (!text.text.includes("](", i)) open.add("]");
    return null;
  }
  const href = target(found[2]);
  if (!href) return null;
  const inner = text.slice(i + 1, i + 1 + found[1].length);
  return { nodes: [element("a", inline(inner, DEEPEST - 1 > depth ? depth + 1 : DEEPEST), { href })], to: i + found[0].length };
}

function target(address) {
  try {
    const url = new URL(address);
    return SCHEMES.includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}
