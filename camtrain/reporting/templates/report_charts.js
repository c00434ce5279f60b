// Score curves: one small chart per label, the worst label first.
const SVG = "http://www.w3.org/2000/svg";
const svg = (tag, attributes = {}, ...content) => {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...content);
  return made;
};
const CURVES_AT_FIRST = 24;
const neat = (value) => (value === null || value === undefined ? "–" : Math.abs(value) < 100 ? value.toFixed(2) : value.toPrecision(3));

// One chart. `series`: [{name, style, points: [[epoch, value]]}]; `mark`: an epoch to point at.
function chart({ series, low, high, epochs, line, mark, words, height = 96 }) {
  const width = 260;
  const [left, right, top, bottom] = [30, 8, 6, 18];
  const span = Math.max(1, epochs[1] - epochs[0]);
  const x = (epoch) => left + ((epoch - epochs[0]) / span) * (width - left - right) + (epochs[0] === epochs[1] ? (width - left - right) / 2 : 0);
  const y = (value) => top + (1 - (Math.min(high, Math.max(low, value)) - low) / (high - low || 1)) * (height - top - bottom);
  const made = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words, class: "chart" });
  for (const value of [low, (low + high) / 2, high]) {
    made.append(svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "grid" }),
      svg("text", { x: left - 5, y: y(value) + 3.5, class: "end" }, neat(value).replace(/\.00$/, "").replace(/(\.\d)0$/, "$1")));
  }
  if (line !== undefined) made.append(svg("line", { x1: left, x2: width - right, y1: y(line), y2: y(line), class: "limit" }));
  if (mark !== undefined && mark >= epochs[0] && mark <= epochs[1]) {
    made.append(svg("line", { x1: x(mark), x2: x(mark), y1: top, y2: height - bottom, class: "now" }));
  }
  for (const { points, style } of series) {
    const known = points.filter(([, value]) => value !== null && value !== undefined);
    if (known.length > 1) made.append(svg("polyline", { points: known.map(([e, v]) => `${x(e).toFixed(1)},${y(v).toFixed(1)}`).join(" "), class: `curve ${style}` }));
    const last = known[known.length - 1];
    if (last && style !== "mean") made.append(svg("circle", { cx: x(last[0]), cy: y(last[1]), r: 3, class: `dot ${style}` }));
    const here = mark === undefined ? null : known.find(([epoch]) => epoch === mark);
    if (here) made.append(svg("circle", { cx: x(here[0]), cy: y(here[1]), r: 3.5, class: `here ${style}` }));
  }
  made.append(svg("text", { x: left, y: height - 4 }, String(epochs[0])));
  if (epochs[1] > epochs[0]) made.append(svg("text", { x: width - right, y: height - 4, class: "end" }, String(epochs[1])));
  return made;
}
const inWords = (name, points) => {
  const known = points.filter(([, value]) => value !== null && value !== undefined);
  if (!known.length) return `${name}: no value`;
  const [first, last] = [known[0], known[known.length - 1]];
  return known.length === 1 ? `${name}: ${neat(first[1])} in epoch ${first[0]}`
    : `${name}: from ${neat(first[1])} in epoch ${first[0]} to ${neat(last[1])} in epoch ${last[0]}`;
};

const pointsOf = (run, split, method, measure, label) => {
  const found = run.curves[split];
  const values = (found?.data[method]?.[measure] || found?.data[""]?.[measure])?.[label];
  return values ? found.epochs.map((epoch, i) => [epoch, values[i]]) : [];
};
const lastOf = (points) => points.reduce((last, [, value]) => (value === null ? last : value), null);

