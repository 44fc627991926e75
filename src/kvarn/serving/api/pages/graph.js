// One program drawn as a graph: model calls are boxes, what waits for what are lines.

import { layout } from "./layout.js";
import { seconds, setText } from "./parts.js";

const WIDTH = 136, NARROW = 100; // pixels of a column with something going on, and of one that is over
const HEIGHT = 48, ROW = 60, GAP = 30, EDGE = 4;
const BAR = { x: 9, device: 38, host: 42, height: 3 };
const SVG = "http://www.w3.org/2000/svg";

function shape(tag, className, attributes = {}) {
  const made = document.createElementNS(SVG, tag);
  if (className) made.setAttribute("class", className);
  set(made, attributes);
  return made;
}

// Sets what has changed, so that a graph in which nothing happens costs nothing to show again.
function set(target, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    const text = String(value);
    if (target.getAttribute(name) !== text) target.setAttribute(name, text);
  }
}

export function shorten(text, most) {
  const letters = [...text];
  if (letters.length <= most) return text;
  const tail = Math.floor((most - 1) / 3);
  return `${letters.slice(0, most - 1 - tail).join("")}…${letters.slice(-tail).join("")}`;
}

export function isOver(node) {
  return node.state === "ended";
}

// Seconds that a running tool is past its forecast; 0 for all others.
export function overdue({ state, call }) {
  if (state !== "calling" || call === null || call.elapsed_seconds === null || call.expected_seconds === null) return 0;
  return Math.max(0, call.elapsed_seconds - call.expected_seconds);
}

// What a node is called: as its client does, else by its role, else by its request.
function nameOf({ name, agent, request }) {
  return name !== request ? name : agent || request;
}

// The state in words; the tool's name in so many letters that the words fit into a box, or whole.
function stateOf(node, whole) {
  const { state, tool, call } = node;
  const named = (letters) => (whole ? tool : shorten(tool, letters)) || "tool";
  if (state !== "calling") return state === "retained" ? "kept for later" : state;
  if (!call?.expected_seconds || call.elapsed_seconds === null) return named(16);
  const late = overdue(node);
  if (late) return `${named(7)} ${seconds(late)} over`;
  return `${named(7)} ${Math.floor(call.elapsed_seconds)} of ${seconds(call.expected_seconds)}`;
}

// ---- a node ----------------------------------------------------------------------------------------------

function makeNode(pick) {
  const group = shape("g", "node", { role: "button", tabindex: 0 });
  const parts = {
    group,
    tip: shape("title"),
    box: shape("rect", "box", { height: HEIGHT, rx: 8 }),
    name: shape("text", "name", { x: 9, y: 17 }),
    state: shape("text", "state", { x: 9, y: 31 }),
    rails: ["device", "host"].map((row) => shape("rect", "rail", { x: BAR.x, y: BAR[row], height: BAR.height })),
    device: shape("rect", "device", { x: BAR.x, y: BAR.device, height: BAR.height }),
    coming: shape("rect", "reserved", { y: BAR.device, height: BAR.height }),
    host: shape("rect", "host", { x: BAR.x, y: BAR.host, height: BAR.height }),
    track: shape("circle", "track", { cy: 16, r: 7 }),
    ring: shape("circle", "ring", { cy: 16, r: 7, pathLength: 100 }),
    mark: shape("path", "mark"),
  };
  group.append(...Object.values(parts).flat().slice(1));
  group.addEventListener("click", pick);
  group.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    pick();
  });
  return parts;
}

function showNode(parts, node, { x, y, width, picked }) {
  const late = overdue(node);
  const kinds = ["node", node.state];
  if (node.critical) kinds.push("critical");
  if (late) kinds.push("overdue");
  if (picked) kinds.push("picked");
  const name = nameOf(node);
  const label = `${name}${node.agent && node.agent !== name ? ` (${node.agent})` : ""}: ${stateOf(node, true)}`;
  set(parts.group, {
    class: kinds.join(" "), transform: `translate(${x} ${y})`, "aria-label": label, "aria-pressed": picked,
  });
  setText(parts.tip, label);
  set(parts.box, { width });
  setText(parts.name, shorten(name, width === WIDTH ? (node.state === "calling" ? 12 : 15) : 10));
  setText(parts.state, stateOf(node, false));
  showPlaces(parts, node, width - 2 * BAR.x);
  const share = node.call?.expected_seconds ? Math.min(1, node.call.elapsed_seconds / node.call.expected_seconds) : 0;
  for (const circle of [parts.track, parts.ring]) set(circle, { cx: width - 15 });
  set(parts.ring, { "stroke-dasharray": `${(100 * share).toFixed(1)} 100`, transform: `rotate(-90 ${width - 15} 16)` });
  set(parts.mark, { d: `M${width - 15} 12.5v4.5m0 2v1` });
}

