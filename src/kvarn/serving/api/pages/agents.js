// The panel of agents: what /v1/agents tells. Names are clients' text: they go into the page as text alone.

import { isOver, makeGraph, overdue, shorten } from "./graph.js";
import { byId, element, makeBar, seconds, setText, whole } from "./parts.js";

const DRAWN = 20; // programs
const NODES = 40; // of a program
const BLOCKS = ["active", "stalled", "reserved", "loading", "pending", "cached", "free"];
const CALLS = ["kept", "offloading", "offloaded", "reserving", "uploading", "ready", "released"];
const MEANINGS = {
  active: "by requests that run", stalled: "for conversations whose tools run", reserved: "for conversations to come back to",
  loading: "by what comes back from the host", pending: "until their copies to the host are made",
  cached: "by nobody; may be found again", free: "by nobody",
};

// ---- counts ----------------------------------------------------------------------------------------------

// A list item for each name: its swatch or none, its word, its number.
function makeCounts(list, names, coloured) {
  const items = names.map((name) => {
    const item = list.appendChild(element("li"));
    if (coloured) item.append(element("i", `swatch held-${name}`));
    item.append(`${name} `);
    return [name, item, item.appendChild(element("b"))];
  });
  return (counts) => {
    for (const [name, item, number] of items) {
      setText(number, whole.format(counts[name] ?? 0));
      item.className = counts[name] ? "some" : "";
    }
  };
}

const blockBar = makeBar(...BLOCKS.map((name) => `held-${name}`));
byId("block-states").append(blockBar.bar);
const showBlockCounts = makeCounts(byId("block-counts"), BLOCKS, true);
const showCallCounts = makeCounts(byId("call-counts"), CALLS, false);
BLOCKS.forEach((name, i) => (byId("block-counts").children[i].title = `held ${MEANINGS[name]}`));

function showCounts({ blocks, calls, totals, num_blocks }) {
  const words = BLOCKS.map((name) => `${whole.format(blocks[name] ?? 0)} ${name}`).join(", ");
  blockBar.show(BLOCKS.map((name) => (blocks[name] ?? 0) / Math.max(1, num_blocks)), `${whole.format(num_blocks)} blocks: ${words}`);
  showBlockCounts(blocks);
  showCallCounts(calls);
  const { on_time_uploads, late_uploads, wasted_uploads, forecasts, forecast_error_seconds, inversions } = totals;
  const uploads = `${whole.format(on_time_uploads)} on time, ${whole.format(late_uploads)} late, ${whole.format(wasted_uploads)} wasted`;
  const off = forecasts ? `off by ${seconds(forecast_error_seconds / forecasts)} on average of ${whole.format(forecasts)}` : "none yet";
  const parts = [
    `${whole.format(totals.started)} calls so far, ${whole.format(totals.offloads)} taken off the device`,
    `brought back: ${uploads}`, `forecasts: ${off}`, `inversions: ${whole.format(inversions)}`,
  ];
  setText(byId("call-totals"), parts.join("; "));
}

// ---- what is known of a node -----------------------------------------------------------------------------

function time(value) {
  return value === null ? "unknown" : seconds(value);
}

function factsOf(node) {
  const { call, blocks } = node;
  const facts = [
    ["node", node.name], ["role", node.agent], ["request", node.request], ["state", node.state],
    ["comes after", node.after.join(", ")], ["meets others at", node.join],
    ["critical path", node.critical ? "on it" : "not on it"], ["importance", node.importance ? `${node.importance} of 10` : ""],
    ["came", node.age_seconds === null ? "" : `${seconds(node.age_seconds)} ago`],
    ["tokens", node.tokens ? whole.format(node.tokens) : ""],
    ["KV blocks", blocks.needed ? placesInWords(blocks) : ""], ["tool", node.tool],
  ];
  if (call !== null) {
    const late = overdue(node);
    facts.push(
      ["its KV is", call.state], ["predicted", time(call.expected_seconds)], ["so far", time(call.elapsed_seconds)],
      ["remaining", `${time(call.remaining_seconds)}${late ? `; ${seconds(late)} overdue` : ""}`],
      ["given up in", time(call.deadline_seconds)], ["held blocks", whole.format(call.held_blocks)],
    );
  }
  return facts.filter(([, text]) => text !== "");
}

function placesInWords({ needed, device, host, disk, reserved }) {
  const parts = [`${device} on the device`, `${host} on the host`, `${disk} on disk`, `${reserved} reserved`];
  return `${needed}: ${parts.join(", ")}`;
}

// Only what has changed is written, so that the rest stays selected.
function showFacts(list, facts) {
  while (list.children.length > facts.length) list.lastChild.remove();
  facts.forEach(([name, text], i) => {
    const row = list.children[i] ?? list.appendChild(element("div"));
    if (!row.children.length) row.append(element("dt"), element("dd"));
    setText(row.children[0], name);
    setText(row.children[1], text);
  });
}

