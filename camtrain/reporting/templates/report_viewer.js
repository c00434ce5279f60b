// The viewer: a case and a label, three planes, an epoch; of two runs the same slices under each other.
const SPLITS = unique(RUNS.map((run) => [...run.epochs.keys()]));
const volumeOf = (place) => RUNS.map((run) => run.volumes.get(pair(place.split, place.name))).find(Boolean);
const hasCase = (run, { split, name }) => (run.epochs.get(split) || []).some((epoch) => epoch.cases.has(name));
// The cases of both runs first, then those of A alone, then those of B alone; `only` says of which.
const casesOf = (split) => {
  const names = unique(RUNS.map((run) => (run.epochs.get(split) || []).flatMap((epoch) => [...epoch.cases.keys()])));
  const places = names.map((name) => ({ split, name })).filter(volumeOf);
  for (const place of places) place.only = RUNS.every((run) => hasCase(run, place)) ? -1 : RUNS.findIndex((run) => hasCase(run, place));
  return places.sort((a, b) => a.only - b.only);
};
const CASES = SPLITS.sort((a, b) => (b === "val") - (a === "val") || a.localeCompare(b)).flatMap(casesOf);
const view = { at: 0, label: "", word: "", epoch: Infinity, point: null, drawing: 0, canvases: [] };
const now = () => CASES[view.at];
const look = () => ({
  opacity: at("opacity").value / 100,
  sign: document.querySelector("input[name=sign]:checked").value,
  outline: at("outline").checked,
  own: at("ends").value === "own",
});
const epochsOf = (split) => unique(RUNS.map((run) => (run.epochs.get(split) || []).map((each) => each.epoch))).sort((a, b) => a - b);
// A slider's value is a place in a list; what is shown there is what a screen reader should say.
const heard = (slider, words) => slider.setAttribute("aria-valuetext", words);
const truthOf = (truth) => (truth === null ? "unknown" : truth ? "present" : "absent");

// Everything that drawing one map needs; undefined while the case has no such map.
async function sceneOf(run, place, label, word, epoch, layer) {
  const volume = volumeOf(place);
  if (!volume) return null;
  const { grey, masks } = await voxelsOf(volume);
  const shown = shownOf(run, place.split, epoch, place.name, label);
  const map = layer === undefined ? mapOf(shown, word) : shown?.maps.find((each) => each.method === word && each.layer === layer);
  const region = volume.regionOf[label];
  return {
    run, volume, grey, shown, about: map,
    mask: region === undefined ? null : masks[region],
    map: map ? { ...map, cells: await cellsOf(map) } : null,
    end: map ? endOf(map) : 1,
  };
}
const ended = (scene, looks) => ({ ...looks, end: (looks.own && scene.map ? 127 * scene.map.scale : scene.end) || 1 });

// Lists ------------------------------------------------------------------------------------------------------------
function fillCases() {
  const several = SPLITS.length > 1;
  fill(at("case"), CASES.map(({ split, name, only }, i) => [String(i), `${several ? `${split}: ` : ""}${name}${only < 0 ? "" : ` (${"AB"[only]} only)`}`]), String(view.at));
  at("case-back").disabled = at("case-next").disabled = CASES.length < 2;
}
const NAMED = 5;
// What of two runs cannot stand side by side, and how it could; nothing where every case can.
function fillApart() {
  const alone = RUNS.map((run, i) => CASES.filter(({ only }) => only === i).map(({ name }) => name));
  const shared = CASES.filter(({ only }) => only < 0).length;
  if (RUNS.length < 2 || !alone.flat().length) return;
  const count = (n) => `${n} case${n === 1 ? "" : "s"}`;
  const list = (names) => `${names.slice(0, NAMED).join(", ")}${names.length > NAMED ? ` and ${names.length - NAMED} more` : ""}`;
  const parts = alone.map((names, i) => (names.length ? `${count(names.length)} only in ${"AB"[i]}: ${list(names)}` : "")).filter(Boolean);
  at("apart").textContent = `${shared ? `${count(shared)} in both runs` : "The runs show no case in common, so no map stands beside that of the other run"}; ${parts.join("; ")}. \
A case of one run has the plain image where the other's map would be. Each run chooses by what it sees and by its own errors; \
to see the same cases in both, name them in both: AttentionMonitor(nifti_cases=["…"]) lets them join the panel.`;
  at("apart").hidden = false;
}
function fillLabels() {
  const { split, name } = now();
  const seen = new Map();
  for (const run of RUNS) {
    for (const epoch of run.epochs.get(split) || []) {
      for (const [label, shown] of epoch.cases.get(name) || []) seen.set(label, shown.truth);
    }
  }
  const order = (truth) => (truth === 1 ? 0 : truth === 0 ? 1 : 2);
  const listed = [...seen].sort(([, a], [, b]) => order(a) - order(b));
  const kindOf = (label) => RUNS.map((run) => run.kinds.get(JSON.stringify([split, name, label]))).find((kind) => kind === "hard");
  fill(at("label"), listed.map(([label, truth]) => [label, `${label} – ${truthOf(truth)}${kindOf(label) ? ", hard" : ""}`]), view.label);
  view.label = at("label").value;
}
function fillMaps() {
  const { split, name } = now();
  const words = unique(RUNS.map((run) => (run.epochs.get(split) || []).flatMap((epoch) =>
    (epoch.cases.get(name)?.get(view.label)?.maps || []).filter((map) => !map.layer).map((map) => map.method))));
  const order = unique(RUNS.map((run) => run.methods));
  words.sort((a, b) => (order.indexOf(a) + 99) % 99 - (order.indexOf(b) + 99) % 99);
  const options = words.map((word) => [word, word]);
  if (words.includes("gradcam") && !words.includes(COUNTER)) options.push([COUNTER, "counterfactual (minus gradcam)"]);
  fill(at("map"), options, view.word);
  view.word = at("map").value;
}
function fillEpochs() {
  const epochs = epochsOf(now().split);
  view.epochs = epochs;
  const slider = at("epoch");
  slider.max = Math.max(0, epochs.length - 1);
  const place = epochs.indexOf(view.epoch);
  slider.value = place < 0 ? epochs.length - 1 : place;
  slider.disabled = at("play").disabled = epochs.length < 2;
  view.epoch = epochs[slider.value];
}

