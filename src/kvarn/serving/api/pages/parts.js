// What the page's panels are made of. Text goes into elements as text, never as markup.

export const byId = (id) => document.getElementById(id);

export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

// ---- numbers as words ------------------------------------------------------------------------------------

export const whole = new Intl.NumberFormat("en");

export function seconds(value) {
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 100) return `${Math.round(value)} s`;
  return `${Math.floor(value / 60)} min`;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; value >= 1000 && unit < units.length - 1; unit++) value /= 1024;
  return `${unit && value < 10 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

// ---- bars ------------------------------------------------------------------------------------------------

// A bar of parts side by side: `names` are their classes; `show([share, ...], label)` sets widths of 0 to 1.
export function makeBar(...names) {
  const bar = element("div", "bar");
  const parts = names.map((name) => bar.appendChild(element("i", name)));
  bar.setAttribute("role", "img");
  return {
    bar,
    parts,
    show(shares, label) {
      shares.forEach((share, i) => (parts[i].style.width = `${100 * share}%`));
      bar.setAttribute("aria-label", label);
      bar.title = label;
    },
  };
}
