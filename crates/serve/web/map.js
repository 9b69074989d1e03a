// The map of layers and experts: a canvas, and over it one cell that takes the focus and moves with the arrow keys.

import { change, heat, ink, onTheme } from "./colours.js";
import { RULES } from "./steering.js";

const GUTTER = 30;
const TOP = 5;
const AXIS = 18;
const CELL = { narrowest: 4, widest: 34, lowest: 5, tallest: 26 };

const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

export class ExpertMap {
  /**
   * Fills `root`. `see(cell)` is told what is under the pointer or the focus, or null; `pick(cell)` what was clicked, or
   * entered by key; `act(key, cell)` of other keys. A cell is `{row, layer, expert}`.
   */
  constructor(root, label, { see = () => {}, pick = () => {}, act = () => false }) {
    [this.root, this.see, this.pick, this.act] = [root, see, pick, act];
    root.classList.add("map");
    this.inner = root.appendChild(document.createElement("div"));
    this.inner.className = "map-inner";
    this.canvas = this.inner.appendChild(document.createElement("canvas"));
    this.canvas.setAttribute("aria-hidden", "true");
    this.#overlay(label);
    this.at = { row: 0, expert: 0 };
    this.selected = null;
    this.painted = { values: null, kind: "heat", steering: null };
    this.frame = 0;
    this.#listen();
    new ResizeObserver(() => this.#measure()).observe(root);
    onTheme(() => this.redraw());
  }

  #overlay(label) {
    const part = (parent, role, name) => {
      const node = parent.appendChild(document.createElement("div"));
      node.setAttribute("role", role);
      node.className = name;
      return node;
    };
    this.grid = part(this.inner, "grid", "map-grid");
    this.grid.setAttribute("aria-label", label);
    this.line = part(this.grid, "row", "map-row");
    this.cursor = part(this.line, "gridcell", "map-cursor");
    this.cursor.tabIndex = 0;
  }

  #listen() {
    this.inner.addEventListener("pointermove", (event) => this.see(this.#under(event)));
    this.inner.addEventListener("pointerleave", () => this.see(this.#focused() ? this.cell(this.at.row, this.at.expert) : null));
    this.inner.addEventListener("click", (event) => {
      const cell = this.#under(event);
      if (!cell) return;
      this.move(cell.row, cell.expert);
      this.cursor.focus({ preventScroll: true });
      this.pick(cell);
    });
    this.cursor.addEventListener("focus", () => this.see(this.cell(this.at.row, this.at.expert)));
    this.cursor.addEventListener("blur", () => this.see(null));
    this.cursor.addEventListener("keydown", (event) => this.#key(event));
  }

  #focused() {
    return document.activeElement === this.cursor;
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.shape) return;
    const { row, expert } = this.at;
    const last = this.shape.counts[row] - 1;
    const steps = {
      ArrowLeft: [row, expert - 1],
      ArrowRight: [row, expert + 1],
      ArrowUp: [row - 1, expert],
      ArrowDown: [row + 1, expert],
      Home: [row, 0],
      End: [row, last],
      PageUp: [row - 8, expert],
      PageDown: [row + 8, expert],
    };
    const step = steps[event.key];
    if (step) {
      this.move(...step);
      this.cursor.scrollIntoView({ block: "nearest", inline: "nearest" });
      this.see(this.cell(this.at.row, this.at.expert));
    } else if (event.key === "Enter" || event.key === " ") {
      this.pick(this.cell(row, expert));
    } else if (!this.act(event.key, this.cell(row, expert))) {
      return;
    }
    event.preventDefault();
  }

  /** Puts the focus cell somewhere, as near as the map goes. */
  move(row, expert) {
    const at = clamp(row, 0, this.shape.rows - 1);
    this.at = { row: at, expert: clamp(expert, 0, this.shape.counts[at] - 1) };
    this.#place();
  }

  /** What the focus cell is called. */
  name(text) {
    this.cursor.setAttribute("aria-label", text);
  }

  cell(row, expert) {
    return this.shape?.has(row, expert) ? { row, expert, layer: this.shape.layers[row] } : null;
  }

  #under(event) {
    if (!this.size) return null;
    const box = this.inner.getBoundingClientRect();
    const expert = Math.floor((event.clientX - box.left - GUTTER) / this.size.width);
    return this.cell(Math.floor((event.clientY - box.top - TOP) / this.size.height), expert);
  }

  setShape(shape) {
    this.shape = shape;
    this.grid.setAttribute("aria-rowcount", shape.rows);
    this.grid.setAttribute("aria-colcount", shape.columns);
    this.at = { row: 0, expert: 0 };
    this.#measure();
  }

  #measure() {
    const { shape } = this;
    const room = this.root.clientWidth;
    if (!shape || shape.cells === 0 || room === 0) return;
    const width = clamp((room - GUTTER) / shape.columns, CELL.narrowest, CELL.widest);
    const tall = Math.max(170, innerHeight * 0.48) / shape.rows;
    this.size = { width, height: clamp(Math.min(width * 1.5, tall), CELL.lowest, CELL.tallest) };
    const [across, down] = [GUTTER + width * shape.columns, TOP + this.size.height * shape.rows + AXIS];
    const dots = devicePixelRatio || 1;
    this.canvas.width = Math.ceil(across * dots);
    this.canvas.height = Math.ceil(down * dots);
    this.canvas.style.width = this.inner.style.width = `${across}px`;
    this.canvas.style.height = this.inner.style.height = `${down}px`;
    this.dots = dots;
    this.#place();
    this.redraw();
  }

