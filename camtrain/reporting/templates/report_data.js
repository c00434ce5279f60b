"use strict";
// What the page holds: the runs' scores, and volumes and maps as compressed pieces that are opened when they are shown.
const at = (id) => document.getElementById(id);
const element = (tag, attributes = {}, ...content) => {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...content);
  return made;
};
const PAGE = JSON.parse(at("page").textContent);
const RUNS = PAGE.runs;
const UNDEFINED = -128;
const pair = (a, b) => JSON.stringify([a, b]);

const opened = async (text) => {
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
};

for (const run of RUNS) {
  Object.assign(run, { volumes: new Map(), epochs: new Map(), tops: new Map(), organIoU: new Map(), kinds: new Map() });
  for (const [split, epoch, name, label, method, organIoU, kind] of run.cases) {
    run.organIoU.set(JSON.stringify([split, epoch, name, label, method]), organIoU);
    run.kinds.set(JSON.stringify([split, name, label]), kind);
  }
}
for (const piece of document.querySelectorAll("script.volume")) {
  const volume = JSON.parse(piece.textContent);
  volume.cells = volume.size.reduce((a, b) => a * b, 1);
  RUNS[piece.dataset.run].volumes.set(pair(volume.split, volume.case), volume);
  piece.remove();
}
for (const piece of document.querySelectorAll("script.maps")) {
  const epoch = JSON.parse(piece.textContent);
  const run = RUNS[piece.dataset.run];
  let start = 0;
  epoch.cases = new Map();
  for (const [name, label, truth, probability, entries] of epoch.maps) {
    const maps = entries.map(([method, layer, shape, scale, inside]) => {
      const map = { epoch, method, layer, shape, scale, inside, start };
      start += shape.reduce((a, b) => a * b, 1);
      const key = pair(method, layer);
      run.tops.set(key, Math.max(run.tops.get(key) || 0, 127 * scale));
      return map;
    });
    if (!epoch.cases.has(name)) epoch.cases.set(name, new Map());
    for (const map of maps) map.organIoU = map.layer ? null : run.organIoU.get(JSON.stringify([epoch.split, epoch.epoch, name, label, map.method]));
    epoch.cases.get(name).set(label, { label, truth, probability, maps });
  }
  delete epoch.maps;
  if (!run.epochs.has(epoch.split)) run.epochs.set(epoch.split, []);
  run.epochs.get(epoch.split).push(epoch);
  piece.remove();
}
for (const run of RUNS) for (const epochs of run.epochs.values()) epochs.sort((a, b) => a.epoch - b.epoch);

// Grey values, and a mask per region, of a volume.
const voxelsOf = (volume) => (volume.ready ??= opened(volume.data).then((bytes) => {
  volume.data = null;
  const masks = [];
  for (let region = 0; region < volume.regions; region++) {
    const mask = new Uint8Array(volume.cells);
    for (let i = 0, bit = region * volume.cells; i < volume.cells; i++, bit++) {
      mask[i] = (bytes[volume.cells + (bit >> 3)] >> (7 - (bit & 7))) & 1;
    }
    masks.push(mask);
  }
  return { grey: bytes.subarray(0, volume.cells), masks };
}));
// Cells of one map.
const cellsOf = async (map) => {
  map.epoch.ready ??= opened(map.epoch.data).then((bytes) => {
    map.epoch.data = null;
    return new Int8Array(bytes.buffer, bytes.byteOffset, bytes.length);
  });
  const all = await map.epoch.ready;
  return all.subarray(map.start, map.start + map.shape.reduce((a, b) => a * b, 1));
};

// The newest epoch with maps that is not after the wanted one, else the first.
const epochOf = (run, split, wanted) => {
  const epochs = run.epochs.get(split) || [];
  return epochs.filter((each) => each.epoch <= wanted).pop() || epochs[0];
};
const shownOf = (run, split, wanted, name, label) => epochOf(run, split, wanted)?.cases.get(name)?.get(label);
// A map by the word of the list: a method, or the counterfactual made of minus Grad-CAM.
const COUNTER = "counterfactual";
const mapOf = (shown, word) => {
  const found = shown?.maps.find((map) => map.method === word && !map.layer);
  if (found || word !== COUNTER) return found;
  const source = shown?.maps.find((map) => map.method === "gradcam" && !map.layer);
  return source && { ...source, method: COUNTER, turned: true };
};
// One end of the colours for all epochs and runs: that of the run's own pictures, where there is one.
const endOf = (map) => {
  const method = map.turned ? "gradcam" : map.method;
  return Math.max(...RUNS.map((run) => (!map.layer && run.scale[method]) || run.tops.get(pair(method, map.layer)) || 0)) || 1;
};
const fixed = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
