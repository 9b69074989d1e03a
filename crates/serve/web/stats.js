// The numbers of a run: how fast, how much memory, what was read.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(n) {
  const unit = Math.min(UNITS.length - 1, Math.max(0, Math.floor(Math.log2(Math.max(1, n)) / 10)));
  return `${(n / 1024 ** unit).toLocaleString("en", { maximumSignificantDigits: 3 })} ${UNITS[unit]}`;
}

export function many(n) {
  const [size, word] = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]].find(([size]) => n >= size) ?? [1, ""];
  return (n / size).toLocaleString("en", { maximumSignificantDigits: 3 }) + word;
}

const percent = (part, whole) => `${(100 * (part / whole)).toLocaleString("en", { maximumFractionDigits: 1 })} %`;

/** Names of values and what they are, for an answer, metrics before it (or none) and the newest ones. */
export function tiles(answer, shape, before, now) {
  const list = [];
  const clock = answer?.clock;
  if (clock?.seconds > 0 && clock.tokens > 1) list.push(["Speed", `${(clock.tokens / clock.seconds).toLocaleString("en", { maximumSignificantDigits: 3 })} tok/s`]);
  if (clock?.first !== undefined) list.push(["First token", clock.first < 1 ? `${Math.round(1000 * clock.first)} ms` : `${clock.first.toFixed(1)} s`]);
  if (clock) list.push(["Tokens", clock.prompt === undefined ? `${clock.tokens}` : `${clock.prompt} + ${clock.tokens}`]);
  if (answer?.routing && shape) list.push(["Experts used", `${answer.routing.used(shape)} of ${shape.counts.reduce((a, b) => a + b, 0)}`]);
  const memory = now?.process_resident_memory_bytes;
  if (memory > 0) list.push(["Memory", bytes(memory)]);
  const since = (name) => (now?.[name] ?? 0) - (before?.[name] ?? 0);
  const lookups = since("cadre:expert_lookups_total");
  if (lookups > 0) {
    list.push(["Cache hits", percent(since("cadre:expert_cache_hits_total"), lookups)]);
    list.push(["Read from disk", bytes(Math.max(0, since("cadre:expert_bytes_read_total")))]);
  }
  const waiting = now?.["vllm:num_requests_waiting"];
  if (waiting > 0) list.push(["Waiting", `${waiting}`]);
  return list;
}

/** Puts them into a list of descriptions. */
export function show(root, list) {
  const wanted = list.length > 0 ? list : [["Nothing yet", "write something"]];
  while (root.children.length > wanted.length) root.lastChild.remove();
  wanted.forEach(([name, value], i) => {
    let tile = root.children[i];
    if (!tile) {
      tile = document.createElement("div");
      tile.append(document.createElement("dt"), document.createElement("dd"));
      root.append(tile);
    }
    if (tile.firstChild.textContent !== name) tile.firstChild.textContent = name;
    if (tile.lastChild.textContent !== value) tile.lastChild.textContent = value;
  });
}