  #place() {
    if (!this.size) return;
    const { row, expert } = this.at;
    const { style } = this.cursor;
    [style.left, style.top] = [`${GUTTER + expert * this.size.width}px`, `${TOP + row * this.size.height}px`];
    [style.width, style.height] = [`${this.size.width}px`, `${this.size.height}px`];
    this.line.setAttribute("aria-rowindex", row + 1);
    this.cursor.setAttribute("aria-colindex", expert + 1);
  }

  /** Shows `values`, one per cell, 0 to 1 (heat) or -1 to 1 (change), with the marks of a steering. */
  paint(values, kind, steering) {
    this.painted = { values, kind, steering };
    this.redraw();
  }

  select(cell) {
    this.selected = cell;
    if (cell) this.move(cell.row, cell.expert);
    this.redraw();
  }

  redraw() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      if (this.size) this.#draw();
    });
  }

  #draw() {
    const { shape, size, painted } = this;
    const pen = this.canvas.getContext("2d");
    pen.setTransform(this.dots, 0, 0, this.dots, 0, 0);
    pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    const colour = painted.kind === "change" ? change : heat;
    const gap = size.width >= 14 ? 2 : size.width >= 7 ? 1 : 0.5;
    const round = size.width >= 14 ? 3 : 0;
    const below = Math.min(gap, size.height / 6);
    for (let row = 0; row < shape.rows; row++) {
      for (let expert = 0; expert < shape.counts[row]; expert++) {
        pen.fillStyle = colour(painted.values?.[row * shape.columns + expert] ?? 0);
        const [x, y] = [GUTTER + expert * size.width, TOP + row * size.height];
        if (round > 0) {
          pen.beginPath();
          pen.roundRect(x, y, size.width - gap, size.height - below, round);
          pen.fill();
        } else {
          pen.fillRect(x, y, size.width - gap, size.height - below);
        }
      }
    }
    this.#labels(pen);
    this.#marks(pen, gap, below);
  }

  #labels(pen) {
    const { shape, size } = this;
    pen.fillStyle = getComputedStyle(this.root).color;
    pen.font = "10.5px ui-sans-serif, system-ui, sans-serif";
    [pen.textAlign, pen.textBaseline] = ["right", "middle"];
    const every = Math.ceil(13 / size.height);
    shape.layers.forEach((layer, row) => {
      if (row % every === 0) pen.fillText(String(layer), GUTTER - 8, TOP + (row + 0.5) * size.height);
    });
    [pen.textAlign, pen.textBaseline] = ["center", "top"];
    const step = [1, 2, 4, 8, 16, 32, 64].find((n) => n * size.width >= 22) ?? 128;
    for (let expert = 0; expert < shape.columns; expert += step) {
      pen.fillText(String(expert), GUTTER + (expert + 0.5) * size.width, TOP + shape.rows * size.height + 5);
    }
  }

  #marks(pen, gap, below) {
    const { shape, size } = this;
    const box = (row, expert) => [GUTTER + expert * size.width, TOP + row * size.height, size.width - gap, size.height - below];
    [pen.strokeStyle, pen.fillStyle, pen.textAlign, pen.textBaseline] = [ink(), ink(), "center", "middle"];
    pen.font = `bold ${clamp(size.height * 0.75, 8, 15)}px ui-sans-serif, system-ui, sans-serif`;
    for (const [layer, expert, rule] of this.painted.steering?.list() ?? []) {
      const row = shape.rowOf.get(layer);
      if (!shape.has(row, expert)) continue;
      const [x, y, width, height] = box(row, expert);
      pen.lineWidth = 1.5;
      pen.strokeRect(x + 0.75, y + 0.75, width - 1.5, height - 1.5);
      const kind = Object.keys(RULES).find((name) => rule[name] !== undefined);
      const mark = rule.bias < 0 ? RULES.mute.mark : RULES[kind]?.mark ?? "\u2022";
      if (width >= 9 && height >= 9) {
        // A halo keeps the mark legible on every colour.
        pen.lineWidth = 3;
        pen.strokeStyle = getComputedStyle(this.root).backgroundColor;
        pen.strokeText(mark, x + width / 2, y + height / 2 + 0.5);
        pen.strokeStyle = ink();
        pen.fillText(mark, x + width / 2, y + height / 2 + 0.5);
      }
    }
    if (this.selected) {
      const [x, y, width, height] = box(this.selected.row, this.selected.expert);
      pen.lineWidth = 2;
      pen.strokeStyle = getComputedStyle(this.root).getPropertyValue("--accent");
      pen.strokeRect(x - 1, y - 1, width + 2, height + 2);
    }
  }
}
