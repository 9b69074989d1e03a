// Draws the page of a trace from its JSON.
const nExperts = data.meta.n_experts;
const even = 1 / nExperts;
// The page opens at the layer that tells the domains apart best.
const jsd = (layer) => (layer.specialisation ? layer.specialisation.js_divergence : 0);
const mostSpecial = data.layers.reduce((best, layer, row) => (jsd(layer) > jsd(data.layers[best]) ? row : best), 0);
const state = { domain: -1, row: mostSpecial, grouped: false, sorted: false };
const sum = (list) => list.reduce((a, b) => a + b, 0);
const heatColours = () => (isDark() ? data.heat_dark : data.heat_light);
const domainColours = () => (isDark() ? data.domains_dark : data.domains_light);

function dot(d) {
  const node = element("span", "", { class: "dot" });
  node.style.background = domainColours()[d];
  return node;
}
const fixed = (value, digits) => (value === null || value === undefined ? "\u2013" : value.toFixed(digits));
const percent = (value, digits) => (value === null || value === undefined ? "\u2013" : (100 * value).toFixed(digits) + " %");

// Picks of a layer in one domain, or in all (-1), and the share of an expert relative to an even share.
const counts = (row, d) => (d < 0 ? data.layers[row].load : data.layers[row].by_domain[d]);
const totals = data.layers.map((layer, row) => [-1, ...data.domains.keys()].map((d) => sum(counts(row, d))));
function relative(row, d, expert) {
  const total = totals[row][d + 1];
  return total === 0 ? 0 : (counts(row, d)[expert] / total) * nExperts;
}
// The same curve as in the terminal and in the SVG.
const intensity = (share) => Math.min(1, Math.pow(Math.max(0, share) / 4, 0.75));

// The experts of a layer in column order: by id, or grouped by the domain that uses them most.
function order(row, grouped) {
  const experts = [...Array(nExperts).keys()];
  if (!grouped || data.domains.length < 2) return experts;
  const key = experts.map((e) => {
    const shares = data.domains.map((_, d) => relative(row, d, e));
    const total = sum(shares);
    if (total === 0) return [data.domains.length, 0];
    const home = shares.indexOf(Math.max(...shares));
    return [home, shares[home] / total];
  });
  return experts.sort((a, b) => key[a][0] - key[b][0] || key[b][1] - key[a][1] || a - b);
}

