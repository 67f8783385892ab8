// The chat: a conversation with the model, and how each answer came.

import { events } from "./api.js";
import { copied, count, h, icon, iconButton, length } from "./dom.js";
import { markdown } from "./markdown.js";
import * as store from "./store.js";

const FRESH = () => ({ id: crypto.randomUUID?.() ?? String(Math.random()), title: "", changed: Date.now(), messages: [], settings: {} });
const DRAW_MS = 60;

let chat = FRESH();
let running = null;
let colours = localStorage.getItem("halfbyte-colours") === "on";

export function chatScreen(view, world) {
  const log = h("div", { class: "log", role: "log", "aria-live": "polite", "aria-label": "Conversation" });
  const input = h("textarea", { rows: 1, placeholder: `Message ${world.info.model}`, "aria-label": "Your message", enterkeyhint: "send" });
  const send = h("button", { class: "send", type: "submit", "aria-label": "Send" }, icon("send"));
  const gauge = h("span", { class: "gauge", title: "Of the context, what the conversation takes" });
  const side = h("aside", { class: "side", "aria-label": "Conversations" });
  const panel = settings(world, () => store.save(chat));
  const form = h("form", { class: "compose", onsubmit: (event) => { event.preventDefault(); running ? running.abort() : submit(); } }, input, send);
  const tools = h("div", { class: "tools" },
    iconButton("list", "Conversations", () => side.classList.toggle("open")),
    iconButton("tune", "Settings", () => panel.classList.toggle("open")),
    h("label", { class: "switch" }, h("input", { type: "checkbox", checked: colours, onchange: (event) => { colours = event.target.checked; localStorage.setItem("halfbyte-colours", colours ? "on" : "off"); draw(); } }), h("span", {}, "drafted tokens")),
    gauge);
  view.replaceChildren(side, h("section", { class: "talk", onclick: (event) => { if (!event.target.closest(".tools .icon")) shut(); } }, log, h("div", { class: "foot" }, panel, form, tools)));

  const grow = () => { input.style.height = "auto"; input.style.height = `${Math.min(input.scrollHeight, 220)}px`; };
  const near = () => log.scrollHeight - log.scrollTop - log.clientHeight < 80;

  function draw() {
    const messages = chat.messages.map((message, index) => row(message, index));
    log.replaceChildren(...(messages.length ? messages : [welcome()]));
    log.classList.toggle("coloured", colours);
    log.scrollTop = log.scrollHeight;
    busy();
  }

  function busy() {
    send.replaceChildren(icon(running ? "stop" : "send"));
    send.setAttribute("aria-label", running ? "Stop" : "Send");
    const used = chat.messages.findLast((it) => it.used)?.used ?? 0;
    gauge.textContent = used ? `${count(used)} of ${length(world.info.context)} tokens` : "";
  }

  function welcome() {
    const ideas = ["Explain why the sky is dark at night.", "Write a haiku about memory.", "Plan a simple dinner for four."];
    return h("div", { class: "welcome" },
      h("img", { src: "/page/icon.svg", alt: "", width: 56, height: 56 }),
      h("h1", {}, world.info.model),
      h("p", {}, `${(world.info.parameters / 1e9 >= 1 ? `${(world.info.parameters / 1e9).toFixed(1)} billion` : `${Math.round(world.info.parameters / 1e6)} million`)} parameters, ${length(world.info.context)} tokens of context, on this machine.`),
      h("div", { class: "ideas" }, ideas.map((idea) => h("button", { type: "button", onclick: () => { input.value = idea; grow(); input.focus(); } }, idea))));
  }

  function row(message, index) {
    const body = h("div", { class: "body" });
    const element = h("article", { class: `message ${message.role}`, "aria-label": message.role === "user" ? "You" : world.info.model }, body);
    fill(body, message);
    const actions = message.role === "user"
      ? [iconButton("edit", "Edit and ask again", () => edit(index))]
      : [iconButton("copy", "Copy", (event) => copied(message.content, event.currentTarget)), iconButton("again", "Answer again", () => again(index))];
    element.append(h("div", { class: "actions" }, actions, h("span", { class: "numbers" }, numbers(message))));
    return element;
  }

  function fill(body, message) {
    const parts = [];
    if (message.thought) {
      parts.push(h("details", { class: "thought", open: message.open ?? false, ontoggle: (event) => { message.open = event.currentTarget.open; } },
        h("summary", {}, message.content || message.done ? "Thought" : "Thinking", h("span", { class: "muted" }, ` ${count(message.thought.length)} characters`)), h("p", {}, message.thought)));
    }
    if (message.role === "user") parts.push(h("p", {}, message.content));
    else if (colours && message.pieces?.length) parts.push(h("p", { class: "pieces" }, message.pieces.map(([text, drafted]) => (drafted ? h("span", { class: "drafted" }, text) : text))));
    else parts.push(...markdown(message.content));
    for (const call of message.calls ?? []) parts.push(card(call));
    if (message.error) parts.push(h("p", { class: "error", role: "alert" }, message.error));
    if (message.role !== "user" && !message.done && !message.content && !message.thought) parts.push(h("span", { class: "waiting", "aria-label": "Waiting" }));
    body.replaceChildren(...parts);
  }

  function card(call) {
    let pretty = call.function.arguments;
    try { pretty = JSON.stringify(JSON.parse(pretty), null, 2); } catch { /* as it is */ }
    return h("div", { class: "call" }, h("strong", {}, call.function.name), h("pre", {}, pretty));
  }

  async function submit() {
    const text = input.value.trim();
    if (!text) return;
    input.value = "";
    grow();
    chat.messages.push({ role: "user", content: text });
    chat.title ||= text.slice(0, 60);
    await answer();
  }

  async function answer() {
    const { settings } = chat;
    const message = { role: "assistant", content: "", thought: "", pieces: [], calls: [], tokens: 0, began: performance.now() };
    const history = chat.messages.filter((it) => !it.error).map(({ role, content }) => ({ role, content }));
    chat.messages.push(message);
    running = new AbortController();
    draw();
    const body = {
      messages: [...(settings.system ? [{ role: "system", content: settings.system }] : []), ...history],
      stream: true, stream_options: { include_usage: true }, timings_per_token: true,
      ...(settings.model ? { model: settings.model } : {}),
      ...(world.info.can_think ? { enable_thinking: settings.think ?? false } : {}),
      ...Object.fromEntries(["temperature", "top_p", "max_tokens", "seed"].filter((it) => Number.isFinite(settings[it])).map((it) => [it, settings[it]])),
    };
    let drawn = 0;
    try {
      for await (const chunk of events("/v1/chat/completions", body, running.signal)) {
        take(message, chunk);
        if (performance.now() - drawn > DRAW_MS) { drawn = performance.now(); redraw(message); }
      }
    } catch (error) {
      if (error.name !== "AbortError") message.error = error.message;
    }
    message.done = true;
    running = null;
    chat.changed = Date.now();
    redraw(message);
    busy();
    await store.save(chat);
    list();
  }

  function take(message, chunk) {
    if (chunk.error) message.error = chunk.error.message;
    const delta = chunk.choices?.[0]?.delta ?? {};
    message.tokens += chunk.drafted?.length ?? 0;
    message.first ??= chunk.drafted ? performance.now() - message.began : undefined;
    if (delta.content) { message.content += delta.content; message.pieces.push([delta.content, chunk.drafted?.every(Boolean) && chunk.drafted.length > 0]); }
    if (delta.reasoning_content) message.thought += delta.reasoning_content;
    if (delta.tool_calls) message.calls.push(...delta.tool_calls);
    if (chunk.timings) message.timings = chunk.timings;
    if (chunk.usage) message.used = chunk.usage.total_tokens;
  }

  function redraw(message) {
    const index = chat.messages.indexOf(message);
    const element = log.children[index];
    if (!element?.classList.contains("message")) return;
    const follow = near();
    fill(element.querySelector(".body"), message);
    element.querySelector(".numbers").textContent = numbers(message);
    if (follow) log.scrollTop = log.scrollHeight;
  }

  function numbers(message) {
    if (message.role === "user") return "";
    const found = message.timings;
    if (!found) {
      const seconds = (performance.now() - message.began - (message.first ?? 0)) / 1000;
      return message.done || message.tokens < 2 ? "" : `${(message.tokens / seconds).toFixed(1)} tokens/s`;
    }
    const parts = [`${(found.predicted_per_second ?? 0).toFixed(1)} tokens/s`, `first after ${Math.round(found.first_ms)} ms`, `prompt ${count(found.cache_n + found.prompt_n)}${found.cache_n ? ` (${count(found.cache_n)} kept)` : ""}`];
    if (found.draft_n) parts.push(`drafts ${found.draft_n_accepted}/${found.draft_n}`, `${found.tokens_per_round.toFixed(2)} tokens/round`);
    return parts.join(" · ");
  }

  async function again(index) {
    if (running) return;
    chat.messages = chat.messages.slice(0, index);
    await answer();
  }

  function edit(index) {
    if (running) return;
    input.value = chat.messages[index].content;
    chat.messages = chat.messages.slice(0, index);
    draw();
    grow();
    input.focus();
  }

  function take_up(found) {
    running?.abort();
    chat = found;
    view.querySelector(".panel").replaceWith(settings(world, () => store.save(chat)));
    side.classList.remove("open");
    draw();
    list();
    input.focus();
  }

  async function list() {
    const chats = await store.all();
    side.replaceChildren(
      h("button", { class: "new", type: "button", onclick: () => take_up(FRESH()) }, icon("plus"), "New conversation"),
      h("ul", {}, chats.map((it) => h("li", { class: it.id === chat.id ? "current" : null },
        h("button", { type: "button", onclick: () => take_up(it) }, it.title || "Untitled"),
        iconButton("trash", "Delete", async () => { await store.remove(it.id); if (it.id === chat.id) take_up(FRESH()); else list(); })))));
  }

  input.addEventListener("input", grow);
  input.addEventListener("keydown", (event) => {
    const phone = matchMedia("(pointer: coarse)").matches;
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !phone) { event.preventDefault(); if (!running) submit(); }
    if (event.key === "ArrowUp" && !input.value && !running) { const last = chat.messages.findLastIndex((it) => it.role === "user"); if (last >= 0) { event.preventDefault(); edit(last); } }
  });
  const shut = () => { const open = side.classList.contains("open"); side.classList.remove("open"); return open; };
  const keys = (event) => {
    if (event.key === "Escape" && !shut()) running?.abort();
    if (event.key === "/" && !document.activeElement?.closest("input, textarea, select")) { event.preventDefault(); input.focus(); }
    if (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); take_up(FRESH()); }
  };
  addEventListener("keydown", keys);
  draw();
  list();
  if (!matchMedia("(pointer: coarse)").matches) input.focus();
  return () => removeEventListener("keydown", keys);
}

