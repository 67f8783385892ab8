// Small figures in SVG: a stacked bar, a line over time, a few columns.

import { h, s } from "./dom.js";

export const COLOURS = ["weights", "kv", "activations", "drafter", "runtime", "others", "free"];

// parts: [{ kind, label, bytes }]; `total` is the whole width.
export function stacked(parts, total, label) {
  const bar = s("svg", { class: "stack", viewBox: "0 0 1000 34", preserveAspectRatio: "none", role: "img", "aria-label": label });
  let at = 0;
  for (const { kind, label: name, value } of parts) {
    const width = Math.max(0, (1000 * value) / total);
    if (width < 0.5) continue;
    bar.append(s("rect", { x: at, y: 0, width: Math.max(0, width - 2), height: 34, class: `part ${kind}` }, s("title", {}, name)));
    at += width;
  }
  return bar;
}

// points: [[x, y]] in their own units; lines: [{ points, kind }]
export function line(lines, { label, low = 0, high, format = (it) => it }) {
  const every = lines.flatMap((it) => it.points);
  const top = high ?? Math.max(1e-9, ...every.map(([, y]) => y)) * 1.12;
  const first = Math.min(...every.map(([x]) => x));
  const last = Math.max(...every.map(([x]) => x));
  const place = ([x, y]) => `${((x - first) / Math.max(1e-9, last - first)) * 1000},${200 - ((y - low) / (top - low)) * 196 - 2}`;
  const figure = s("svg", { class: "line", viewBox: "0 0 1000 200", preserveAspectRatio: "none", role: "img", "aria-label": label });
  for (const share of [0.25, 0.5, 0.75]) figure.append(s("line", { x1: 0, x2: 1000, y1: 200 * share, y2: 200 * share, class: "rule" }));
  for (const { points, kind } of lines) {
    if (points.length < 2) continue;
    const path = points.map(place).join(" ");
    if (kind === "main") figure.append(s("polygon", { points: `0,200 ${path} 1000,200`, class: "area" }));
    figure.append(s("polyline", { points: path, class: `stroke ${kind}` }));
  }
  return h("figure", { class: "plot" }, h("figcaption", {}, h("span", {}, label), h("span", { class: "muted" }, `up to ${format(top)}`)), figure);
}

// columns: [{ label, value, text }], value of 0 to 1
export function columns(found, label) {
  return h("figure", { class: "plot" }, h("figcaption", {}, h("span", {}, label)),
    h("div", { class: "columns", role: "img", "aria-label": `${label}: ${found.map((it) => `${it.label} ${it.text}`).join(", ")}` },
      found.map(({ label: name, value, text }) => {
        const bar = s("svg", { viewBox: "0 0 10 100", preserveAspectRatio: "none", "aria-hidden": "true" }, s("rect", { x: 0, width: 10, rx: 1.5, y: 100 - 100 * value, height: 100 * value, class: "column" }));
        return h("div", {}, h("span", { class: "value" }, text), bar, h("span", { class: "muted" }, name));
      })));
}
