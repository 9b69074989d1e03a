// What every page shares: elements, the theme, and the box beside the pointer. Text only ever goes in through
// textContent, so names cannot become markup. A page defines draw(), which follows the theme, and calls begin() last.
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const root = document.documentElement;
const preference = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => root.dataset.theme === "dark";
const number = (value) => value.toLocaleString("en-US");

function element(tag, text, attributes) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  return node;
}
function placeTip(x, y) {
  const tip = byId("tip");
  tip.style.display = "block";
  const left = Math.min(x + 14, innerWidth - tip.offsetWidth - 8);
  const top = y + 16 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 12 : y + 16;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = Math.max(8, top) + "px";
}
const hideTip = () => (byId("tip").style.display = "none");
function setTheme(dark) {
  root.dataset.theme = dark ? "dark" : "light";
  draw();
}
function begin() {
  addEventListener("scroll", hideTip, { passive: true });
  byId("theme").onclick = () => setTheme(!isDark());
  preference.onchange = () => setTheme(preference.matches);
  setTheme(preference.matches);
}

