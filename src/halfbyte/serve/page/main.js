// The page: four screens, one of them at a time, and what happens in the server, once a second.

import { events, json } from "./api.js";
import { chatScreen } from "./chat.js";
import { h, icon } from "./dom.js";
import { memoryScreen } from "./memory.js";
import { modelScreen } from "./model.js";
import { speedScreen } from "./speed.js";

const SCREENS = { chat: chatScreen, memory: memoryScreen, speed: speedScreen, model: modelScreen };
const KEPT = 300;

const world = { info: null, history: [], listeners: new Set() };
const view = document.getElementById("view");
let leave = () => {};

function show() {
  const name = location.hash.slice(1) in SCREENS ? location.hash.slice(1) : "chat";
  for (const link of document.querySelectorAll(".tabs a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  leave();
  world.listeners.clear();
  document.title = `${name[0].toUpperCase()}${name.slice(1)} · ${world.info.model} · halfbyte`;
  view.className = name;
  leave = SCREENS[name](view, world) ?? (() => {});
}

async function loading() {
  for (;;) {
    try {
      const info = await json("/api/info");
      if (info.state !== "loading") return info;
      view.replaceChildren(h("div", { class: "loading" }, h("h1", {}, info.model), h("progress", { max: 1, value: info.loaded, "aria-label": "Loading" }), h("p", {}, `loading, ${Math.round(100 * info.loaded)} %`)));
    } catch (error) {
      view.replaceChildren(h("div", { class: "loading" }, h("h1", {}, "The server does not answer"), h("p", {}, error.message)));
    }
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
}

async function watch() {
  for (;;) {
    try {
      for await (const event of events("/api/events")) {
        event.at = Date.now();
        world.history.push(event);
        if (world.history.length > KEPT) world.history.shift();
        tell(event);
        for (const listener of world.listeners) listener(event);
      }
    } catch {
      // told below, and tried again
    }
    document.getElementById("status").replaceChildren(h("span", { class: "dot off" }), "not connected");
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

function tell(event) {
  const { running = 0, waiting = 0 } = event.engine ?? {};
  const rate = event.tokens_per_second;
  const words = running ? `${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s` : "ready";
  const more = running + waiting > 1 ? ` · ${running} running${waiting ? `, ${waiting} waiting` : ""}` : "";
  document.getElementById("status").replaceChildren(h("span", { class: running ? "dot busy" : "dot" }), h("span", { class: "words" }, words + more));
}

function theme() {
  const button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const now = () => localStorage.getItem("halfbyte-theme") ?? (dark.matches ? "dark" : "light");
  const apply = () => {
    document.documentElement.dataset.theme = now();
    button.replaceChildren(icon(now() === "dark" ? "sun" : "moon"));
  };
  button.addEventListener("click", () => {
    localStorage.setItem("halfbyte-theme", now() === "dark" ? "light" : "dark");
    apply();
  });
  dark.addEventListener("change", apply);
  apply();
}

theme();
world.info = await loading();
addEventListener("hashchange", show);
show();
watch();
