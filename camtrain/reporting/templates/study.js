"use strict";
const { study, tasks } = JSON.parse(document.getElementById("data").textContent);
const byId = new Map(tasks.map((task) => [task.id, task]));
const at = (id) => document.getElementById(id);
const SCALE = ["clearly left", "rather left", "both alike", "rather right", "clearly right"];

// An order per reader: FNV-1a of study and name seeds mulberry32.
const generator = (text) => {
  let seed = 2166136261;
  for (const byte of new TextEncoder().encode(text)) seed = Math.imul(seed ^ byte, 16777619);
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
};
const shuffled = (list, random) => {
  const result = [...list];
  for (let i = result.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [result[i], result[j]] = [result[j], result[i]];
  }
  return result;
};
// Tasks of one scan go to different rounds, so that it does not come twice in a row with another map.
const orderFor = (reader) => {
  const random = generator(study + "\n" + reader);
  return ["discrimination", "trust"].flatMap((kind) => {
    const groups = new Map();
    for (const task of tasks.filter((each) => each.kind === kind)) {
      groups.set(task.group, [...(groups.get(task.group) || []), task.id]);
    }
    const rounds = [];
    for (const ids of groups.values()) {
      shuffled(ids, random).forEach((id, round) => { (rounds[round] = rounds[round] || []).push(id); });
    }
    return rounds.flatMap((ids) => shuffled(ids, random));
  });
};

let state = null; // {reader, place, answers: {task: {answer, seconds}}}
let order = [];
let keeps = true;
const store = (reader) => `camtrain-study:${study}:${reader}`;
const keep = () => {
  try { localStorage.setItem(store(state.reader), JSON.stringify(state)); } catch { keeps = false; }
  at("nokeep").hidden = keeps;
};
const kept = (reader) => {
  try { return JSON.parse(localStorage.getItem(store(reader))); } catch { return null; }
};
try {
  localStorage.setItem("camtrain-study", "1");
  at("reader").value = localStorage.getItem(`camtrain-study:${study}`) || "";
} catch { keeps = false; }
at("nokeep").hidden = keeps;

// Seconds that a question was on the screen, added up over visits; a hidden tab does not count.
let since = null;
let spent = 0;
const pause = () => { if (since !== null) spent += (performance.now() - since) / 1000; since = null; };
const resume = () => { since = document.hidden ? null : performance.now(); };
const book = () => {
  pause();
  const task = order[state.place];
  state.seconds[task] = (state.seconds[task] || 0) + spent;
  spent = 0;
};
document.addEventListener("visibilitychange", () => {
  if (!state || at("ask").hidden) return;
  if (document.hidden) { pause(); book(); keep(); } else resume();
});
addEventListener("pagehide", () => { if (state && !at("ask").hidden) { book(); keep(); } });

const show = (id) => { for (const part of ["start", "ask", "end"]) at(part).hidden = part !== id; };
const element = (tag, content, attributes) => {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...content);
  return made;
};
const figure = (source, text, alt) =>
  element("figure", [element("img", [], { src: source, alt }), element("figcaption", [text])]);
const words = (task) => (task.kind === "trust" ? SCALE : task.choices);

