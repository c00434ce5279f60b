// Drawing: one plane of a volume, a map laid over it, the rim of a region. The same colours as the run's PNG files.
const STRONGEST = 0.85;
const RIM = [70, 240, 110];
const PLANES = {
  axial: { normal: 2, across: 0, down: 1, edges: "RLAP" },
  coronal: { normal: 1, across: 0, down: 2, edges: "RLSI" },
  sagittal: { normal: 0, across: 1, down: 2, edges: "APSI" },
  image: { normal: -1, across: 1, down: 0, edges: "" },
};
const planesOf = (volume) => (volume.size.length === 3 ? ["axial", "coronal", "sagittal"] : ["image"]);
// 3D planes are seen from the patient's feet or front: both screen axes run against the volume's.
const turnedPlane = (plane) => plane !== "image";

// Linear interpolation with aligned centres: for each screen point the cell below and the weight of the next.
function along(cells, points, against) {
  const low = new Int32Array(points);
  const next = new Int32Array(points);
  const weight = new Float32Array(points);
  for (let p = 0; p < points; p++) {
    const from = against ? points - 1 - p : p;
    const place = Math.min(Math.max(((from + 0.5) * cells) / points - 0.5, 0), cells - 1);
    low[p] = Math.floor(place);
    next[p] = Math.min(low[p] + 1, cells - 1);
    weight[p] = place - low[p];
  }
  return { low, next, weight };
}

// Two dimensions of an array: at a position along the plane's normal, between its cells.
function section(values, shape, plane, position, convert) {
  const { normal, across, down } = PLANES[plane];
  const wide = shape[across];
  const high = shape[down];
  const step = shape.map((_, axis) => shape.slice(axis + 1).reduce((a, b) => a * b, 1));
  const result = new Float32Array(wide * high);
  const n = normal < 0 ? 1 : shape[normal];
  const place = Math.min(Math.max(position * n - 0.5, 0), n - 1);
  const below = Math.floor(place);
  const part = place - below;
  const base = normal < 0 ? 0 : below * step[normal];
  const jump = normal < 0 || below + 1 >= n ? 0 : step[normal];
  for (let y = 0; y < high; y++) {
    for (let x = 0; x < wide; x++) {
      const i = base + y * step[down] + x * step[across];
      const here = convert(values[i]);
      result[y * wide + x] = part ? here + part * (convert(values[i + jump]) - here) : here;
    }
  }
  return { values: result, wide, high };
}
// A section on screen: (rows, columns) by linear interpolation.
function onScreen({ values, wide, high }, width, height, against) {
  const xs = along(wide, width, against);
  const ys = along(high, height, against);
  const result = new Float32Array(width * height);
  const row = new Float32Array(wide);
  for (let y = 0, at = 0; y < height; y++) {
    const upper = ys.low[y] * wide;
    const lower = ys.next[y] * wide;
    const v = ys.weight[y];
    for (let x = 0; x < wide; x++) row[x] = values[upper + x] + v * (values[lower + x] - values[upper + x]);
    for (let x = 0; x < width; x++, at++) {
      const left = row[xs.low[x]];
      result[at] = left + xs.weight[x] * (row[xs.next[x]] - left);
    }
  }
  return result;
}

// Colour times opacity and the rest for -255 ... 255.
function colours(opacity, sign) {
  const table = new Float32Array(511 * 4);
  for (let i = 0; i < 511; i++) {
    const strength = Math.abs(i - 255) / 255;
    const warm = i > 255;
    const shown = sign === "both" || (sign === "for") === warm;
    const alpha = shown ? STRONGEST * strength * opacity : 0;
    const colour = warm
      ? [240 + 15 * strength, 40 + 180 * strength, 10 + 40 * strength]
      : [25 + 65 * strength, 65 + 155 * strength, 240 + 15 * strength];
    for (let c = 0; c < 3; c++) table[4 * i + c] = colour[c] * alpha;
    table[4 * i + 3] = 1 - alpha;
  }
  return table;
}