// Above what the device has of the conversation, and what is reserved there or on its way; below what the host has.
function showPlaces(parts, { state, call, blocks: { needed, device, host, reserved } }, width) {
  const all = Math.max(1, needed, device, host);
  const long = (count) => ((width * count) / all).toFixed(1);
  for (const rail of parts.rails) set(rail, { width });
  const moving = state === "loading" || call?.state === "uploading" || call?.state === "offloading";
  const missing = Math.max(0, all - device);
  const coming = Math.min(missing, state === "loading" ? missing : reserved);
  set(parts.device, { width: long(device), class: call?.state === "offloading" ? "device moving" : "device" });
  set(parts.coming, { x: BAR.x + Number(long(device)), width: long(coming), class: moving ? "moving" : "reserved" });
  set(parts.host, { width: long(host) });
}

// ---- the graph -------------------------------------------------------------------------------------------

// `pick(name)` is called with the node that was clicked; `show(nodes, picked)` draws.
export function makeGraph(pick) {
  const svg = shape("svg", "graph", { role: "group", "aria-label": "model calls" });
  const lines = svg.appendChild(shape("g", "lines"));
  const boxes = svg.appendChild(shape("g"));
  const drawn = new Map();
  return {
    svg,
    show(nodes, picked) {
      const { places, edges } = layout(nodes);
      const columns = columnsOf(nodes, places);
      const at = places.map(({ column, row }) => ({ ...columns[column], y: EDGE + row * ROW }));
      const names = new Set(nodes.map(({ name }) => name));
      for (const [name, { group }] of drawn) {
        if (names.has(name)) continue;
        group.remove();
        drawn.delete(name);
      }
      nodes.forEach((node, i) => {
        if (!drawn.has(node.name)) drawn.set(node.name, makeNode(() => pick(node.name)));
        const parts = drawn.get(node.name);
        showNode(parts, node, { ...at[i], picked: node.name === picked });
        if (boxes.children[i] !== parts.group) boxes.insertBefore(parts.group, boxes.children[i] ?? null);
      });
      showLines(lines, edges, at, nodes);
      const last = columns.at(-1);
      const width = last.x + last.width + EDGE;
      const height = at.reduce((lowest, { y }) => Math.max(lowest, y), 0) + HEIGHT + EDGE;
      set(svg, { width, height, viewBox: `0 0 ${width} ${height}` });
    },
  };
}

// Where each column begins and how wide it is: narrow where all is over.
function columnsOf(nodes, places) {
  const columns = [];
  places.forEach(({ column }, i) => {
    columns[column] ??= { x: 0, width: NARROW };
    if (!isOver(nodes[i])) columns[column].width = WIDTH;
  });
  columns.reduce((x, column) => {
    column.x = x;
    return x + column.width + GAP;
  }, EDGE);
  return columns;
}

function showLines(lines, edges, at, nodes) {
  while (lines.children.length > edges.length) lines.lastChild.remove();
  edges.forEach(([from, to], i) => {
    const line = lines.children[i] ?? lines.appendChild(shape("path"));
    const x = at[from].x + at[from].width, y = at[from].y + HEIGHT / 2;
    const endX = at[to].x, endY = at[to].y + HEIGHT / 2;
    const bend = Math.min(endX - x, 2 * GAP) / 2;
    const critical = nodes[from].critical && nodes[to].critical;
    set(line, { d: `M${x} ${y}C${x + bend} ${y} ${endX - bend} ${endY} ${endX} ${endY}`, class: critical ? "critical" : "" });
  });
}