// Planes -----------------------------------------------------------------------------------------------------------
function buildPlanes() {
  const volume = volumeOf(now());
  view.canvases = [];
  const planes = planesOf(volume);
  const grid = at("planes");
  grid.style.setProperty("--columns", planes.map((plane) => `minmax(0, ${extentOf(volume, plane)[0].toFixed(1)}fr)`).join(" "));
  grid.classList.toggle("flat", planes.length === 1);
  grid.replaceChildren(...planes.map((plane) => {
    const { normal } = PLANES[plane];
    const title = plane[0].toUpperCase() + plane.slice(1);
    const place = element("output", { className: "place" });
    const canvases = RUNS.map((run, i) => {
      const canvas = element("canvas", { width: 24, height: 24, tabIndex: 0 });
      canvas.setAttribute("role", "img");
      view.canvases.push({ canvas, plane, run: i });
      scrolled(canvas, plane, volume);
      const name = element("span", { className: `tag tag${i}`, ariaHidden: "true" }, "AB"[i]);
      return element("div", { className: "shown" }, ...(RUNS.length > 1 ? [name] : []), canvas);
    });
    const parts = [element("div", { className: "plane-head" }, element("h3", {}, title), place)];
    if (normal >= 0) {
      const slider = element("input", { type: "range", min: 0, max: volume.size[normal] - 1, step: 1, id: `slice-${plane}` });
      slider.setAttribute("aria-label", `${title} slice`);
      slider.addEventListener("input", () => moveTo(normal, Number(slider.value)));
      parts.push(slider);
    }
    parts.push(...canvases);
    return element("div", { className: "plane", id: `plane-${plane}` }, ...parts);
  }));
}
function scrolled(canvas, plane, volume) {
  const { normal, across, down } = PLANES[plane];
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 5, PageDown: -5 }[event.key];
    if (normal < 0 || !way) return;
    event.preventDefault();
    moveTo(normal, view.point[normal] + way);
  });
  canvas.addEventListener("wheel", (event) => {
    if (normal < 0 || event.ctrlKey) return;
    event.preventDefault();
    moveTo(normal, view.point[normal] - Math.sign(event.deltaY));
  }, { passive: false });
  canvas.addEventListener("click", (event) => {
    if (normal < 0) return;
    const box = canvas.getBoundingClientRect();
    const place = (part, n) => Math.min(n - 1, Math.max(0, Math.floor((1 - part) * n)));
    view.point[across] = place((event.clientX - box.left) / box.width, volume.size[across]);
    view.point[down] = place((event.clientY - box.top) / box.height, volume.size[down]);
    draw();
  });
}
function moveTo(axis, value) {
  const { size } = volumeOf(now());
  view.point[axis] = Math.min(size[axis] - 1, Math.max(0, value));
  draw();
  const plane = Object.keys(PLANES).find((name) => PLANES[name].normal === axis);
  say(`${plane} slice ${view.point[axis] + 1} of ${size[axis]}`);
}
let saying = 0;
const say = (text) => { clearTimeout(saying); saying = setTimeout(() => { at("live").textContent = text; }, 150); };

