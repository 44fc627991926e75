// Places for the nodes of a program: columns by depth, rows by order.

// nodes: [{ name, after: [name, ...] }, ...] in the order they came. Gives places: [{ column, row }, ...] of these, from 0,
// and edges: [[from, to], ...] as indices. Edges lead from earlier nodes to later ones alone: there is no cycle, whatever
// clients say. Those are left out whose ends are joined by a longer way. Two nodes of a column are at least 1 row apart; a
// node is near the middle of those it comes after.
export function layout(nodes) {
  const indices = new Map(nodes.map(({ name }, index) => [name, index]));
  const places = [];
  const edges = [];
  const columns = [];
  const ancestors = [];
  nodes.forEach(({ after }, index) => {
    const named = [...new Set(after)].map((name) => indices.get(name)).filter((parent) => parent < index);
    const above = new Set(named.flatMap((parent) => [...ancestors[parent]]));
    const parents = named.filter((parent) => !above.has(parent));
    ancestors.push(new Set([...above, ...parents]));
    const column = parents.reduce((deepest, parent) => Math.max(deepest, places[parent].column + 1), 0);
    places.push({ column, row: 0 });
    for (const parent of parents) edges.push([parent, index]);
    (columns[column] ??= []).push({ index, parents });
  });
  columns.forEach((column, depth) => placeColumn(column, places, depth));
  const top = places.reduce((least, { row }) => Math.min(least, row), Infinity);
  for (const place of places) place.row -= top;
  return { places, edges };
}

// Each where it wants to be or as near as the others let it; all together they are centred on what they want.
function placeColumn(column, places, depth) {
  const wanted = ({ parents }) => mean(parents.map((parent) => places[parent].row));
  const order = column.map((node) => ({ index: node.index, wanted: depth ? wanted(node) : 0 }));
  order.sort((a, b) => a.wanted - b.wanted || a.index - b.index);
  let last = -Infinity;
  for (const node of order) last = node.row = Math.max(last + 1, node.wanted);
  const shift = mean(order.map((node) => node.wanted)) - mean(order.map((node) => node.row));
  for (const { index, row } of order) places[index].row = row + shift;
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}
