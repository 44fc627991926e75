// The panel of rounds: what /v1/rounds tells. Hidden while there were none. Ids are clients' text: shown as text alone.

import { shorten } from "./graph.js";
import { byId, bytes, element, seconds, setText, whole } from "./parts.js";

const COLUMNS = 7;

function makeRow() {
  const row = element("tr");
  for (let i = 0; i < COLUMNS; i++) row.append(element("td", i === 0 ? "id" : i === 3 ? "" : "number"));
  return row;
}

function wait(value) {
  return value < 1 ? `${Math.round(1000 * value)} ms` : seconds(value);
}

// The newest come first, so rows keep their place and change what they say.
function showRows(rounds) {
  const body = byId("rounds");
  while (body.children.length > rounds.length) body.lastChild.remove();
  rounds.forEach((round, place) => {
    const row = body.children[place] ?? body.appendChild(makeRow());
    const texts = [
      shorten(round.id, 32), `${whole.format(round.arrived)} of ${whole.format(round.members)}`, wait(round.waited_seconds),
      round.mode, whole.format(round.segments), whole.format(round.reused_tokens), whole.format(round.refreshed_tokens),
    ];
    texts.forEach((text, column) => setText(row.children[column], text));
    row.firstChild.title = round.id;
  });
}

function totalsInWords(totals) {
  const found = totals.segment_hits + totals.segment_misses;
  const share = found ? `${Math.round((100 * totals.segment_hits) / found)} % of ${whole.format(found)} segments were there` : "no segments";
  const parts = [
    share, `${whole.format(totals.reused_tokens)} tokens reused, ${whole.format(totals.refreshed_tokens)} computed anew`,
    `${whole.format(totals.segment_tokens_held)} tokens of segments held, ${bytes(totals.segment_bytes)}`,
  ];
  if (totals.dense_bytes) parts.push(`histories in ${bytes(totals.mirror_bytes)} instead of ${bytes(totals.dense_bytes)}`);
  if (totals.late_members) parts.push(`${whole.format(totals.late_members)} requests came too late`);
  return parts.join("; ");
}

export function showRounds({ data, totals }) {
  byId("rounds-panel").hidden = !(data.length || totals.waiting_members || totals.segment_hits || totals.segment_misses);
  const waiting = totals.waiting_members ? `, ${whole.format(totals.waiting_members)} waiting` : "";
  setText(byId("rounds-listed"), `${whole.format(totals.collected_rounds)} so far${waiting}`);
  setText(byId("round-totals"), totalsInWords(totals));
  byId("rounds-area").hidden = !data.length;
  showRows(data);
}
