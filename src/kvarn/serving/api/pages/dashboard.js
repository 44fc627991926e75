// Polls /v1/streams, and /v1/agents and /v1/rounds half as often, and shows them. Text from the server goes into the page as text, never as markup.

import { showAgents } from "./agents.js";
import { ask, NeedsKey, useKey } from "./client.js";
import { byId, bytes, element, makeBar, seconds, setText, whole } from "./parts.js";
import { showRounds } from "./rounds.js";

const POLL = 500; // milliseconds between an answer and the next question
const RETRY = 2000; // after a failure
const PROGRAMS = 40; // to be told of; agents.js draws the first of them
const ROUNDS = 8; // to be shown
const SPAN = 180; // seconds that the chart shows
const FULL_BUFFER = 20; // seconds that fill a buffer's bar
const SHORT = 2, PLENTY = 10; // seconds of buffer below and above which they are called so
const STATES = ["running", "waiting", "loading"];

// ---- memory ----------------------------------------------------------------------------------------------

const TIER_BARS = { device: ["both", "both kept"], host: ["host", "host kept"], disk: ["disk", "disk kept"] };

const tiers = new Map(
  ["device", "host", "disk"].map((name) => {
    const row = byId("tiers").appendChild(element("div", "tier"));
    row.id = `tier-${name}`;
    row.append(element("span", "", name));
    const bar = makeBar(...TIER_BARS[name]);
    row.append(bar.bar);
    return [name, { bar, words: row.appendChild(element("span", "number quiet")) }];
  }),
);

function showMemory({ blocks, block_bytes, copy_bytes_per_second: copies }) {
  for (const [name, { bar, words }] of tiers) {
    const { total, used, cached } = blocks[name];
    const share = (count) => (total ? count / total : 0);
    const size = block_bytes ? `, ${bytes(used * block_bytes)}` : "";
    const text = total ? `${whole.format(used)} of ${whole.format(total)} blocks${size}` : "none";
    bar.show([share(used - cached), share(cached)], total ? `${text}; ${whole.format(cached)} kept for later` : text);
    setText(words, text);
  }
  const ways = { to_host: "to the host", from_host: "back", to_disk: "to disk", from_disk: "from it" };
  const known = Object.entries(ways).filter(([way]) => copies[way] !== null);
  setText(byId("copies"), known.map(([way, words]) => `${words} ${bytes(copies[way])}/s`).join(", "));
}

// ---- the last minutes ------------------------------------------------------------------------------------

const history = [];

function niceTop(value) {
  for (let step = 4; ; step *= 10) {
    for (const factor of [1, 2.5, 5]) if (value <= step * factor) return step * factor;
  }
}

function showHistory(counts) {
  const now = performance.now() / 1000;
  history.push({ at: now, ...counts });
  while (history[0].at < now - SPAN) history.shift();
  const top = niceTop(Math.max(...history.flatMap((point) => STATES.map((state) => point[state]))));
  setText(byId("chart-top"), whole.format(top));
  for (const state of STATES) {
    const points = history.map(
      ({ at, [state]: count }) => `${(1000 * (1 - (now - at) / SPAN)).toFixed(1)},${(100 * (1 - count / top)).toFixed(2)}`,
    );
    document.querySelector(`#chart .${state}`).setAttribute("points", points.join(" "));
  }
}

// ---- streams ---------------------------------------------------------------------------------------------

const rows = new Map();

function makeRow(id) {
  const row = element("tr");
  const cell = (className = "") => row.appendChild(element("td", className));
  const name = cell("id");
  name.title = id;
  name.textContent = id.length > 22 ? `${id.slice(0, 13)}…${id.slice(-6)}` : id;
  const state = cell().appendChild(element("span", "pill"));
  const bufferCell = cell().appendChild(element("div", "buffer"));
  const buffer = makeBar("");
  bufferCell.append(buffer.bar);
  const bufferWords = bufferCell.appendChild(element("span", "words"));
  const [rate, tokens, stalls, moves] = [cell("number"), cell("number"), cell("number"), cell("number")];
  const places = makeBar("both", "device", "host", "disk", "missing");
  cell("kv").append(places.bar);
  return { row, state, buffer, bufferWords, rate, tokens, stalls, moves, places, age: cell("number") };
}

// What a buffer is called, and what is written beside its bar.
function bufferOf({ output_tokens, slack_seconds, unread_tokens }) {
  if (output_tokens === 0) return ["none", "no token yet"];
  if (slack_seconds === 0) return ["dry", "dry"];
  const level = slack_seconds < SHORT ? "short" : slack_seconds < PLENTY ? "fine" : "plenty";
  return [level, `${seconds(slack_seconds)}, ${whole.format(unread_tokens)} unread`];
}