// Pixels come from here and are now and then read back: the memory of the page is their place, not the graphics card's.
const paperOf = (canvas) => canvas.getContext("2d", { willReadFrequently: true });
// Draw one plane. `scene`: {volume, grey, mask, map: {cells, shape, scale} | null}; `look`: {opacity, sign, outline, end}.
function drawPlane(canvas, plane, index, scene, look) {
  const { volume } = scene;
  const { width, height } = canvas;
  const against = turnedPlane(plane);
  const { normal } = PLANES[plane];
  const n = normal < 0 ? 1 : volume.size[normal];
  const position = (index + 0.5) / n;
  const grey = onScreen(section(scene.grey, volume.size, plane, position, (v) => v), width, height, against);
  const picture = new ImageData(width, height);
  const pixels = picture.data;
  let map = null;
  if (scene.map) {
    const factor = (scene.map.turned ? -1 : 1) * (scene.map.scale / look.end) * 255;
    const convert = (v) => (v === UNDEFINED ? 0 : v * factor);
    map = onScreen(section(scene.map.cells, scene.map.shape, plane, position, convert), width, height, against);
  }
  const table = colours(look.opacity, look.sign);
  for (let i = 0, p = 0; i < grey.length; i++, p += 4) {
    const level = map ? 4 * (255 + Math.round(Math.min(255, Math.max(-255, map[i])))) : 1020;
    const rest = table[level + 3];
    pixels[p] = table[level] + grey[i] * rest;
    pixels[p + 1] = table[level + 1] + grey[i] * rest;
    pixels[p + 2] = table[level + 2] + grey[i] * rest;
    pixels[p + 3] = 255;
  }
  if (look.outline && scene.mask) {
    rim(pixels, onScreen(section(scene.mask, volume.size, plane, position, (v) => v), width, height, against), width, height);
  }
  paperOf(canvas).putImageData(picture, 0, 0);
}
function rim(pixels, inside, width, height) {
  const reach = width > 500 ? 2 : 1;
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      if (inside[i] < 0.5) continue;
      const out = (x >= reach && inside[i - reach] < 0.5) || (x + reach < width && inside[i + reach] < 0.5)
        || (y >= reach && inside[i - reach * width] < 0.5) || (y + reach < height && inside[i + reach * width] < 0.5);
      if (out) for (let c = 0; c < 3; c++) pixels[4 * i + c] = RIM[c];
    }
  }
}

// Where the planes cut each other, and the letters of the body's sides.
function drawMarks(canvas, plane, volume, point, lines) {
  const context = paperOf(canvas);
  const { width, height } = canvas;
  const { across, down, edges } = PLANES[plane];
  if (lines && plane !== "image") {
    const x = (1 - (point[across] + 0.5) / volume.size[across]) * width;
    const y = (1 - (point[down] + 0.5) / volume.size[down]) * height;
    context.strokeStyle = "rgba(255,255,255,.38)";
    context.lineWidth = 1;
    context.setLineDash([3, 4]);
    context.beginPath();
    context.moveTo(Math.round(x) + 0.5, 0);
    context.lineTo(Math.round(x) + 0.5, height);
    context.moveTo(0, Math.round(y) + 0.5);
    context.lineTo(width, Math.round(y) + 0.5);
    context.stroke();
    context.setLineDash([]);
  }
  if (!volume.known || width < 120) return;
  const size = Math.max(11, Math.round(width / 28));
  context.font = `600 ${size}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  const letter = (text, x, y, align) => {
    context.textAlign = align;
    context.lineWidth = 2.5;
    context.lineJoin = "round";
    context.strokeStyle = "rgba(0,0,0,.75)";
    context.strokeText(text, x, y);
    context.fillStyle = "#e8e8e4";
    context.fillText(text, x, y);
  };
  letter(edges[0], 5, height / 2, "left");
  letter(edges[1], width - 5, height / 2, "right");
  letter(edges[2], width / 2, size * 0.8, "center");
  letter(edges[3], width / 2, height - size * 0.8, "center");
}

// Width and height of a plane in mm, or in voxels.
const extentOf = (volume, plane) => {
  const { across, down } = PLANES[plane];
  return [volume.size[across] * volume.voxel[across], volume.size[down] * volume.voxel[down]];
};
const fitCanvas = (canvas, volume, plane, width) => {
  const [wide, high] = extentOf(volume, plane);
  const w = Math.max(24, Math.round(Math.min(width, 900)));
  const h = Math.max(16, Math.round((w * high) / wide));
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
};
// The voxel of the volume at the middle of the strongest cell; null where no cell is positive.
function peakOf(cells, map, volume) {
  let best = 0;
  let where = -1;
  const turned = map.turned ? -1 : 1;
  for (let i = 0; i < cells.length; i++) {
    if (cells[i] !== UNDEFINED && turned * cells[i] > best) { best = turned * cells[i]; where = i; }
  }
  if (where < 0) return null;
  const place = [];
  for (let axis = map.shape.length - 1; axis >= 0; axis--) {
    place[axis] = where % map.shape[axis];
    where = Math.floor(where / map.shape[axis]);
  }
  return place.map((cell, axis) => Math.min(volume.size[axis] - 1, Math.floor(((cell + 0.5) * volume.size[axis]) / map.shape[axis])));
}
