// Memory: what was planned beside what is measured, and what another context would take.

import { json } from "./api.js";
import { bytes, h, length } from "./dom.js";
import { line, stacked } from "./plot.js";

const KINDS = { weights: "Weights", kv: "Keys and values", drafter: "Drafter", activations: "Activations", runtime: "Process and text", others: "Other programs", free: "Free" };

export function parts(plan) {
  const sums = Object.fromEntries(Object.keys(KINDS).map((it) => [it, 0]));
  for (const { component, bytes: size, place } of plan.rows) {
    if (place === "host") continue;
    const first = component.split(".")[0];
    const kind = component === "runtime.other_processes" ? "others" : component === "runtime.margin" ? "free" : first in sums ? first : "runtime";
    sums[kind] += size;
  }
  sums.free += Math.max(0, plan.budget_bytes - plan.total_bytes);
  return Object.entries(sums).map(([kind, value]) => ({ kind, value, label: `${KINDS[kind]}: ${bytes(value)}` })).filter((it) => it.value > 0);
}

export function memoryScreen(view, world) {
  const { plan } = world.info;
  const most = world.info.trained_context;
  const now = plan.setup.context;
  const chosen = h("div", { class: "card" });
  const measured = h("div", { class: "card" });
  const graph = h("div", { class: "card" });
  const output = h("output", { class: "big" }, length(now));
  const steps = Math.round(Math.log2(most / 256) * 4);
  const value = (step) => Math.min(most, Math.max(256, Math.round((256 * 2 ** (step / 4)) / 256) * 256));
  const slider = h("input", { type: "range", min: 0, max: Math.max(1, steps), step: 1, "aria-label": "Context to plan for", value: Math.round(Math.log2(now / 256) * 4) });
  const kv = h("select", { "aria-label": "How keys and values are kept" }, ["bf16", "q8_0"].map((it) => h("option", { value: it, selected: it === plan.setup.kv }, it)));
  let pending = 0;

  async function replan() {
    const context = value(Number(slider.value));
    output.textContent = length(context);
    const mine = (pending += 1);
    await new Promise((resolve) => setTimeout(resolve, 120));
    if (mine !== pending) return;
    try {
      const found = await json("/api/plan", { context, kv: kv.value });
      if (mine === pending) show(found);
    } catch (error) {
      chosen.replaceChildren(h("p", { class: "error" }, error.message));
    }
  }

  function show(found) {
    const free = found.budget_bytes - found.total_bytes;
    const list = parts(found);
    chosen.replaceChildren(
      h("div", { class: "verdict" }, h("span", { class: found.fits ? "badge good" : "badge bad" }, found.fits ? "fits" : "does not fit"), h("span", {}, `${bytes(own(found))} of our own${free >= 0 ? `, ${bytes(free)} to spare` : `, ${bytes(-free)} too much`}`)),
      stacked(list, Math.max(found.budget_bytes, found.total_bytes), "The plan"),
      legend(list),
      h("details", {}, h("summary", {}, "Every row"), h("div", { class: "table" }, h("table", {}, h("tbody", {}, found.rows.map((row) => h("tr", {}, h("td", {}, row.place === "host" ? `${row.component}, on the CPU` : row.component), h("td", { class: "right" }, bytes(row.bytes)), h("td", { class: "muted" }, `${row.basis === "calibrated" ? "~ " : ""}${row.note}`))))))));
  }

  function measure(event) {
    const { memory } = event;
    const planned = own(plan);
    const used = Math.max(0, memory.resident - (memory.libraries ?? 0));
    const most = Math.max(planned, used) * 1.05;
    const real = [["weights", memory.weights], ["drafter", memory.drafter + memory.adapters]];
    // Pages of the cache are the system's until they are used, so of the cache only a part is there.
    const known = real.reduce((sum, [, it]) => sum + it, 0);
    const cache = Math.min(memory.kv, Math.max(0, used - known));
    real.push(["kv", cache]);
    const rest = Math.max(0, used - known - cache);
    const bars = [...real, ["runtime", rest]].filter(([, it]) => it > 0).map(([kind, it]) => ({ kind, value: it, label: `${KINDS[kind]}: ${bytes(it)}` }));
    measured.replaceChildren(
      h("h2", {}, "Planned and measured"),
      h("div", { class: "pair" }, h("span", {}, "plan"), stacked(parts(plan).filter((it) => !["others", "free"].includes(it.kind)), most, "Planned"), h("span", { class: "right" }, bytes(planned))),
      h("div", { class: "pair" }, h("span", {}, "now"), stacked(bars, most, "Measured"), h("span", { class: "right" }, bytes(used))),
      legend(compared(parts(plan), bars)),
      h("p", { class: "muted" }, `Measured is what the process grew by since its libraries were there (${bytes(memory.libraries ?? 0)}); of the cache, what has been used.`));
    const points = world.history.map((it) => [it.at / 1000, it.memory.resident]);
    const pages = world.history.filter((it) => it.engine).map((it) => [it.at / 1000, it.engine.pages_held / it.engine.pages]);
    graph.replaceChildren(line([{ points, kind: "main" }], { label: "Memory of the process", format: bytes }), pages.length > 1 ? line([{ points: pages, kind: "main" }], { label: "Pages of the cache in use or kept", high: 1, format: () => "100 %" }) : "");
  }

  slider.addEventListener("input", replan);
  kv.addEventListener("change", replan);
  view.replaceChildren(h("div", { class: "page" },
    h("h1", {}, "Memory"),
    measured,
    h("section", { class: "card" }, h("h2", {}, "What another context takes"), h("div", { class: "slide" }, h("label", {}, "Context ", output, ` tokens, ${world.info.parallel} at once`), slider, h("label", {}, "Cache ", kv)), chosen),
    graph));
  show(plan);
  if (world.history.length) measure(world.history.at(-1));
  else measure({ memory: { adapters: 0, ...world.info.measured } });
  world.listeners.add(measure);
}

function own(plan) {
  return plan.rows.filter((it) => !["runtime.other_processes", "runtime.margin"].includes(it.component)).reduce((sum, it) => sum + it.bytes, 0);
}

// Of every kind what was planned and what is there; the process's own share is what is left over.
function compared(planned, measured) {
  return Object.keys(KINDS).filter((it) => !["others", "free"].includes(it)).map((kind) => {
    const [told, real] = [planned, measured].map((list) => list.find((it) => it.kind === kind)?.value);
    const words = [told && `${bytes(told)} planned`, real && `${bytes(real)} now${kind === "runtime" ? ", with activations" : ""}`].filter(Boolean);
    return { kind, label: `${KINDS[kind]}: ${words.join(", ")}`, value: words.length };
  }).filter((it) => it.value);
}

function legend(list) {
  return h("ul", { class: "legend" }, list.map(({ kind, label }) => h("li", {}, h("span", { class: `swatch ${kind}` }), label)));
}