// Every count is that of leading blocks, so what lies where follows from the differences.
function placesOf({ needed, device, host, disk }) {
  const both = Math.min(device, Math.max(host, disk));
  const onlyHost = Math.max(0, host - device);
  const onlyDisk = Math.max(0, disk - Math.max(device, host));
  const parts = [both, device - both, onlyHost, onlyDisk];
  return [...parts, Math.max(0, needed - parts.reduce((sum, part) => sum + part, 0))];
}

function showRow(parts, stream) {
  const state = stream.paused ? "paused" : stream.state;
  setText(parts.state, state);
  parts.state.className = `pill ${state}`;
  const [level, words] = bufferOf(stream);
  parts.buffer.parts[0].className = level;
  parts.buffer.show([level === "dry" ? 1 : Math.min(1, stream.slack_seconds / FULL_BUFFER)], words);
  setText(parts.bufferWords, words);
  setText(parts.rate, `${whole.format(Math.round(10 * stream.rate) / 10)}/s`);
  setText(parts.tokens, `${whole.format(stream.prompt_tokens)} + ${whole.format(stream.output_tokens)}`);
  setText(parts.stalls, stream.stalls ? `${whole.format(stream.stalls)} (${seconds(stream.stall_seconds)})` : "–");
  setText(parts.moves, stream.preemptions ? whole.format(stream.preemptions) : "–");
  setText(parts.age, seconds(stream.age_seconds));
  const { blocks } = stream;
  const needed = Math.max(1, blocks.needed, blocks.device);
  const label = `${blocks.needed} blocks: ${blocks.device} on the device, ${blocks.host} on the host, ${blocks.disk} on disk`;
  parts.places.show(placesOf(blocks).map((count) => count / needed), label);
}

function showStreams({ data, streams: { total } }) {
  const shown = byId("order").value === "arrival" ? data.toSorted((a, b) => b.age_seconds - a.age_seconds) : data;
  const body = byId("streams");
  const ids = new Set(shown.map(({ id }) => id));
  for (const [id, { row }] of rows) {
    if (ids.has(id)) continue;
    row.remove();
    rows.delete(id);
  }
  shown.forEach((stream, place) => {
    if (!rows.has(stream.id)) rows.set(stream.id, makeRow(stream.id));
    const parts = rows.get(stream.id);
    showRow(parts, stream);
    if (body.children[place] !== parts.row) body.insertBefore(parts.row, body.children[place] ?? null);
  });
  setText(byId("listed"), data.length < total ? `the ${data.length} most urgent of ${whole.format(total)}` : whole.format(total));
  byId("streams-area").hidden = !data.length;
  byId("empty").hidden = data.length > 0;
}

// ---- the loop --------------------------------------------------------------------------------------------

function show(answer) {
  byId("board").hidden = false;
  byId("key-form").hidden = true;
  setText(byId("model"), answer.model);
  const { streams: counts } = answer;
  setText(byId("speed"), whole.format(Math.round(answer.tokens_per_second)));
  for (const name of [...STATES, "paused"]) setText(byId(name), whole.format(counts[name]));
  showMemory(answer);
  showHistory(counts);
  showStreams(answer);
}

function say(text, kind) {
  setText(byId("status"), text);
  byId("status").className = `status ${kind}`;
}

let timer = 0;
let turn = 0;

async function poll() {
  let pause = POLL;
  try {
    if (!document.hidden) {
      show(await ask("v1/streams"));
      if (turn++ % 2 === 0) {
        showAgents(await ask(`v1/agents?limit=${PROGRAMS}`));
        showRounds(await ask(`v1/rounds?limit=${ROUNDS}`));
      }
      say("live", "good");
    }
  } catch (error) {
    say(error.message, "bad");
    pause = RETRY;
    if (error instanceof NeedsKey) {
      byId("key-form").hidden = false;
      return; // until there is a key
    }
  }
  timer = setTimeout(poll, pause);
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
  byId("key").value = "";
  clearTimeout(timer);
  poll();
});
setText(byId("span"), `${SPAN / 60} minutes`);
setText(
  byId("example"),
  `curl -N ${new URL("v1/completions", location.href)} -H 'Content-Type: application/json' \\\n` +
    `  -d '{"prompt": "Once upon a time", "max_tokens": 300, "stream": true}'`,
);
poll();
