// What a model wrote, as elements. Only elements made here come out, and text is a text node, so
// whatever stands in the source is seen and never run. Links are the web's; a picture is a link.

import { copied, h, icon } from "./dom.js";

export function markdown(source) {
  return blocks(source.replace(/\r\n?/g, "\n").split("\n"), 0);
}

const FENCE = /^\s{0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^\s{0,3}>\s?/;
const DELIMITER = /^\s*\|?(\s*:?-+:?\s*\|)+\s*:?-*:?\s*$/;
const DEEPEST = 12;

function blocks(lines, depth) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (!line.trim()) {
      at += 1;
    } else if (fence) {
      const end = closing(lines, at + 1, fence[1]);
      found.push(code(lines.slice(at + 1, end).join("\n"), fence[2]));
      at = end + 1;
    } else if (heading) {
      found.push(h(`h${Math.min(6, heading[1].length + 2)}`, {}, inline(heading[2])));
      at += 1;
    } else if (RULE.test(line)) {
      found.push(h("hr"));
      at += 1;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      const end = until(lines, at, (it) => QUOTE.test(it));
      found.push(h("blockquote", {}, blocks(lines.slice(at, end).map((it) => it.replace(QUOTE, "")), depth + 1)));
      at = end;
    } else if (ITEM.test(line) && depth < DEEPEST) {
      const end = until(lines, at, (it, next) => ITEM.test(it) || /^\s{2,}\S/.test(it) || (!it.trim() && (ITEM.test(next) || /^\s{2,}\S/.test(next))));
      found.push(list(lines.slice(at, end), depth));
      at = end;
    } else if (line.includes("|") && DELIMITER.test(lines[at + 1] ?? "")) {
      const end = until(lines, at, (it) => it.includes("|"));
      found.push(table(lines.slice(at, end)));
      at = end;
    } else {
      const end = until(lines, at, (it, _, first) => first || (it.trim() && !FENCE.test(it) && !HEADING.test(it) && !QUOTE.test(it) && !ITEM.test(it) && !RULE.test(it)));
      found.push(h("p", {}, inline(lines.slice(at, end).join("\n"))));
      at = end;
    }
  }
  return found;
}

function until(lines, start, goesOn) {
  let at = start;
  while (at < lines.length && goesOn(lines[at], lines[at + 1] ?? "", at === start)) at += 1;
  return Math.max(at, start + 1);
}

function closing(lines, start, fence) {
  let at = start;
  while (at < lines.length && !lines[at].trim().startsWith(fence)) at += 1;
  return at;
}

function code(text, language) {
  const button = h("button", { class: "icon", type: "button", "aria-label": "Copy the code", title: "Copy", onclick: () => copied(text, button) }, icon("copy"));
  return h("figure", { class: "code" }, h("figcaption", {}, h("span", {}, language || "text"), button), h("pre", { tabindex: "0" }, h("code", {}, text)));
}

function list(lines, depth) {
  const base = ITEM.exec(lines[0])[1].length;
  const ordered = /\d/.test(ITEM.exec(lines[0])[2]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= base + 1) items.push([item[3]]);
    else items.at(-1).push(line.slice(Math.min(base + 2, line.length - line.trimStart().length)));
  }
  const start = ordered ? Number.parseInt(ITEM.exec(lines[0])[2], 10) : null;
  return h(ordered ? "ol" : "ul", { start }, items.map((rows) => {
    const rest = rows.slice(1).some((row) => row.trim());
    return h("li", {}, rest ? blocks(rows, depth + 1) : inline(rows[0]));
  }));
}

function cells(row) {
  return row.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((it) => it.trim().replace(/\\\|/g, "|"));
}

function table(lines) {
  const sides = cells(lines[1]).map((it) => (it.endsWith(":") ? (it.startsWith(":") ? "middle" : "right") : null));
  const row = (line, tag) => h("tr", {}, cells(line).map((it, index) => h(tag, { class: sides[index] }, inline(it))));
  return h("div", { class: "table", tabindex: "0" }, h("table", {}, h("thead", {}, row(lines[0], "th")), h("tbody", {}, lines.slice(2).map((it) => row(it, "td")))));
}

const INLINE = /(`+)([\s\S]+?)\1(?!`)|\*\*(?=\S)([\s\S]+?\S?)\*\*|__(?=\S)([\s\S]+?\S?)__|\*(?=[^\s*])([^*]+?)\*|(?<![\w])_(?=[^\s_])([^_]+?)_(?![\w])|~~(?=\S)([\s\S]+?)~~|!?\[([^\]\n]{0,500})\]\(\s*<?([^\s)>]{1,2000})>?(?:\s+"[^"]*")?\s*\)|(https?:\/\/[^\s<>"'`)\]]{1,2000})|\\([\\`*_{}[\]()#+.!|~>-])/g;

function inline(text, depth = 0) {
  if (depth > DEEPEST) return [text];
  const found = [];
  let last = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > last) found.push(text.slice(last, match.index));
    last = match.index + match[0].length;
    const [, tick, coded, strong, strong2, weak, weak2, struck, label, address, bare, escaped] = match;
    if (tick) found.push(h("code", {}, coded.replace(/^ (.*) $/, "$1")));
    else if (strong ?? strong2) found.push(h("strong", {}, inline(strong ?? strong2, depth + 1)));
    else if (weak ?? weak2) found.push(h("em", {}, inline(weak ?? weak2, depth + 1)));
    else if (struck) found.push(h("del", {}, inline(struck, depth + 1)));
    else if (address) found.push(link(address, label || address));
    else if (bare) {
      const end = /[.,;:!?]+$/.exec(bare)?.[0] ?? "";
      found.push(link(bare.slice(0, bare.length - end.length), bare.slice(0, bare.length - end.length)), end);
    } else found.push(escaped);
  }
  if (last < text.length) found.push(text.slice(last));
  return found;
}

function link(address, label) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return label;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return label;
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, label);
}