function settings(world, changed) {
  const { settings: now } = chat;
  const own = world.info.sampling;
  const number = (name, label, step, placeholder) => h("label", {}, label, h("input", { type: "number", step, min: 0, placeholder, value: now[name] ?? "", onchange: (event) => { now[name] = event.target.value === "" ? undefined : Number(event.target.value); changed(); } }));
  return h("div", { class: "panel" },
    h("label", { class: "wide" }, "System message", h("textarea", { rows: 2, value: now.system ?? "", onchange: (event) => { now.system = event.target.value; changed(); } })),
    world.info.adapters.length ? h("label", {}, "Adapter", h("select", { onchange: (event) => { now.model = event.target.value || undefined; changed(); } }, h("option", { value: "" }, "none"), world.info.adapters.map((it) => h("option", { value: it, selected: it === now.model }, it)))) : null,
    number("temperature", "Temperature", 0.1, own.temperature ?? ""),
    number("top_p", "Top p", 0.05, own.top_p ?? ""),
    number("max_tokens", "Most tokens", 1, "to the end"),
    number("seed", "Seed", 1, "any"),
    world.info.can_think ? h("label", { class: "switch" }, h("input", { type: "checkbox", checked: now.think ?? false, onchange: (event) => { now.think = event.target.checked; changed(); } }), h("span", {}, "Think first")) : null);
}
