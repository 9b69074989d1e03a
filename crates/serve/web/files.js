// Files of Cadre that can be looked at: statistics of a trace, profiles, plans and steerings.

import { Shape } from "./routing.js";

const percent = (value) => `${(100 * value).toLocaleString("en", { maximumSignificantDigits: 3 })} %`;
const decimal = (value) => (value === null || value === undefined ? "" : value.toLocaleString("en", { maximumFractionDigits: 2 }));
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

/** Values of every cell, `of(row, expert)`, brought between 0 and 1 by the largest. */
function cells(shape, of) {
  const values = new Float32Array(shape.cells);
  for (let row = 0; row < shape.rows; row++) {
    for (let expert = 0; expert < shape.counts[row]; expert++) values[row * shape.columns + expert] = of(row, expert);
  }
  return values;
}

/** What `cadre trace show -o json` writes. */
function trace(json) {
  const shape = new Shape(json.layers.map((layer) => layer.layer), json.layers.map((layer) => layer.load.length));
  const view = (name, value, tell) => ({ name, kind: "heat", values: cells(shape, value), tell });
  const share = (row, expert) => json.layers[row].share[expert];
  const weight = (row, expert) => json.layers[row].mean_weight[expert];
  return {
    title: `Trace of ${json.meta?.architecture ?? "a model"}`,
    facts: `${plural(json.n_tokens, "token")}, ${plural(json.n_sequences, "sequence")}, ${json.domains.map((domain) => domain.name).join(", ")}`,
    shape,
    views: [
      view("Share of picks", share, (row, expert) => `${percent(share(row, expert))} of the layer\u2019s picks, ${json.layers[row].load[expert].toLocaleString("en")} in all`),
      view("Mean weight", weight, (row, expert) => `weight ${decimal(weight(row, expert))} where it is picked`),
    ],
    head: ["Layer", "CV", "MaxVio", "Entropy", "Reuse", "Dead", "Hot"],
    rows: json.layers.map((layer) => [layer.layer, decimal(layer.cv), decimal(layer.max_vio), decimal(layer.load_entropy), layer.reuse === null ? "" : percent(layer.reuse), layer.dead.length, layer.hot.length]),
    notes: [...(json.notes ?? []), ...(json.top_experts ?? []).map((top) => `${top.domain}: ${top.experts.slice(0, 6).map((one) => `L${one.layer} E${one.expert}`).join(", ")} stand out.`)],
  };
}

/** What `cadre trace show --profile` writes. */
function profile(json) {
  const shape = new Shape(json.layers.map((layer) => layer.layer), json.layers.map((layer) => layer.shares[0]?.length ?? json.n_experts));
  return {
    title: "Profile",
    facts: `what the experts are for: ${json.domains.join(", ")}`,
    shape,
    views: json.domains.map((name, domain) => {
      const share = (row, expert) => json.layers[row].shares[domain][expert];
      return { name, kind: "heat", values: cells(shape, share), tell: (row, expert) => `${percent(share(row, expert))} of the layer\u2019s picks in ${name}` };
    }),
    notes: [],
  };
}

/** What `cadre plan` writes. */
function plan(json) {
  const shape = new Shape(json.layers.map((layer) => layer.layer), json.layers.map((layer) => layer.of));
  const part = json.layers.map(() => new Map());
  json.layers.forEach((layer, row) => layer.experts.forEach((expert, at) => expert.from.forEach((from) => part[row].set(from, { at, from: expert.from }))));
  const value = (row, expert) => {
    const found = part[row].get(expert);
    return found ? (found.from.length > 1 ? 0.4 : 0.9) : 0;
  };
  const tell = (row, expert) => {
    const found = part[row].get(expert);
    if (!found) return "dropped";
    const others = found.from.filter((other) => other !== expert);
    return others.length === 0 ? `kept, as expert ${found.at}` : `merged with ${others.join(", ")} into expert ${found.at}`;
  };
  const dropped = json.layers.map((layer, row) => Array.from({ length: layer.of }, (_, expert) => expert).filter((expert) => !part[row].has(expert)));
  const [kept, all] = [json.layers.reduce((sum, layer) => sum + layer.experts.length, 0), json.layers.reduce((sum, layer) => sum + layer.of, 0)];
  return {
    title: `Plan by ${json.method}`,
    facts: `${plural(kept, "expert")} of ${all.toLocaleString("en")} for ${json.model.architecture}`,
    shape,
    views: [{ name: "Kept, merged, dropped", kind: "heat", fixed: true, values: cells(shape, value), tell }],
    head: ["Layer", "Of", "Left", "Merged", "Dropped"],
    rows: json.layers.map((layer, row) => [layer.layer, layer.of, layer.experts.length, layer.experts.filter((expert) => expert.from.length > 1).length, dropped[row].length]),
    notes: Object.entries(json.options ?? {}).map(([name, chosen]) => `${name}: ${chosen}`),
    mask: Object.fromEntries(json.layers.map((layer, row) => [layer.layer, dropped[row]]).filter(([, experts]) => experts.length > 0)),
  };
}

/** Reads a file: `{document}` to look at, or `{steering}` as JSON. Throws an Error with a sentence. */
export function read(name, text) {
  if (text.startsWith("PAR1")) {
    throw new Error(`${name} is a Parquet file, which browsers do not read. Open what \u201ccadre trace show ${name} -o json\u201d writes.`);
  }
  let json;
  try {
    json = JSON.parse(text);
  } catch (error) {
    throw new Error(`${name} is not JSON: ${error.message}.`);
  }
  try {
    if (Array.isArray(json?.layers)) {
      if (json.layers[0]?.load) return { document: trace(json) };
      if (json.layers[0]?.shares) return { document: profile(json) };
      if (json.layers[0]?.experts) return { document: plan(json) };
    }
  } catch (error) {
    throw new Error(`${name} looks like a file of Cadre, but something in it is missing: ${error.message}.`);
  }
  const known = ["top_k", "top_p", "ranks", "min_weight", "min_experts", "mask", "force", "mute", "bias", "gain"];
  if (json && typeof json === "object" && !Array.isArray(json) && Object.keys(json).length > 0 && Object.keys(json).every((key) => known.includes(key))) {
    return { steering: json };
  }
  throw new Error(`${name} is no statistics of a trace (cadre trace show -o json), profile, plan or steering.`);
}
