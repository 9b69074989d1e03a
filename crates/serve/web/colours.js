// Colours of the maps: ramps chosen in OKLCH, where equal steps look equal, as tables of 256 entries.

const HEAT = {
  light: [[0.955, 0.008, 285], [0.92, 0.06, 88], [0.79, 0.15, 60], [0.58, 0.21, 18], [0.33, 0.14, 315]],
  dark: [[0.255, 0.02, 285], [0.34, 0.1, 292], [0.5, 0.2, 335], [0.71, 0.19, 42], [0.95, 0.14, 98]],
};
// Less on the left, more on the right; grey means the same.
const CHANGE = {
  light: [[0.45, 0.16, 255], [0.76, 0.1, 250], [0.955, 0.008, 285], [0.77, 0.14, 45], [0.5, 0.19, 25]],
  dark: [[0.78, 0.13, 245], [0.48, 0.13, 255], [0.255, 0.02, 285], [0.54, 0.16, 35], [0.84, 0.14, 60]],
};
// The marks on steered experts.
const INK = { light: "#1d1b26", dark: "#ffffff" };

/** Lightness and the two axes of colour, along which mixing passes no other hue. */
const axes = ([lightness, chroma, hue]) => [lightness, chroma * Math.cos((hue * Math.PI) / 180), chroma * Math.sin((hue * Math.PI) / 180)];

function srgb([lightness, a, b]) {
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  return linear.map((value) => {
    const bounded = Math.min(1, Math.max(0, value));
    const encoded = bounded <= 0.0031308 ? 12.92 * bounded : 1.055 * bounded ** (1 / 2.4) - 0.055;
    return Math.round(255 * encoded);
  });
}

function table(ramp) {
  const stops = ramp.map(axes);
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (stops.length - 1);
    const from = Math.min(stops.length - 2, Math.floor(at));
    const mixed = stops[from].map((value, part) => value + (stops[from + 1][part] - value) * (at - from));
    return `rgb(${srgb(mixed).join(" ")})`;
  });
}

const preference = matchMedia("(prefers-color-scheme: dark)");
const tables = { heat: {}, change: {} };
for (const theme of ["light", "dark"]) {
  tables.heat[theme] = table(HEAT[theme]);
  tables.change[theme] = table(CHANGE[theme]);
}

const theme = () => (preference.matches ? "dark" : "light");
const index = (value) => Math.max(0, Math.min(255, Math.round(255 * value)));

/** Colour of a share from 0 to 1. The root lifts what is small, so that it can be told from nothing. */
export const heat = (value) => tables.heat[theme()][index(Math.sqrt(Math.max(0, value)))];

/** Colour of a difference from -1 to 1. */
export const change = (value) => tables.change[theme()][index(0.5 + 0.5 * Math.sign(value) * Math.sqrt(Math.abs(value)))];

export const ink = () => INK[theme()];

/** Colours of a scale from its start to its end. */
export const scale = (kind) => tables[kind][theme()];

/** Calls `act` when light turns to dark or back. */
export const onTheme = (act) => preference.addEventListener("change", act);