function ask() {
  const task = byId.get(order[state.place]);
  const trust = task.kind === "trust";
  at("question").textContent = trust
    ? `Which map is more reasonable for “${task.finding}”?` : "Which finding does the map show?";
  const titles = trust ? ["scan", "left", "right"] : ["scan", "map"];
  at("pictures").replaceChildren(...(trust ? [1, 2, 0] : [0, 1]).map((i) =>
    figure(task.pictures[i], titles[i], i ? `Slices of the scan under the ${titles[i] === "map" ? "map" : titles[i] + " map"}` : "Slices of the scan")));
  at("choices").classList.toggle("scale", trust);
  const chosen = (state.answers[task.id] || null);
  at("choices").replaceChildren(...words(task).map((text, i) => {
    const value = trust ? String(i + 1) : text;
    const input = element("input", [], { type: "radio", name: "answer", checked: chosen === value });
    input.addEventListener("change", () => choose(i));
    return element("label", [input, element("kbd", [String(i + 1)], { ariaHidden: "true" }), element("span", [text])], { className: "choice" });
  }));
  at("place").textContent = `Question ${state.place + 1} of ${order.length}`;
  at("last").textContent = String(words(task).length);
  at("back").disabled = state.place === 0;
  progress();
  show("ask");
  at("question").focus();
  scrollTo(0, 0);
  resume();
}
function progress() {
  const answered = Object.keys(state.answers).length;
  at("done").value = answered;
  at("count").textContent = `${answered} answered`;
  at("next").textContent = state.answers[order[state.place]] === undefined ? "Skip" : "Next";
}
function choose(i) {
  const task = byId.get(order[state.place]);
  const inputs = [...at("choices").querySelectorAll("input")];
  if (i < 0 || i >= inputs.length) return;
  inputs[i].checked = true;
  inputs[i].focus();
  state.answers[task.id] = task.kind === "trust" ? String(i + 1) : task.choices[i];
  at("said").textContent = `chosen: ${words(task)[i]}`;
  keep();
  progress();
}
function go(to) {
  if (!at("ask").hidden) book();
  state.place = Math.max(0, Math.min(to, order.length));
  keep();
  if (state.place < order.length) ask(); else finish();
}
function finish() {
  const open = order.filter((id) => state.answers[id] === undefined);
  at("summary").textContent = open.length
    ? `${open.length} of ${order.length} questions have no answer yet.` : `All ${order.length} questions are answered.`;
  at("open").hidden = !open.length;
  at("text").value = csv();
  show("end");
  at("end-h").focus();
}
const cell = (text) => (/[",\r\n;]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
function csv() {
  const rows = order.filter((id) => state.answers[id] !== undefined).map((id) =>
    [state.reader, id, state.answers[id], (state.seconds[id] || 0).toFixed(1), study]);
  return [["reader", "task", "answer", "seconds", "study"], ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

at("who").addEventListener("submit", (event) => {
  event.preventDefault();
  const reader = at("reader").value.normalize("NFC").trim().replace(/\s+/g, " ");
  if (!reader) { at("reader").focus(); return; }
  order = orderFor(reader);
  state = kept(reader) || { reader, place: 0, answers: {}, seconds: {} };
  try { localStorage.setItem(`camtrain-study:${study}`, reader); } catch { keeps = false; }
  keep();
  if (state.place < order.length) ask(); else finish();
});
at("back").addEventListener("click", () => go(state.place - 1));
at("next").addEventListener("click", () => go(state.place + 1));
at("again").addEventListener("click", () => go(order.length - 1));
at("open").addEventListener("click", () => go(order.findIndex((id) => state.answers[id] === undefined)));
at("save").addEventListener("click", () => {
  const address = URL.createObjectURL(new Blob([csv()], { type: "text/csv;charset=utf-8" }));
  const safe = state.reader.replace(/[^\p{L}\p{N}_-]+/gu, "_");
  element("a", [], { href: address, download: `answers_${study}_${safe}.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
});
document.addEventListener("keydown", (event) => {
  if (!state || at("ask").hidden || event.ctrlKey || event.altKey || event.metaKey) return;
  const inputs = [...at("choices").querySelectorAll("input")];
  const now = inputs.findIndex((input) => input.checked);
  const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
  if (/^[1-9]$/.test(event.key)) choose(Number(event.key) - 1);
  else if (step) choose(now < 0 ? (step > 0 ? 0 : inputs.length - 1) : (now + step + inputs.length) % inputs.length);
  // On a button, Enter presses that button.
  else if (event.key === "Enter" && event.target.tagName !== "BUTTON") { if (now >= 0) go(state.place + 1); }
  else if (event.key === "Backspace") { if (state.place > 0) go(state.place - 1); }
  else return;
  event.preventDefault();
});
