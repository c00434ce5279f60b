// The rest of the page: what the controls do, the strip of layers, the errors, tables, colours, paper.
const FEW_LAYERS = `The monitor watches one layer. Name several, such as layer=["layer2", "layer3", "layer4"], and they stand here side \
by side: a label that is right in the last layer and wrong before it is read from the wrong place.`;
async function drawStrip() {
  const turn = view.drawing;
  const place = now();
  const method = view.word === COUNTER ? "gradcam" : view.word;
  const rows = await Promise.all(RUNS.map(async (run, i) => {
    const shown = shownOf(run, place.split, view.epoch, place.name, view.label);
    const layers = (shown?.maps || []).filter((map) => map.method === method && map.layer).map((map) => map.layer);
    return Promise.all(layers.map(async (layer) => {
      const scene = await sceneOf(run, place, view.label, method, view.epoch, layer);
      const tag = RUNS.length > 1 ? [element("span", { className: `tag tag${i}` }, "AB"[i]), " "] : [];
      return element("figure", {}, thumb(scene, { ...look(), own: true }),
        element("figcaption", {}, ...tag, element("b", {}, layer), ` ${scene.map.shape.join(" × ")} cells${scene.map.inside === null ? "" : `, ${fixed(scene.map.inside)} inside`}`));
    }));
  }));
  if (turn !== view.drawing) return;
  const several = RUNS.some((run) => run.layers.length > 1);
  at("depth-note").textContent = rows.flat().length
    ? `${method} of ${view.label} in epoch ${view.epoch}, from the first layer to the last, through the point of the viewer; each map on its own scale.`
    : several ? `Single layers are kept of ${RUNS[0].methods[0]} only.` : FEW_LAYERS;
  at("strip").replaceChildren(...rows.filter((row) => row.length).map((row) => element("div", { className: "strip" }, ...row)));
}
function thumb(scene, looks, width = 220, point = null) {
  const plane = planesOf(scene.volume)[0];
  const canvas = element("canvas", {});
  fitCanvas(canvas, scene.volume, plane, width);
  const through = point || view.point || firstPoint(scene);
  drawPlane(canvas, plane, plane === "image" ? 0 : through[PLANES[plane].normal], scene, ended(scene, looks));
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${scene.about?.method || "image"} of ${scene.shown?.label || ""}, ${plane} plane, ${sentenceOf(scene)}`);
  return canvas;
}

const ERRORS_AT_MOST = 6;
let listing = 0;
async function drawErrors() {
  const turn = ++listing;
  const run = RUNS[RUNS.length - 1];
  const found = { fn: [], fp: [] };
  CASES.forEach((place, i) => {
    if (place.split !== now().split) return;
    for (const [label, shown] of epochOf(run, place.split, view.epoch)?.cases.get(place.name) || []) {
      if (shown.probability === null || shown.truth === null) continue;
      if (shown.truth === 1 && shown.probability < 0.5) found.fn.push({ i, place, label, shown });
      if (shown.truth === 0 && shown.probability >= 0.5) found.fp.push({ i, place, label, shown });
    }
  });
  for (const [kind, list] of Object.entries(found)) {
    list.sort((a, b) => (kind === "fn" ? 1 : -1) * (a.shown.probability - b.shown.probability));
    const cards = await Promise.all(list.slice(0, ERRORS_AT_MOST).map((each) => card(run, each)));
    if (turn !== listing) return;
    const more = list.length > ERRORS_AT_MOST ? [element("p", { className: "note" }, `and ${list.length - ERRORS_AT_MOST} more`)] : [];
    at(kind).replaceChildren(...cards, ...more);
    if (!list.length) at(kind).append(element("p", { className: "note" }, "None among these cases in this epoch."));
  }
}
async function card(run, { i, place, label, shown }) {
  const word = run.methods.find((method) => mapOf(shown, method)) || shown.maps.find((map) => !map.layer)?.method;
  const first = await sceneOf(run, place, label, word, view.epoch);
  const second = await sceneOf(run, place, label, COUNTER, view.epoch);
  const looks = { ...look(), own: true, sign: "both", opacity: 1 };
  const button = element("button", { type: "button" }, "Open");
  button.setAttribute("aria-label", `Open ${place.name}, ${label}`);
  button.addEventListener("click", () => { choose(i, label); at("panel").scrollIntoView(); at("case").focus(); });
  const point = firstPoint(first);
  const pictures = [[first, word]].concat(second.map ? [[second, COUNTER]] : []).map(([scene, title]) =>
    element("figure", {}, thumb(scene, looks, 200, point), element("figcaption", {}, title || "no map")));
  return element("div", { className: "card" },
    element("p", { className: "card-head" }, element("b", { title: label }, label), element("span", { className: "p" }, `p = ${fixed(shown.probability)}`), element("span", { title: place.name }, place.name), button),
    element("div", { className: "pictures" }, ...pictures));
}

// What changes what --------------------------------------------------------------------------------------------------
let later = 0;
async function refresh(errors = true) {
  told();
  drawCourse();
  await draw();
  clearTimeout(later);
  later = setTimeout(() => { drawStrip(); if (errors) drawErrors(); }, 120);
}
function choose(place, label) {
  const before = volumeOf(now());
  view.at = (place + CASES.length) % CASES.length;
  at("case").value = String(view.at);
  if (label !== undefined) view.label = label;
  fillLabels();
  fillMaps();
  fillEpochs();
  if (before !== volumeOf(now()) || !view.canvases.length || label !== undefined) { view.point = null; buildPlanes(); }
  refresh();
}
// The page opens where it hurts: a case that shows the worst label.
function begin() {
  const shows = (place, label) => epochOf(RUNS[0], place.split, Infinity)?.cases.get(place.name)?.get(label)?.truth === 1;
  for (const label of PAGE.order) {
    const found = CASES.findIndex((place) => place.split === CASES[0].split && shows(place, label));
    if (found >= 0) { choose(found, label); return; }
  }
  choose(0);
}
function stop() {
  clearInterval(view.playing);
  view.playing = null;
  at("play").textContent = "Play";
  at("play").setAttribute("aria-pressed", "false");
}
function toEpoch(place) {
  at("epoch").value = place;
  view.epoch = view.epochs[at("epoch").value];
  refresh();
}
at("case").addEventListener("change", () => choose(Number(at("case").value)));
at("case-back").addEventListener("click", () => choose(view.at - 1));
at("case-next").addEventListener("click", () => choose(view.at + 1));
at("label").addEventListener("change", () => { view.label = at("label").value; view.point = null; fillMaps(); refresh(false); });
at("map").addEventListener("change", () => { view.word = at("map").value; refresh(false); });
at("epoch").addEventListener("input", () => { stop(); toEpoch(Number(at("epoch").value)); });
at("play").addEventListener("click", () => {
  if (view.playing) { stop(); return; }
  at("play").textContent = "Stop";
  at("play").setAttribute("aria-pressed", "true");
  if (Number(at("epoch").value) === view.epochs.length - 1) toEpoch(0);
  view.playing = setInterval(() => {
    const next = Number(at("epoch").value) + 1;
    if (next >= view.epochs.length) stop(); else toEpoch(next);
  }, 500);
});
for (const id of ["outline", "ends"]) at(id).addEventListener("change", () => { draw(); drawStrip(); });
at("opacity").addEventListener("input", () => {
  at("opacity-out").textContent = `${at("opacity").value} %`;
  heard(at("opacity"), at("opacity-out").textContent);
  draw();
  drawStrip();
});
for (const input of document.querySelectorAll("input[name=sign]")) input.addEventListener("change", () => { draw(); drawStrip(); });
at("peak").addEventListener("click", () => { view.point = null; draw().then(drawStrip); });
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; if (CASES.length) draw(); } });

if (!CASES.length) for (const part of document.querySelectorAll(".needs-maps")) part.hidden = true;
else if (typeof DecompressionStream === "undefined") at("said").textContent = "This browser is too old to show the cases: it cannot open compressed data.";
else { fillCases(); fillApart(); begin(); }

// Sorting by a click or a key on a heading.
const numberIn = (row, place) => parseFloat(row.cells[place].textContent.replace(/−/g, "-"));
for (const table of document.querySelectorAll("table.sort:not(.difference)")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => {
    const button = element("button", { type: "button" }, ...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        if (place === 0) return sign * a.cells[0].textContent.localeCompare(b.cells[0].textContent, undefined, { numeric: true });
        const [x, y] = [numberIn(a, place), numberIn(b, place)];
        return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : sign * (x - y);
      });
      table.tBodies[0].append(...rows);
    });
  });
}

// Of very many labels the first ones are enough at first.
const ROWS_AT_FIRST = 15;
for (const table of document.querySelectorAll("table.verdicts")) {
  const rows = [...table.tBodies[0].rows].slice(ROWS_AT_FIRST);
  if (rows.length < 5) continue;
  const button = element("button", { type: "button" });
  const show = (all) => {
    rows.forEach((row) => row.classList.toggle("rest", !all));
    button.textContent = all ? `Show the first ${ROWS_AT_FIRST} labels` : `Show all ${rows.length + ROWS_AT_FIRST} labels`;
    button.setAttribute("aria-expanded", String(all));
  };
  show(false);
  button.addEventListener("click", () => show(button.getAttribute("aria-expanded") === "false"));
  table.parentElement.after(element("p", { className: "more" }, button));
}

// Colours: those of the system unless a button says otherwise.
const THEMES = [...document.querySelectorAll("[data-theme-to]")];
const theme = (name) => {
  document.documentElement.dataset.theme = name;
  for (const button of THEMES) button.setAttribute("aria-pressed", String(button.dataset.themeTo === name));
};
for (const button of THEMES) {
  button.addEventListener("click", () => {
    theme(button.dataset.themeTo);
    try { localStorage.setItem("camtrain-theme", button.dataset.themeTo); } catch { /* a browser that keeps nothing for files */ }
  });
}
try { if (localStorage.getItem("camtrain-theme")) theme(localStorage.getItem("camtrain-theme")); } catch { /* as above */ }

// Paper shows what is folded away on the screen, every label's curve, and a wide table in parts below each other.
const MEASURES_ACROSS = 4;
function partOf(table, first) {
  const part = table.cloneNode(true);
  const [groups, columns] = part.tHead.rows;
  const keep = (cells, each) => cells.forEach((cell, i) => { if (i < first * each || i >= (first + MEASURES_ACROSS) * each) cell.remove(); });
  keep([...groups.cells].slice(1), 1);
  keep([...columns.cells], 3);
  for (const row of part.tBodies[0].rows) keep([...row.cells].slice(1), 3);
  if (first) part.caption.remove();
  return part;
}
let unfold = [];
addEventListener("beforeprint", () => {
  unfold.forEach((back) => back());
  const folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((part) => { part.open = true; });
  unfold = [() => folded.forEach((part) => { part.open = false; })];
  for (const table of document.querySelectorAll("table.difference")) {
    const count = table.tHead.rows[0].cells.length - 1;
    const parts = [...Array(Math.ceil(count / MEASURES_ACROSS)).keys()].map((i) => partOf(table, i * MEASURES_ACROSS));
    const holder = element("div", {}, ...parts);
    table.replaceWith(holder);
    unfold.push(() => holder.replaceWith(table));
  }
  if (!at("scores").hidden && !score.all) {
    score.all = true;
    drawCurves();
    unfold.push(() => { score.all = false; drawCurves(); });
  }
});
addEventListener("afterprint", () => { unfold.forEach((back) => back()); unfold = []; });
