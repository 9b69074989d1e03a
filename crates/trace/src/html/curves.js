// Reads the curves that are drawn on the page: by pointer or arrow keys; and hides runs.
function draw() {}

const shown = data.series.map(() => true);
document.querySelectorAll(".legend button").forEach((button, i) => {
  button.onclick = () => {
    shown[i] = !shown[i];
    button.setAttribute("aria-pressed", String(shown[i]));
    document.querySelectorAll(`path.s${i}, circle.s${i}`).forEach((mark) => {
      mark.style.display = shown[i] ? "" : "none";
    });
  };
});
const short = (value) => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(2) : Number(value.toPrecision(4)).toLocaleString("en-US", { maximumSignificantDigits: 4 }));
function nearest(points, step) {
  return points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
}
document.querySelectorAll(".charts svg").forEach((svg, i) => {
  const chart = data.charts[i];
  const cross = svg.querySelector(".cross");
  const steps = [...new Set(chart.lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
  let at = -1;
  function show(step, x, y) {
    const tip = byId("tip");
    tip.replaceChildren(element("b", "step " + number(Math.round(step))));
    for (const line of chart.lines) {
      if (!shown[line.series] || line.points.length === 0) continue;
      const row = element("div");
      const dot = element("span", "", { class: `dot b${line.series}` });
      row.append(dot, element("span", data.series[line.series]), element("span", short(nearest(line.points, step)[1])));
      tip.append(row);
    }
    const place = chart.left + ((step - chart.x[0]) / (chart.x[1] - chart.x[0] || 1)) * chart.width;
    cross.setAttribute("x1", place);
    cross.setAttribute("x2", place);
    cross.style.visibility = "visible";
    placeTip(x, y);
  }
  function hide() {
    cross.style.visibility = "hidden";
    hideTip();
  }
  svg.onpointermove = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const share = Math.min(1, Math.max(0, (x - chart.left) / chart.width));
    show(chart.x[0] + share * (chart.x[1] - chart.x[0]), event.clientX, event.clientY);
  };
  svg.onpointerleave = hide;
  svg.onblur = hide;
  svg.onkeydown = (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || steps.length === 0) return;
    event.preventDefault();
    at = Math.min(steps.length - 1, Math.max(0, at + move));
    const box = svg.getBoundingClientRect();
    const share = (steps[at] - chart.x[0]) / (chart.x[1] - chart.x[0] || 1);
    const x = (chart.left + share * chart.width) / svg.viewBox.baseVal.width;
    show(steps[at], box.left + x * box.width, box.top + box.height / 3);
  };
});
begin();
