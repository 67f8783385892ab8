// The model: what it is, how it is stored, and how to use it from elsewhere.

import { copied, count, h, icon, length } from "./dom.js";

export function modelScreen(view, { info }) {
  const rows = {
    Family: info.family,
    Parameters: count(info.parameters),
    Layers: `${info.layers} of width ${count(info.hidden)}`,
    Vocabulary: `${count(info.vocabulary)} tokens`,
    Context: `${length(info.context)} of ${length(info.trained_context)}`,
    Stored: Object.entries(info.schemes).map(([scheme, many]) => `${scheme} (${many})`).join(", "),
    "Runs on": info.ops,
    "At once": `${info.parallel}, and ${info.limits.waiting} may wait`,
    Thinks: info.can_think ? "yes, when asked to" : "no switch in its template",
    Tools: info.tools ? "yes" : "its template has no place for them",
    Adapters: info.adapters.join(", ") || "none",
    Sampling: Object.entries(info.sampling).map(([knob, value]) => `${knob} ${value}`).join(", "),
    halfbyte: info.version,
  };
  const base = `${location.origin}/v1`;
  const docker = base.replace(/\/\/(127\.0\.0\.1|localhost)/, "//host.docker.internal");
  view.replaceChildren(h("div", { class: "page" },
    h("h1", {}, info.model),
    info.notes.length ? h("ul", { class: "notes" }, info.notes.map((it) => h("li", {}, it))) : null,
    h("section", { class: "card" }, h("dl", {}, Object.entries(rows).map(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))]))),
    h("section", { class: "card" }, h("h2", {}, "From elsewhere"),
      snippet("curl", `curl ${base}/chat/completions \\\n  -H 'Content-Type: application/json' \\\n  -d '{"messages": [{"role": "user", "content": "Hello"}]}'`),
      snippet("Python, the openai package", `from openai import OpenAI\n\nclient = OpenAI(base_url="${base}", api_key="none")\nanswer = client.chat.completions.create(\n    model="${info.model}",\n    messages=[{"role": "user", "content": "Hello"}],\n)\nprint(answer.choices[0].message.content)`),
      snippet("Dify: Model Provider, OpenAI-API-compatible", `Model Name                  ${info.model}\nAPI endpoint URL            ${docker}\nCompletion mode             Chat\nModel context size          ${info.context}\nUpper bound for max tokens  ${Math.min(info.context, 4096)}\nFunction calling            ${info.tools ? "Tool Call" : "Not Support"}\nDelimiter                   \\n\\n`),
      snippet("Claude Code", `ANTHROPIC_BASE_URL=${location.origin} ANTHROPIC_AUTH_TOKEN=none claude --model ${info.model}`),
      snippet("llm", `llm openai endpoint ${base} --models`)),
    info.template ? h("details", { class: "card" }, h("summary", {}, "Chat template"), h("pre", { tabindex: 0 }, info.template)) : null));
}

function snippet(name, text) {
  const button = h("button", { class: "icon", type: "button", "aria-label": `Copy: ${name}`, title: "Copy", onclick: () => copied(text, button) }, icon("copy"));
  return h("figure", { class: "code" }, h("figcaption", {}, h("span", {}, name), button), h("pre", { tabindex: 0 }, h("code", {}, text)));
}