// Geometry of a heat map in CSS pixels. The large map has a gutter for layer numbers.
const GUTTER = 30;
const FRAME = 2;
function geometry(canvas, gutter, tallest) {
  const width = canvas.clientWidth || canvas.parentElement.clientWidth;
  const cellWidth = (width - gutter) / nExperts;
  // Square where possible; few layers may be taller than wide, many stay readable.
  const few = data.layers.length <= 12;
  const least = gutter ? (few ? 18 : 9) : few ? 8 : 3;
  const most = gutter ? tallest : Math.min(tallest, 100 / data.layers.length);
  const cellHeight = Math.max(least, Math.min(most, cellWidth));
  return { width, gutter, cellWidth, cellHeight, height: Math.ceil(cellHeight * data.layers.length) };
}
function drawMap(canvas, d, gutter, tallest) {
  const g = geometry(canvas, gutter, tallest);
  const ratio = window.devicePixelRatio || 1;
  // Room for the frame of the selected layer above the first row, and for expert numbers below the last.
  const [head, footer] = gutter ? [FRAME, 20] : [0, 0];
  canvas.style.height = head + g.height + footer + "px";
  canvas.width = Math.round(g.width * ratio);
  canvas.height = Math.round((head + g.height + footer) * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.translate(0, head);
  const colours = heatColours();
  const style = getComputedStyle(root);
  const gap = g.cellWidth >= 5 && g.cellHeight >= 5 ? 1 : 0;
  data.layers.forEach((_, row) => {
    order(row, state.grouped).forEach((expert, column) => {
      const step = Math.round(intensity(relative(row, d, expert)) * (colours.length - 1));
      const x = gutter + column * g.cellWidth;
      // Snapped to device pixels, so that cells neither overlap nor leave hairlines.
      const left = Math.round(x * ratio) / ratio;
      const right = Math.round((x + g.cellWidth) * ratio) / ratio;
      pen.fillStyle = colours[step];
      pen.fillRect(left, row * g.cellHeight, right - left - gap, g.cellHeight - gap);
    });
  });
  if (!gutter) return;
  pen.fillStyle = style.getPropertyValue("--soft");
  pen.font = "11px ui-sans-serif, system-ui, sans-serif";
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  const every = Math.ceil(12 / g.cellHeight);
  data.layers.forEach((layer, row) => {
    if (row % every === 0) pen.fillText(layer.layer, gutter - 7, (row + 0.5) * g.cellHeight);
  });
  pen.textAlign = "center";
  if (!state.grouped) {
    const step = [1, 2, 4, 8, 16, 32, 64, 128].find((n) => n * g.cellWidth >= 26) || 256;
    for (let e = 0; e < nExperts; e += step) pen.fillText(e, gutter + (e + 0.5) * g.cellWidth, g.height + 10);
  } else {
    pen.textAlign = "left";
    pen.fillText("experts of each layer, grouped by the domain that uses them most", gutter, g.height + 10);
  }
  pen.strokeStyle = style.getPropertyValue("--accent");
  pen.lineWidth = 2;
  pen.strokeRect(gutter - 1, state.row * g.cellHeight - 1, g.width - gutter, g.cellHeight + 2 - gap);
}

function hit(event) {
  const canvas = byId("map");
  const g = geometry(canvas, GUTTER, 26);
  const box = canvas.getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left - GUTTER) / g.cellWidth);
  const row = Math.floor((event.clientY - box.top - FRAME) / g.cellHeight);
  if (column < 0 || column >= nExperts || row < 0 || row >= data.layers.length) return null;
  return { row, expert: order(row, state.grouped)[column] };
}
function showTip(event, row, expert) {
  const tip = byId("tip");
  tip.replaceChildren();
  const total = totals[row][state.domain + 1];
  const count = counts(row, state.domain)[expert];
  tip.append(element("b", `layer ${data.layers[row].layer}, expert ${expert}`));
  tip.append(element("span", `${number(count)} picks, ${percent(total ? count / total : 0, 2)}, ${relative(row, state.domain, expert).toFixed(2)}\u00d7 even`));
  if (data.domains.length > 1) {
    data.domains.forEach((domain, d) => {
      const line = element("div");
      line.append(dot(d), element("span", domain.name), element("span", relative(row, d, expert).toFixed(2) + "\u00d7"));
      tip.append(line);
    });
  }
  placeTip(event.clientX, event.clientY);
}