const score = { split: at("split"), method: at("method"), measure: at("measure"), all: false };
const fill = (select, options, keep) => {
  select.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
  if (keep !== undefined && options.some(([value]) => value === keep)) select.value = keep;
  select.disabled = options.length < 2;
};
const unique = (lists) => [...new Set(lists.flat())];
function measuresOf(split, method) {
  const found = unique(RUNS.map((run) => Object.entries(run.curves[split]?.data || {})
    .filter(([name]) => name === "" || name === method).flatMap(([, measures]) => Object.keys(measures).filter((name) => Object.keys(measures[name]).some((label) => label !== "mean")))));
  const order = Object.keys(PAGE.measures);
  const place = (name) => (order.includes(name) ? order.indexOf(name) : order.length);
  return found.sort((a, b) => place(a) - place(b));
}
function scoreControls() {
  fill(score.split, unique(RUNS.map((run) => run.splits)).map((split) => [split, split]));
  const methods = unique(RUNS.map((run) => run.methods));
  fill(score.method, methods.map((method) => [method, method]));
  score.method.parentElement.hidden = !methods.length;
}
function drawCurves() {
  const [split, method] = [score.split.value, score.method.value];
  fill(score.measure, measuresOf(split, method).map((name) => [name, PAGE.measures[name]?.title || name]), score.measure.value);
  const measure = score.measure.value;
  const about = PAGE.measures[measure];
  const labels = unique(RUNS.map((run) => run.labels)).map((label) => {
    const series = RUNS.map((run, i) => ({ name: run.name, style: `run${i}`, points: pointsOf(run, split, method, measure, label) }));
    return { label, series, last: lastOf(series[series.length - 1].points) };
  }).filter(({ series }) => series.some(({ points }) => points.length));
  const sign = about?.better === false ? -1 : 1;
  const first = ({ series, last }) => (series.length > 1 ? -Math.abs(last - lastOf(series[0].points)) : sign * last);
  labels.sort((a, b) => (a.last === null) - (b.last === null) || first(a) - first(b));
  const every = labels.flatMap(({ series }) => series.flatMap(({ points }) => points));
  const values = every.map(([, value]) => value).filter((value) => value !== null);
  const epochs = every.map(([epoch]) => epoch);
  const shares = about?.shaded && Math.min(...values, 0) >= 0;
  const range = { low: shares ? 0 : Math.min(0, ...values), high: shares ? 1 : Math.max(...values, 0.001), epochs: [Math.min(...epochs), Math.max(...epochs)] };
  const shown = score.all ? labels : labels.slice(0, CURVES_AT_FIRST);
  at("more-curves").hidden = labels.length <= CURVES_AT_FIRST;
  const kind = [about?.title || measure, ...(RUNS.some((run) => run.curves[split]?.data[method]?.[measure]) ? [method] : []), split].join(", ");
  at("curves-of").textContent = `${kind}: ${score.all || at("more-curves").hidden ? "" : `the first ${CURVES_AT_FIRST} of `}${labels.length} labels, the ${RUNS.length > 1 ? "largest difference" : (about?.better ?? null) === null ? "lowest" : "worst"} first.`;
  at("more-curves").textContent = score.all ? `Show the first ${CURVES_AT_FIRST} labels` : `Show all ${labels.length} labels`;
  const means = RUNS.length === 1 ? [{ name: "mean", style: "mean", points: pointsOf(RUNS[0], split, method, measure, "mean") }] : [];
  at("curves").replaceChildren(...shown.map(({ label, series }) => {
    const words = series.map(({ name, points }) => inWords(RUNS.length > 1 ? `${label}, ${name}` : label, points)).join("; ");
    const numbers = series.map(({ points, style }) => element("b", { className: style }, neat(lastOf(points))));
    return element("figure", {},
      element("figcaption", {}, element("span", { className: "name", title: label }, label), element("span", { className: "last" }, ...numbers)),
      chart({ series: [...means, ...series], ...range, words, line: measure === "energy_inside" ? 0.5 : measure === "auroc" ? 0.5 : undefined }));
  }));
  if (!shown.length) at("curves").append(element("p", { className: "note" }, "No scores of this kind."));
  for (const table of document.querySelectorAll(".heat")) table.hidden = table.dataset.split !== split || (table.dataset.method !== "" && table.dataset.method !== method);
}
scoreControls();
if (RUNS.some((run) => run.splits.length)) drawCurves();
else at("scores").hidden = true;
for (const select of [score.split, score.method, score.measure]) select.addEventListener("change", drawCurves);
at("more-curves").addEventListener("click", () => { score.all = !score.all; drawCurves(); });
