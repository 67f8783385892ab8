// Speed: tokens per second as they come, how soon the first one does, and what drafting is worth.

import { count, h } from "./dom.js";
import { columns, line } from "./plot.js";

export function speedScreen(view, world) {
  const rates = h("div", { class: "card" });
  const drafts = h("div", { class: "card" });
  const firsts = h("div", { class: "card" });
  const table = h("div", { class: "card" });
  const tiles = h("div", { class: "tiles" });

  function show(event) {
    const { recent } = event;
    const engine = event.engine ?? { running: 0, waiting: 0, pages: 1, pages_held: 0, pages_kept: 0 };
    const sorted = recent.map((it) => it.first_s).sort((a, b) => a - b);
    const middle = sorted.length ? `${Math.round(1000 * sorted[Math.floor(sorted.length / 2)])} ms` : "–";
    tiles.replaceChildren(
      tile(event.tokens_per_second.toFixed(1), "tokens per second now"),
      tile(middle, "to the first token, median"),
      tile(`${engine.running} + ${engine.waiting}`, "running + waiting"),
      tile(`${Math.round((100 * engine.pages_held) / engine.pages)} %`, "of the cache held"));
    rates.replaceChildren(line([{ points: world.history.map((it) => [it.at / 1000, it.tokens_per_second]), kind: "main" }], { label: "Tokens per second, all together", format: (it) => it.toFixed(0) }));
    drafts.replaceChildren(acceptance(recent));
    firsts.replaceChildren(histogram(sorted));
    table.replaceChildren(h("h2", {}, "Last answers"), recent.length ? answers(recent) : h("p", { class: "muted" }, "none yet"));
  }

  view.replaceChildren(h("div", { class: "page" }, h("h1", {}, "Speed"), tiles, rates, h("div", { class: "two" }, drafts, firsts), table));
  show(world.history.at(-1) ?? { tokens_per_second: 0, recent: [] });
  world.listeners.add(show);
}

function tile(value, label) {
  return h("div", { class: "tile" }, h("strong", {}, value), h("span", { class: "muted" }, label));
}

function acceptance(recent) {
  const rounds = recent.reduce((sum, it) => sum + it.rounds, 0);
  if (!rounds) return h("div", {}, h("h2", {}, "Drafts"), h("p", { class: "muted" }, "No round of the last answers had drafts: either nobody drafts, or it would not have paid."));
  const places = Math.max(...recent.map((it) => it.accepted_by_position.length));
  const found = Array.from({ length: places }, (_, place) => {
    const right = recent.reduce((sum, it) => sum + (it.accepted_by_position[place] ?? 0), 0) / rounds;
    return { label: String(place + 1), value: right, text: `${Math.round(100 * right)} %` };
  });
  const accepted = recent.reduce((sum, it) => sum + it.accepted, 0);
  return h("div", {}, columns(found, "Drafts that were right, by their place in a round"), h("p", { class: "muted" }, `${(1 + accepted / rounds).toFixed(2)} tokens a round, the model's own among them; ${count(rounds)} rounds`));
}

const BORDERS = [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, Infinity]; // seconds

function histogram(seconds) {
  const names = BORDERS.map((it, index) => (it === Infinity ? "more" : `${index ? "" : "≤ "}${it}`));
  const counts = BORDERS.map((high, index) => seconds.filter((it) => it <= high && it > (BORDERS[index - 1] ?? -1)).length);
  const most = Math.max(1, ...counts);
  return columns(counts.map((it, index) => ({ label: names[index], value: it / most, text: it ? String(it) : "" })), "Seconds to the first token");
}

function answers(recent) {
  const rows = [...recent].reverse().slice(0, 12).map((it) => h("tr", {},
    h("td", { class: "right" }, count(it.prompt_tokens)), h("td", { class: "right" }, count(it.cached_tokens)), h("td", { class: "right" }, count(it.tokens)),
    h("td", { class: "right" }, `${Math.round(1000 * it.first_s)} ms`), h("td", { class: "right" }, it.tokens_per_second?.toFixed(1) ?? "–"), h("td", { class: "right" }, it.drafted ? `${it.accepted}/${it.drafted}` : "–")));
  return h("div", { class: "table" }, h("table", {}, h("thead", {}, h("tr", {}, ["prompt", "kept", "tokens", "first", "tokens/s", "drafts"].map((it) => h("th", { class: "right" }, it)))), h("tbody", {}, rows)));
}
