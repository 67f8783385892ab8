// Renders Markdown with the page's own code over a document that only records what is made:
// sources as a JSON list on stdin, elements as JSON on stdout.

import { pathToFileURL } from "node:url";

class Element {
  constructor(tag) { Object.assign(this, { tag, attributes: {}, children: [], handlers: [] }); }
  setAttribute(name, value) { this.attributes[name] = value; }
  addEventListener(name) { this.handlers.push(name); }
  append(...children) { this.children.push(...children); }
  set innerHTML(_) { throw new Error("innerHTML"); }
}

globalThis.document = { createElement: (tag) => new Element(tag), createElementNS: (_, tag) => new Element(tag) };
const { markdown } = await import(pathToFileURL(process.argv[2]));
let text = "";
for await (const chunk of process.stdin) text += chunk;
const plain = (it) => (typeof it === "string" ? it : { tag: it.tag, attributes: it.attributes, children: it.children.map(plain) });
process.stdout.write(JSON.stringify(JSON.parse(text).map((source) => markdown(source).map(plain))));