// ---- programs --------------------------------------------------------------------------------------------

const cards = new Map();
let picked = { program: "", node: "" };
let latest = null;

function makeCard(id) {
  const card = element("article", "program");
  const title = card.appendChild(element("div", "title"));
  const name = title.appendChild(element("h3", "", shorten(id, 40)));
  name.title = id;
  const words = title.appendChild(element("span", "quiet"));
  const graph = makeGraph((node) => {
    const again = picked.program === id && picked.node === node;
    picked = again ? { program: "", node: "" } : { program: id, node };
    showPrograms(latest);
  });
  const area = card.appendChild(element("div", "scroll"));
  area.tabIndex = 0; // for who scrolls with keys
  area.setAttribute("aria-label", `graph of ${id}`);
  area.setAttribute("role", "group");
  area.append(graph.svg);
  const facts = card.appendChild(element("dl", "facts"));
  return { card, words, graph, area, facts };
}

function isLive({ nodes }) {
  return nodes.some((node) => !isOver(node));
}

// Seconds that a program has waited for the server.
function waited({ nodes }) {
  const waiting = nodes.filter(({ state }) => state === "waiting" || state === "loading");
  return waiting.reduce((most, { age_seconds }) => Math.max(most, age_seconds ?? 0), 0);
}

// What goes on, and what came last; in the order they came.
function drawnOf(nodes) {
  if (nodes.length <= NODES) return nodes;
  const ranked = nodes.map((node, i) => ({ i, rank: isOver(node) ? i - nodes.length : i }));
  const kept = ranked.toSorted((a, b) => b.rank - a.rank).slice(0, NODES);
  return kept.toSorted((a, b) => a.i - b.i).map(({ i }) => nodes[i]);
}

function showCard({ card, words, graph, facts }, program) {
  const drawn = drawnOf(program.nodes);
  const wait = waited(program);
  const parts = [`began ${seconds(program.age_seconds)} ago`];
  if (!isLive(program)) parts.push(`quiet for ${seconds(program.idle_seconds)}`);
  if (wait) parts.push(`waiting for ${seconds(wait)}`);
  if (isLive(program) && program.remaining_seconds !== null) parts.push(`about ${seconds(program.remaining_seconds)} to go`);
  if (drawn.length < program.nodes.length) parts.push(`${whole.format(program.nodes.length - drawn.length)} earlier calls not drawn`);
  setText(words, parts.join(", "));
  card.className = isLive(program) ? "program" : "program over";
  const chosen = picked.program === program.id ? picked.node : "";
  graph.show(drawn, chosen);
  const node = drawn.find(({ name }) => name === chosen);
  facts.hidden = node === undefined;
  if (node !== undefined) showFacts(facts, factsOf(node));
}

// Those with something going on come first from the server.
function chosenOf(programs) {
  if (byId("agents-order").value === "newest") return programs.slice(0, DRAWN).sort((a, b) => a.age_seconds - b.age_seconds);
  return programs.toSorted((a, b) => waited(b) - waited(a) || a.idle_seconds - b.idle_seconds).slice(0, DRAWN);
}

function showPrograms({ data, programs }) {
  const shown = chosenOf(data.filter(({ nodes }) => nodes.length));
  const ids = new Set(shown.map(({ id }) => id));
  for (const [id, { card }] of cards) {
    if (ids.has(id)) continue;
    card.remove();
    cards.delete(id);
  }
  const list = byId("programs");
  shown.forEach((program, place) => {
    if (!cards.has(program.id)) cards.set(program.id, makeCard(program.id));
    const parts = cards.get(program.id);
    const { scrollLeft, clientWidth, scrollWidth } = parts.area;
    if (list.children[place] !== parts.card) list.insertBefore(parts.card, list.children[place] ?? null);
    showCard(parts, program);
    // What goes on is on the right: whoever has not scrolled away from there sees it.
    parts.area.scrollLeft = scrollLeft + clientWidth >= scrollWidth - 2 ? parts.area.scrollWidth : scrollLeft;
  });
  const rest = programs - shown.length;
  setText(byId("programs-listed"), rest > 0 ? `${shown.length} programs, ${whole.format(rest)} more not shown` : `${programs} programs`);
  byId("no-programs").hidden = shown.length > 0;
  byId("agents-legend").hidden = !shown.length;
}

export function showAgents(answer) {
  latest = answer;
  const tracked = Object.keys(answer.blocks).length > 0;
  byId("agents-none").hidden = tracked;
  byId("agents-area").hidden = byId("agents-order-label").hidden = !tracked;
  byId("programs-listed").hidden = !tracked;
  if (!tracked) return;
  showCounts(answer);
  showPrograms(answer);
}

byId("agents-order").addEventListener("change", () => latest && showPrograms(latest));