function drawHead() {
  const m = data.meta;
  byId("about").textContent = `${m.architecture}: ${m.n_layers} layers \u00d7 ${m.n_experts} experts, top-${m.top_k}; ${number(data.n_tokens)} tokens in ${number(data.n_sequences)} sequences`;
  byId("digest").textContent = m.digest;
  byId("notes").replaceChildren(...data.notes.map((note) => element("div", note, { class: "note" })));
  const mean = (pick) => {
    const values = data.layers.map(pick).filter((value) => value !== null && value !== undefined);
    return values.length ? sum(values) / values.length : null;
  };
  const tiles = [
    [fixed(mean((l) => l.load_entropy), 3), "load entropy, 1 is even"],
    [fixed(mean((l) => l.token_entropy), 3), "router entropy, 0 is certain"],
    [fixed(mean((l) => l.max_vio), 2), "mean MaxVio"],
    [number(sum(data.layers.map((l) => l.dead.length))), "dead experts"],
    [number(sum(data.layers.map((l) => l.hot.length))), "hot experts"],
    [fixed(mean((l) => l.specialisation && l.specialisation.js_divergence), 3), "specialisation (JSD)"],
    [percent(mean((l) => l.reuse), 0), "picks repeated from the token before"],
  ];
  byId("tiles").replaceChildren(
    ...tiles.filter(([value]) => value !== "\u2013").map(([value, label]) => {
      const tile = element("div", null, { class: "tile num" });
      tile.append(element("b", value), element("span", label));
      return tile;
    }),
  );
}
function drawPicker() {
  const choices = [["All", -1], ...data.domains.map((domain, d) => [domain.name, d])];
  byId("picker").replaceChildren(
    ...choices.map(([name, d]) => {
      const button = element("button", null, { "aria-pressed": String(state.domain === d) });
      if (d >= 0) button.append(dot(d));
      button.append(element("span", name));
      if (d >= 0) button.append(element("span", percent(data.domains[d].n_tokens / data.n_tokens, 0), { class: "small", style: "opacity:.65" }));
      button.onclick = () => choose({ domain: d });
      return button;
    }),
  );
  byId("picker").hidden = data.domains.length < 2;
}
function drawMaps() {
  byId("map-title").textContent = "Layer \u00d7 expert: " + (state.domain < 0 ? "all domains" : data.domains[state.domain].name);
  byId("ramp").style.background = `linear-gradient(90deg, ${data.ramp_stops.map((i) => heatColours()[i]).join(", ")})`;
  drawMap(byId("map"), state.domain, GUTTER, 26);
  byId("order").hidden = byId("panels-card").hidden = data.domains.length < 2;
  byId("order").setAttribute("aria-pressed", String(state.grouped));
  if (byId("panels").childElementCount !== data.domains.length) {
    byId("panels").replaceChildren(
      ...data.domains.map((domain, d) => {
        const panel = element("button", null, { class: "panel" });
        const name = element("span");
        name.append(element("span", "", { class: "dot" }), element("span", domain.name));
        panel.append(name, element("canvas"));
        panel.onclick = () => choose({ domain: d });
        return panel;
      }),
    );
  }
  [...byId("panels").children].forEach((panel, d) => {
    panel.querySelector(".dot").style.background = domainColours()[d];
    drawMap(panel.querySelector("canvas"), d, 0, 12);
  });
}
function drawLayer() {
  const layer = data.layers[state.row];
  byId("layer").max = data.layers.length - 1;
  byId("layer").value = state.row;
  byId("layer-title").textContent = `Load of layer ${layer.layer}` + (state.domain < 0 ? "" : `: ${data.domains[state.domain].name}`);
  byId("sort").setAttribute("aria-pressed", String(state.sorted));
  const total = totals[state.row][state.domain + 1] || 1;
  const experts = [...Array(nExperts).keys()];
  const shown = counts(state.row, state.domain);
  if (state.sorted) experts.sort((a, b) => shown[b] - shown[a] || a - b);
  const top = Math.max(...shown) / total || 1;
  const parts = state.domain < 0 ? [...data.domains.keys()] : [state.domain];
  const bars = experts.map((expert) => {
    const bar = element("div", null, { "aria-label": `expert ${expert}: ${percent(shown[expert] / total, 1)}` });
    for (const d of parts) {
      const piece = element("i");
      piece.style.height = (100 * counts(state.row, d)[expert]) / total / (1.06 * top) + "%";
      piece.style.background = domainColours()[d];
      bar.append(piece);
    }
    bar.onpointermove = (event) => showTip(event, state.row, expert);
    bar.onpointerleave = hideTip;
    return bar;
  });
  const line = element("hr");
  line.style.bottom = (100 * even) / (1.06 * top) + "%";
  byId("loads").style.gap = byId("axis").style.gap = nExperts > 48 ? "0" : "2px";
  byId("loads").replaceChildren(...bars, line);
  const step = Math.ceil(26 / (byId("loads").clientWidth / nExperts));
  byId("axis").replaceChildren(...experts.map((expert, i) => element("div", i % step === 0 ? expert : "")));

  const s = layer.specialisation;
  const facts = [
    ["tokens", number(layer.n_tokens)], ["CV", fixed(layer.cv, 2)], ["MaxVio", fixed(layer.max_vio, 2)],
    ["load entropy", fixed(layer.load_entropy, 3)], ["router entropy", fixed(layer.token_entropy, 3)],
    ["reuse (chance)", `${percent(layer.reuse, 0)} (${percent(layer.reuse_by_chance, 0)})`],
    ["JSD", fixed(s && s.js_divergence, 3)], ["mutual inf.", s ? fixed(s.mutual_information, 3) + " bits" : "\u2013"],
  ];
  byId("facts").replaceChildren(
    ...facts.map(([name, value]) => {
      const fact = element("div");
      fact.append(element("span", name), element("b", value));
      return fact;
    }),
  );
  const lists = [["hot", layer.hot], ["dead", layer.dead], ["cold", layer.cold]].filter(([, list]) => list.length);
  byId("lists").replaceChildren(
    ...lists.map(([name, list]) => {
      const chips = element("div", null, { class: "chips", style: "margin-top:7px" });
      chips.append(element("span", name, { class: "soft small", style: "width:36px" }));
      for (const expert of list) {
        const chip = element("span", expert, { class: "chip" });
        chip.append(element("em", relative(state.row, -1, expert).toFixed(2) + "\u00d7"));
        chips.append(chip);
      }
      return chips;
    }),
  );
}
function drawTops() {
  byId("tops-card").hidden = !data.top_experts.length;
  const many = data.domains.length > 1;
  byId("tops-title").textContent = many ? "Experts that tell the domains apart" : "Most used experts";
  byId("tops-unit").textContent = many ? "the mean over domains" : "an even share";
  byId("tops").replaceChildren(
    ...data.top_experts.flatMap((top, d) => {
      const name = element("dt");
      name.append(dot(d), element("span", top.domain));
      const chips = element("dd", null, { class: "chips" });
      for (const expert of top.experts) {
        const chip = element("span", `${expert.layer}.${expert.expert}`, { class: "chip" });
        chip.append(element("em", expert.lift.toFixed(1) + "\u00d7"));
        chips.append(chip);
      }
      return [name, chips];
    }),
  );
}
function drawCache() {
  byId("cache-card").hidden = !data.cache.length;
  byId("cache").replaceChildren(
    ...data.cache.flatMap((point) => {
      const track = element("div", null, { class: "track" });
      for (const rate of [point.belady_rate, point.lru_rate]) {
        const part = element("i");
        part.style.width = 100 * rate + "%";
        track.append(part);
      }
      const kept = `${point.capacity} of ${nExperts} experts`;
      return [element("span", kept), track, element("span", `${percent(point.lru_rate, 0)} / ${percent(point.belady_rate, 0)}`)];
    }),
  );
}
function drawTable() {
  const columns = ["layer", "CV", "MaxVio", "load entropy", "router entropy", "dead", "cold", "hot", "reuse", "JSD", "MI, bits"];
  const head = element("tr");
  head.append(...columns.map((name) => element("th", name)));
  byId("thead").replaceChildren(head);
  byId("tbody").replaceChildren(
    ...data.layers.map((layer, row) => {
      const s = layer.specialisation;
      const cells = [
        layer.layer, fixed(layer.cv, 2), fixed(layer.max_vio, 2), fixed(layer.load_entropy, 3), fixed(layer.token_entropy, 3),
        layer.dead.length, layer.cold.length, layer.hot.length, percent(layer.reuse, 0),
        fixed(s && s.js_divergence, 3), fixed(s && s.mutual_information, 3),
      ];
      const line = element("tr", null, { "aria-selected": String(row === state.row) });
      line.append(...cells.map((cell) => element("td", cell)));
      if (layer.load_entropy < 0.6) line.children[3].className = "bad";
      if (layer.max_vio > 2) line.children[2].className = "bad";
      if (layer.dead.length) line.children[5].className = "bad";
      line.onclick = () => choose({ row });
      return line;
    }),
  );
}
function draw() {
  drawHead();
  drawPicker();
  drawMaps();
  drawLayer();
  drawTops();
  drawCache();
  drawTable();
}
function choose(change) {
  Object.assign(state, change);
  draw();
}

byId("map").onpointermove = (event) => {
  const at = hit(event);
  if (at) showTip(event, at.row, at.expert);
  else hideTip();
};
byId("map").onpointerdown = byId("map").onpointermove;
byId("map").onpointerleave = hideTip;
byId("map").onclick = (event) => {
  const at = hit(event);
  if (at) choose({ row: at.row });
};
byId("order").onclick = () => choose({ grouped: !state.grouped });
byId("sort").onclick = () => choose({ sorted: !state.sorted });
byId("layer").oninput = (event) => choose({ row: Number(event.target.value) });
let resizing = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(draw);
});
begin();