// Drawing ----------------------------------------------------------------------------------------------------------
async function draw() {
  const turn = ++view.drawing;
  const place = now();
  const scenes = await Promise.all(RUNS.map((run) => sceneOf(run, place, view.label, view.word, view.epoch)));
  if (turn !== view.drawing || !scenes[0]) return;
  const volume = scenes[0].volume;
  if (!view.point) view.point = firstPoint(scenes.findLast((scene) => scene.map) || scenes[0]);
  const looks = look();
  for (const { canvas, plane, run } of view.canvases) {
    const scene = scenes[run] || scenes[0];
    fitCanvas(canvas, volume, plane, canvas.parentElement.clientWidth * Math.min(2, devicePixelRatio || 1));
    const index = plane === "image" ? 0 : view.point[PLANES[plane].normal];
    drawPlane(canvas, plane, index, scene, ended(scene, looks));
    drawMarks(canvas, plane, volume, view.point, true);
    canvas.setAttribute("aria-label", `${RUNS.length > 1 ? `${RUNS[run].name}: ` : ""}${plane === "image" ? "image" : `${plane} slice ${index + 1} of ${volume.size[PLANES[plane].normal]}`} of ${place.name}, ${view.word} of ${view.label}, ${sentenceOf(scene)}`);
  }
  for (const plane of planesOf(volume)) {
    const { normal } = PLANES[plane];
    const column = at(`plane-${plane}`);
    column.querySelector(".place").textContent = normal < 0 ? "" : `${view.point[normal] + 1} / ${volume.size[normal]}`;
    if (normal < 0) continue;
    const slider = column.querySelector("input");
    slider.value = view.point[normal];
    heard(slider, `${view.point[normal] + 1} of ${volume.size[normal]}`);
  }
  legend(scenes, looks);
}
const firstPoint = (scene) => {
  const found = scene.map && peakOf(scene.map.cells, scene.map, scene.volume);
  return found || scene.volume.size.map((n) => n >> 1);
};
const sentenceOf = ({ run, shown, about, map }) => {
  if (!shown) return hasCase(run, now()) ? "not in this epoch" : "not a case of this run";
  const score = about && !about.turned && (about.organIoU ?? null) !== null ? `, OrganIoU ${fixed(about.organIoU)}` : "";
  const where = about && about.inside !== null && !about.turned ? `, ${fixed(about.inside)} of the evidence inside` : "";
  const empty = map && !map.scale ? ", map all zero" : !map ? ", no map" : "";
  return `${truthOf(shown.truth)}, p = ${fixed(shown.probability)}${where}${score}${empty}`;
};
function legend(scenes, looks) {
  const bar = element("canvas", { width: 180, height: 10 });
  bar.setAttribute("aria-hidden", "true");
  const context = bar.getContext("2d");
  const table = colours(looks.opacity, looks.sign);
  for (let x = 0; x < 180; x++) {
    const i = 4 * Math.round((x / 179) * 510);
    context.fillStyle = `rgb(${[0, 1, 2].map((c) => table[i + c] + 90 * table[i + 3]).join(",")})`;
    context.fillRect(x, 0, 1, 10);
  }
  const ends = unique(scenes.filter((scene) => scene?.map).map((scene) => ended(scene, looks).end.toPrecision(3)));
  if (!ends.length) ends.push("1.00");
  at("legend").replaceChildren(
    element("span", {}, `against the label −${ends[0]}`), bar, element("span", {}, `+${ends[0]} for the label`),
    ...(ends.length > 1 ? [element("span", {}, `(of B: ±${ends[1]})`)] : []),
    element("span", { className: "rim" }, element("i", { ariaHidden: "true" }), scenes[0].mask ? "allowed organs" : "no allowed organs known for this label"));
}
function told() {
  const { split, name } = now();
  at("epoch-out").textContent = view.epoch === undefined ? "" : String(view.epoch);
  heard(at("epoch"), view.epoch === undefined ? "no epoch" : `epoch ${view.epoch}`);
  const paper = element("span", { className: "paper" }, element("b", {}, `${name}, ${view.label}`), ` (${view.word})`);
  at("said").replaceChildren(paper, ...RUNS.flatMap((run, i) => {
    const shown = shownOf(run, split, view.epoch, name, view.label);
    const about = mapOf(shown, view.word);
    const used = epochOf(run, split, view.epoch)?.epoch;
    const text = sentenceOf({ run, shown, about, map: about });
    const other = shown && used !== view.epoch && used !== undefined ? ` (its epoch ${used})` : "";
    return [element("span", {}, ...(RUNS.length > 1 ? [element("span", { className: `tag tag${i}` }, "AB"[i]), " "] : []), `${text}${other}`)];
  }));
}
function drawCourse() {
  const { split, name } = now();
  const epochs = view.epochs;
  if (!epochs.length) return;
  const series = (value) => RUNS.map((run, i) => ({ name: run.name, style: `run${i}`, points: (run.epochs.get(split) || []).map((each) => {
    const shown = each.cases.get(name)?.get(view.label);
    return [each.epoch, shown ? value(shown) : null];
  }) }));
  const kinds = [["probability", (shown) => shown.probability], ["evidence inside", (shown) => mapOf(shown, view.word)?.inside ?? null]];
  at("course").replaceChildren(...kinds.filter(([title]) => title === "probability" || view.word !== COUNTER).map(([title, value]) => {
    const lines = series(value);
    const words = lines.map(({ name: run, points }) => inWords(RUNS.length > 1 ? `${title}, ${run}` : title, points)).join("; ");
    return element("figure", {}, element("figcaption", {}, element("span", { className: "name" }, `${title}: ${view.label}`)),
      chart({ series: lines, low: 0, high: 1, epochs: [epochs[0], epochs[epochs.length - 1]], line: 0.5, mark: view.epoch, words, height: 84 }));
  }));
}
