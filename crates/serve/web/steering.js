// What a person changes about the choice of experts, in the JSON that the server and `--steer FILE` read.

/** Kinds of rules about one expert: what is shown, and what it does. */
export const RULES = {
  mask: { mark: "\u00d7", done: "masked", about: "never picked; the next best takes its place" },
  mute: { mark: "\u2212", done: "muted", about: "left out when picked; nothing takes its place" },
  force: { mark: "\u25cf", done: "forced", about: "always picked, in place of the lowest ranked" },
  bias: { mark: "+", done: "boosted", about: "ranked higher or lower by this much; its weight stays its own" },
};
const NUMBERS = ["top_k", "top_p", "ranks", "min_weight", "min_experts"];
const SETS = ["mask", "force", "mute"];
const MAPS = ["bias", "gain"];

/** Layers that a key of a steering file means: `3`, `0-11` or `*`. */
function layersOf(key, shape) {
  if (key === "*") return shape.layers;
  const found = /^(\d+)(?:-(\d+))?$/.exec(key);
  if (!found) throw new Error(`\u201c${key}\u201d is no layer: expected a number, a range such as 0-11, or *.`);
  const [first, last] = [Number(found[1]), Number(found[2] ?? found[1])];
  const layers = shape.layers.filter((layer) => layer >= first && layer <= last);
  if (layers.length !== last - first + 1) throw new Error(`Layer ${key} of the file has no experts in this model.`);
  return layers;
}

export class Steering {
  constructor(rules = {}, numbers = {}) {
    /** `layer:expert` to `{mask | mute | force: true, bias, gain}`. */
    this.rules = rules;
    this.numbers = numbers;
  }

  get isEmpty() {
    return Object.keys(this.rules).length === 0 && Object.keys(this.numbers).length === 0;
  }

  rule(layer, expert) {
    return this.rules[`${layer}:${expert}`];
  }

  /** Sets one rule and drops what contradicts it; `undefined` takes it back. */
  with(layer, expert, name, value) {
    const key = `${layer}:${expert}`;
    const { [key]: own = {}, ...others } = this.rules;
    const rule = name === "bias" ? { ...own, bias: value } : { [name]: value, ...(name === "force" ? {} : { gain: own.gain }) };
    if (name === "bias") for (const set of SETS) delete rule[set];
    for (const part of Object.keys(rule)) if (rule[part] === undefined || rule[part] === 0) delete rule[part];
    return new Steering(Object.keys(rule).length > 0 ? { ...others, [key]: rule } : others, this.numbers);
  }

  without(layer, expert) {
    const { [`${layer}:${expert}`]: _, ...others } = this.rules;
    return new Steering(others, this.numbers);
  }

  withNumber(name, value) {
    const { [name]: _, ...others } = this.numbers;
    return new Steering(this.rules, value === undefined ? others : { ...others, [name]: value });
  }

  /** Rules as `[layer, expert, rule]`, in order. */
  list() {
    const all = Object.entries(this.rules).map(([key, rule]) => [...key.split(":").map(Number), rule]);
    return all.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  }

  /** The JSON of requests and files. */
  json() {
    const json = { ...this.numbers };
    for (const [layer, expert, rule] of this.list()) {
      for (const name of SETS) if (rule[name]) ((json[name] ??= {})[layer] ??= []).push(expert);
      for (const name of MAPS) if (rule[name] !== undefined) ((json[name] ??= {})[layer] ??= {})[expert] = rule[name];
    }
    return json;
  }

  /** From a steering file, for a model of this shape. */
  static from(json, shape) {
    const numbers = {};
    let rules = {};
    const put = (key, expert, name, value) => {
      for (const layer of layersOf(key, shape)) {
        if (!shape.has(shape.rowOf.get(layer), expert)) {
          throw new Error(`Expert ${expert} of layer ${layer} in the file is not in this model, whose layer has ${shape.counts[shape.rowOf.get(layer)]}.`);
        }
        rules = { ...rules, [`${layer}:${expert}`]: { ...rules[`${layer}:${expert}`], [name]: value } };
      }
    };
    for (const [name, value] of Object.entries(json)) {
      if (NUMBERS.includes(name)) numbers[name] = value;
      else if (SETS.includes(name)) for (const [key, experts] of Object.entries(value)) for (const expert of experts) put(key, expert, name, true);
      else if (MAPS.includes(name)) for (const [key, map] of Object.entries(value)) for (const [expert, number] of Object.entries(map)) put(key, Number(expert), name, number);
      else throw new Error(`\u201c${name}\u201d is nothing that steering knows.`);
    }
    return new Steering(rules, numbers);
  }

  /** In a few words. */
  describe(most = 3) {
    const parts = Object.entries(this.numbers).map(([name, value]) => `${name.replaceAll("_", "-")} ${value}`);
    parts.push(...this.list().map(([layer, expert, rule]) => `L${layer} E${expert} ${said(rule)}`));
    if (parts.length === 0) return "the model\u2019s own routing";
    const more = parts.length - most;
    return more > 0 ? `${parts.slice(0, most).join(", ")} and ${more} more` : parts.join(", ");
  }
}

/** What a rule does, in a word or two. */
export function said(rule) {
  const parts = SETS.filter((name) => rule[name]).map((name) => RULES[name].done);
  if (rule.bias !== undefined) parts.push(`${rule.bias > 0 ? "+" : "\u2212"}${Math.abs(rule.bias)}`);
  if (rule.gain !== undefined) parts.push(`\u00d7${rule.gain}`);
  return parts.join(" ");
}
