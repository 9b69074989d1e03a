// Which experts the tokens of one answer were sent to, packed, and sums over them.

const NOBODY = 0xffff;

/** The shape of a model's experts, as the server tells it. */
export class Shape {
  /** `layers` are the numbers of the layers that have experts, `counts` the experts of each. */
  constructor(layers, counts, topK) {
    this.layers = layers;
    this.counts = counts;
    this.topK = topK;
    this.columns = Math.max(0, ...counts);
    this.rowOf = new Map(layers.map((layer, row) => [layer, row]));
  }

  get rows() {
    return this.layers.length;
  }

  get cells() {
    return this.rows * this.columns;
  }

  has(row, expert) {
    return row >= 0 && row < this.rows && expert >= 0 && expert < this.counts[row];
  }
}

/** Picks of tokens, in the order in which they were read. */
export class Routing {
  constructor(rows, width) {
    this.rows = rows;
    this.width = Math.max(1, width);
    this.n = 0;
    this.indices = [];
    this.experts = new Uint16Array(0);
    this.weights = new Float32Array(0);
  }

  get stride() {
    return this.rows * this.width;
  }

  /** Adds a token; `index` counts from the first token of the answer, those of the prompt are negative. */
  add(index, experts, weights) {
    const most = Math.max(1, ...experts.map((picks) => picks.length));
    if (most > this.width) this.#widen(most);
    this.#reserve(this.n + 1);
    const start = this.n * this.stride;
    this.experts.fill(NOBODY, start, start + this.stride);
    for (let row = 0; row < this.rows && row < experts.length; row++) {
      experts[row].forEach((expert, pick) => {
        this.experts[start + row * this.width + pick] = expert;
        this.weights[start + row * this.width + pick] = weights[row][pick];
      });
    }
    this.indices.push(index);
    this.n += 1;
  }

  #reserve(tokens) {
    if (tokens * this.stride <= this.experts.length) return;
    const size = Math.max(64, 2 * tokens) * this.stride;
    const [experts, weights] = [new Uint16Array(size), new Float32Array(size)];
    experts.set(this.experts);
    weights.set(this.weights);
    [this.experts, this.weights] = [experts, weights];
  }

  #widen(width) {
    const wider = new Routing(this.rows, width);
    this.each(0, this.n, (token, row, expert, weight, pick) => {
      wider.#reserve(this.n);
      const start = token * wider.stride + row * width;
      if (pick === 0) wider.experts.fill(NOBODY, start, start + width);
      wider.experts[start + pick] = expert;
      wider.weights[start + pick] = weight;
    });
    [this.width, this.experts, this.weights] = [width, wider.experts, wider.weights];
  }

  /** Calls `see(token, row, expert, weight, pick)` for every pick of tokens `from..to`. */
  each(from, to, see) {
    for (let token = Math.max(0, from); token < Math.min(to, this.n); token++) {
      for (let row = 0; row < this.rows; row++) {
        const start = token * this.stride + row * this.width;
        for (let pick = 0; pick < this.width; pick++) {
          const expert = this.experts[start + pick];
          if (expert !== NOBODY) see(token, row, expert, this.weights[start + pick], pick);
        }
      }
    }
  }

  /** The token with this index in the answer, or -1. */
  find(index) {
    // Without gaps it is where counting leads.
    const at = index - (this.indices[0] ?? 0);
    return this.indices[at] === index ? at : this.indices.indexOf(index);
  }

  /** Where the tokens of the answer begin, behind those of the prompt. */
  get start() {
    const at = this.indices.findIndex((index) => index >= 0);
    return at < 0 ? this.n : at;
  }

  /** Mean weight of every cell of `shape` over tokens `from..to`. */
  mean(shape, from, to) {
    const sums = new Float32Array(shape.cells);
    this.each(from, to, (_, row, expert, weight) => {
      if (shape.has(row, expert)) sums[row * shape.columns + expert] += weight;
    });
    const n = Math.max(1, Math.min(to, this.n) - Math.max(0, from));
    return sums.map((sum) => sum / n);
  }

  /** The last tokens, the newest counting most. */
  trail(shape, decay = 0.8) {
    const sums = new Float32Array(shape.cells);
    let total = 0;
    for (let age = 0; age < Math.min(24, this.n); age++) {
      const part = decay ** age;
      total += part;
      this.each(this.n - 1 - age, this.n - age, (_, row, expert, weight) => {
        if (shape.has(row, expert)) sums[row * shape.columns + expert] += part * weight;
      });
    }
    return total > 0 ? sums.map((sum) => sum / total) : sums;
  }

  /** Tokens of the answer that picked an expert, and their mean weight for it. */
  of(row, expert) {
    let [picked, weight] = [0, 0];
    this.each(this.start, this.n, (_, at, found, value) => {
      if (at === row && found === expert) [picked, weight] = [picked + 1, weight + value];
    });
    const tokens = this.n - this.start;
    return { tokens, picked, weight: picked > 0 ? weight / picked : 0 };
  }

  /** How many different experts the answer used. */
  used(shape) {
    const seen = new Uint8Array(shape.cells);
    this.each(this.start, this.n, (_, row, expert) => {
      if (shape.has(row, expert)) seen[row * shape.columns + expert] = 1;
    });
    return seen.reduce((sum, one) => sum + one, 0);
  }

  /** For storage: weights as bytes, which is what a colour can show. */
  pack() {
    const size = this.n * this.stride;
    const bytes = new Uint8Array(3 * size);
    const largest = Math.max(1e-9, this.weights.subarray(0, size).reduce((a, b) => Math.max(a, b), 0));
    for (let i = 0; i < size; i++) {
      bytes[3 * i] = this.experts[i] & 255;
      bytes[3 * i + 1] = this.experts[i] >> 8;
      bytes[3 * i + 2] = Math.round((255 * Math.max(0, this.weights[i])) / largest);
    }
    let text = "";
    for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
    const { rows, width, indices } = this;
    return { rows, width, largest, indices, picks: btoa(text) };
  }

  /** What `pack` made; null where it cannot be read. */
  static unpack(stored) {
    try {
      const routing = new Routing(stored.rows, stored.width);
      const bytes = Uint8Array.from(atob(stored.picks), (letter) => letter.charCodeAt(0));
      if (bytes.length !== 3 * stored.indices.length * routing.stride) return null;
      routing.n = stored.indices.length;
      routing.indices = stored.indices;
      routing.experts = Uint16Array.from({ length: bytes.length / 3 }, (_, i) => bytes[3 * i] | (bytes[3 * i + 1] << 8));
      routing.weights = Float32Array.from({ length: bytes.length / 3 }, (_, i) => (bytes[3 * i + 2] / 255) * stored.largest);
      return routing;
    } catch {
      return null;
    }
  }
}
