"use strict";
// The page's own script. It fetches nothing: what it needs stands in the page, written by report/page/build.py.
// Its ids have a dot, which the anchors of headings cannot have.

document.documentElement.classList.add("js");
const DATA = JSON.parse(document.getElementById("page.data").textContent);
const SIDES = { val: "Validation", test: "Test" };

// ---------------------------------------------------------------- figures

// Base64 text -> a typed array.
function unpacked(text, Kind) {
  return new Kind(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

// The places of a side's arrays -> the arrays. Kept, because a model is looked at again and again.
const SIDES_READ = new Map();
function sideOf(places) {
  const key = places.join();
  if (!SIDES_READ.has(key)) {
    const [scores, truth, patients] = places.map((place) => DATA.arrays[place]);
    const side = { scores: unpacked(scores, Float64Array), truth: unpacked(truth, Int8Array) };
    side.patients = unpacked(patients, Int32Array);
    side.people = side.patients.reduce((most, code) => Math.max(most, code), -1) + 1;
    SIDES_READ.set(key, side);
  }
  return SIDES_READ.get(key);
}

// Wilson's interval of k of n, neither of them whole, z standard errors wide.
function wilson(k, n, z) {
  const centre = (k + (z * z) / 2) / (n + z * z);
  const half = (z / (n + z * z)) * Math.sqrt((k * (n - k)) / n + (z * z) / 4);
  return { lo: k === 0 ? 0 : Math.max(0, centre - half), hi: k === n ? 1 : Math.min(1, centre + half) };
}

// Recall (label 1) or specificity (label 0) of a side at a threshold, with its intervals.
function proportion(side, label, threshold) {
  const hits = new Float64Array(side.people);
  const sizes = new Float64Array(side.people);
  let n = 0;
  let right = 0;
  for (let i = 0; i < side.truth.length; i++) {
    if (side.truth[i] !== label) continue;
    const hit = side.scores[i] >= threshold === (label === 1);
    n += 1;
    right += hit;
    hits[side.patients[i]] += hit;
    sizes[side.patients[i]] += 1;
  }
  const value = right / n;
  // The design effect: the variance by patients over that of n independent images.
  let squares = 0;
  let between = 0;
  let people = 0;
  for (let g = 0; g < side.people; g++) {
    squares += sizes[g] ** 2;
    between += (hits[g] - value * sizes[g]) ** 2;
    people += sizes[g] > 0;
  }
  let design = squares / n;
  if (right > 0 && right < n && people > 1) {
    const clustered = ((people / (people - 1)) * between) / n ** 2;
    design = Math.max(1, clustered / ((value * (1 - value)) / (n - 1)));
  }
  const effective = Math.max(1, n / design);
  // All or none: k must be n or 0 exactly.
  const k = right === n ? effective : value * effective;
  const { lo, hi } = wilson(k, effective, DATA.z.one);
  return { value, lo, hi, each: wilson(k, effective, DATA.z.each), right, n, design };
}

// {tp, fn, tn, fp, recall, specificity} of a side at a threshold.
function figuresAt(side, threshold) {
  const recall = proportion(side, 1, threshold);
  const specificity = proportion(side, 0, threshold);
  const counts = { tp: recall.right, fn: recall.n - recall.right };
  counts.tn = specificity.right;
  counts.fp = specificity.n - specificity.right;
  return { ...counts, recall, specificity };
}

// Bayes' rule. NaN where nobody is called so.
function ppvOf(recall, specificity, prevalence) {
  const tp = recall * prevalence;
  return tp / (tp + (1 - specificity) * (1 - prevalence));
}

function npvOf(recall, specificity, prevalence) {
  const tn = specificity * (1 - prevalence);
  return tn / (tn + (1 - recall) * prevalence);
}

// The figures at a prevalence: {ppv, npv, alarms, missed}, the last two a 1,000 people.
function atPrevalence(figures, prevalence) {
  const { recall, specificity } = figures;
  const both = (rule) => ({
    value: rule(recall.value, specificity.value, prevalence),
    lo: rule(recall.each.lo, specificity.each.lo, prevalence),
    hi: rule(recall.each.hi, specificity.each.hi, prevalence),
  });
  const share = (of, people) => ({
    value: 1000 * people * (1 - of.value), lo: 1000 * people * (1 - of.hi), hi: 1000 * people * (1 - of.lo),
  });
  const alarms = share(specificity, 1 - prevalence);
  return { ppv: both(ppvOf), npv: both(npvOf), alarms, missed: share(recall, prevalence) };
}

// The curves of a side: {roc, pr}, lists of [x, y], a point for each distinct score.
function curvesOf(side) {
  const order = Array.from(side.scores.keys()).sort((a, b) => side.scores[b] - side.scores[a]);
  const sick = side.truth.reduce((sum, t) => sum + t, 0);
  const healthy = side.truth.length - sick;
  const roc = [[0, 0]];
  const pr = [];
  let tp = 0;
  let fp = 0;
  order.forEach((i, place) => {
    if (side.truth[i] === 1) tp += 1;
    else fp += 1;
    const next = order[place + 1];
    if (next !== undefined && side.scores[next] === side.scores[i]) return;
    roc.push([fp / healthy, tp / sick]);
    pr.push([tp / sick, tp / (tp + fp)]);
  });
  return { roc, pr };
}

// Points that a drawing of a few hundred pixels would not show are left out; the first and last stay.
function thinned(points) {
  const kept = [];
  points.forEach((point, i) => {
    const last = kept[kept.length - 1];
    const far = !last || Math.abs(point[0] - last[0]) + Math.abs(point[1] - last[1]) > 0.002;
    if (far || i === points.length - 1) kept.push(point);
  });
  return kept;
}

// ---------------------------------------------------------------- numbers as text

const LIMIT = 36; // log odds beyond which float64 has no other score below 1
const logOdds = (p) => Math.max(-LIMIT, Math.min(LIMIT, Math.log(p) - Math.log1p(-p)));
const sigmoid = (z) => 1 / (1 + Math.exp(-z));
const three = (x) => x.toFixed(3);
const one = (x) => x.toFixed(1);

function withInterval(figure, text = three) {
  if (Number.isNaN(figure.value)) return "– (nobody is called so)";
  return `${text(figure.value)} [${text(figure.lo)}, ${text(figure.hi)}]`;
}

// Four digits, counted from the nearer end: 0.00001234 and 0.99998766.
function rounded(p) {
  return p <= 0.5 ? Number(p.toPrecision(4)) : 1 - Number((1 - p).toPrecision(4));
}

// A threshold in so many digits that it is told from 0 and 1.
function short(threshold) {
  if (threshold > 0.999) return `1 − ${(1 - threshold).toPrecision(3)}`;
  return Number(threshold.toPrecision(4)).toString();
}

// ---------------------------------------------------------------- drawing

function element(tag, attributes = {}, text = "") {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

function drawn(tag, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

const WIDE = 300;
const HIGH = 210;
const ROOM = { left: 38, right: 8, top: 24, bottom: 38 };

// A chart with x and y from 0 to 1 of its frame. ticks: {x or y: [[place, text], ...]}.
function chart(title, labels, ticks) {
  const svg = drawn("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": title });
  const x = (u) => ROOM.left + u * (WIDE - ROOM.left - ROOM.right);
  const y = (v) => HIGH - ROOM.bottom - v * (HIGH - ROOM.top - ROOM.bottom);
  svg.append(drawn("text", { x: x(0), y: 14, "font-weight": "bold" }, title));
  for (const [place, text] of ticks.x) {
    svg.append(drawn("line", { class: "grid", x1: x(place), x2: x(place), y1: y(0), y2: y(1) }));
    svg.append(drawn("text", { x: x(place), y: y(0) + 14, "text-anchor": "middle" }, text));
  }
  for (const [place, text] of ticks.y) {
    svg.append(drawn("line", { class: "grid", x1: x(0), x2: x(1), y1: y(place), y2: y(place) }));
    svg.append(drawn("text", { x: x(0) - 4, y: y(place) + 4, "text-anchor": "end" }, text));
  }
  svg.append(drawn("text", { x: x(0.5), y: HIGH - 6, "text-anchor": "middle" }, labels.x));
  const turned = `translate(10 ${y(0.5)}) rotate(-90)`;
  svg.append(drawn("text", { transform: turned, "text-anchor": "middle" }, labels.y));
  const path = (points) => points.map(([u, v], i) => `${i ? "L" : "M"}${x(u).toFixed(1)} ${y(v).toFixed(1)}`).join("");
  return { svg, x, y, path };
}

const FRACTIONS = [0, 0.25, 0.5, 0.75, 1].map((v) => [v, String(v)]);

// A curve with marks and a point that moves. where(figures) -> [x, y] of the point.
function drawCurve(title, labels, points, view, where) {
  const made = chart(title, labels, { x: FRACTIONS, y: FRACTIONS });
  const floor = labels.floor === "y" ? [[0, view.floor], [1, view.floor]] : [[view.floor, 0], [view.floor, 1]];
  made.svg.append(drawn("path", { class: "floor", d: made.path(floor) }));
  made.svg.append(drawn("path", { class: "curve", d: made.path(thinned(points)) }));
  for (const [name, threshold] of view.marks) {
    const [u, v] = where(figuresAt(view.side, threshold));
    if (Number.isNaN(v)) continue;
    const mark = drawn("circle", { class: "mark", cx: made.x(u), cy: made.y(v), r: 4 });
    mark.append(drawn("title", {}, name));
    made.svg.append(mark);
  }
  const now = drawn("circle", { class: "now", r: 4.5 });
  made.svg.append(now);
  const move = (figures) => {
    const [u, v] = where(figures);
    now.setAttribute("visibility", Number.isNaN(v) ? "hidden" : "visible");
    if (Number.isNaN(v)) return;
    now.setAttribute("cx", made.x(u));
    now.setAttribute("cy", made.y(v));
  };
  return { svg: made.svg, move };
}

const BINS = 40;

// The share of a class in each of BINS bins of the log odds.
function histogram(side, label, range) {
  const counts = new Float64Array(BINS);
  let n = 0;
  side.scores.forEach((score, i) => {
    if (side.truth[i] !== label) return;
    n += 1;
    const place = Math.floor(((logOdds(score) - range.lo) / (range.hi - range.lo)) * BINS);
    counts[Math.max(0, Math.min(BINS - 1, place))] += 1;
  });
  return counts.map((count) => count / n);
}

// The histograms of both classes and a line at the threshold.
function drawHistogram(title, view, range, most) {
  const place = (threshold) => Math.max(0, Math.min(1, (logOdds(threshold) - range.lo) / (range.hi - range.lo)));
  const made = chart(title, { x: "score (log odds)", y: "% of the class" }, { x: range.ticks, y: percents(most) });
  const bars = (counts) => {
    const points = [[0, 0]];
    counts.forEach((share, b) => points.push([b / BINS, share / most], [(b + 1) / BINS, share / most]));
    return made.path([...points, [1, 0]]);
  };
  made.svg.append(drawn("path", { class: "healthy", d: bars(histogram(view.side, 0, range)) }));
  made.svg.append(drawn("path", { class: "sick", d: bars(histogram(view.side, 1, range)) }));
  for (const [name, threshold] of view.marks) {
    const at = place(threshold);
    const line = drawn("path", { class: "mark-line", d: made.path([[at, 0], [at, 1]]) });
    line.append(drawn("title", {}, name));
    made.svg.append(line);
  }
  const now = drawn("path", { class: "now" });
  made.svg.append(now);
  const move = (_, threshold) => {
    const at = place(threshold);
    now.setAttribute("d", made.path([[at, 0], [at, 1]]));
  };
  return { svg: made.svg, move };
}

// Ticks of a y axis up to a share.
function percents(most) {
  const step = [0.02, 0.05, 0.1, 0.2, 0.25].find((s) => most / s <= 5) || 0.25;
  const found = [];
  for (let share = 0; share <= most + 1e-9; share += step) found.push([share / most, String(Math.round(100 * share))]);
  return found;
}

// The range of the log odds of all sides, with ticks that are named as scores.
function rangeOf(sides, marks) {
  let lo = Infinity;
  let hi = -Infinity;
  const widen = (p) => {
    lo = Math.min(lo, logOdds(p));
    hi = Math.max(hi, logOdds(p));
  };
  for (const side of sides) side.scores.forEach(widen);
  for (const [, threshold] of marks) widen(threshold);
  const room = 0.02 * (hi - lo) + 0.1;
  const range = { lo: lo - room, hi: hi + room };
  const usual = [-8, -6, -4, -3, -2, -1].map((e) => 10 ** e);
  const places = [...usual, 0.5, ...usual.map((p) => 1 - p).reverse()];
  const names = places.map((p) => [logOdds(p), String(p)]);
  range.ticks = [];
  let last = -1;
  for (const [z, name] of names) {
    const at = (z - range.lo) / (range.hi - range.lo);
    if (at < 0 || at > 1 || at - last < 0.2) continue;
    range.ticks.push([at, name]);
    last = at;
  }
  return range;
}

// ---------------------------------------------------------------- threshold by hand

const ROWS = [
  ["Recall", (f) => withInterval(f.recall)],
  ["Specificity", (f) => withInterval(f.specificity)],
  ["PPV", (f, p) => withInterval(p.ppv)],
  ["NPV", (f, p) => withInterval(p.npv)],
  ["False alarms a 1,000 people", (f, p) => withInterval(p.alarms, one)],
  ["Missed a 1,000 people", (f, p) => withInterval(p.missed, one)],
  ["True positives", (f) => f.tp],
  ["False negatives", (f) => f.fn],
  ["True negatives", (f) => f.tn],
  ["False positives", (f) => f.fp],
  ["Design effect: sick, healthy", (f) => `${f.recall.design.toFixed(2)}, ${f.specificity.design.toFixed(2)}`],
];

// What is left of the recall floor, in a word; `said`: what the tables say of it at this threshold, if they do.
function floorWord(recall, floor, said) {
  const looks = { kept: "good", broken: "bad", "not refuted": "" };
  let word = "not refuted";
  if (recall.lo >= floor) word = "kept";
  if (recall.hi < floor) word = "broken";
  if (said) word = said;
  return [word, looks[word]];
}

class Panel {
  constructor(section) {
    this.section = section;
    this.models = DATA.sets[Number(section.dataset.set)].models;
    this.threshold = 0.5;
    this.prevalence = 0.1;
    this.part = (role) => section.querySelector(`[data-role="${role}"]`);
    this.part("model").addEventListener("change", () => this.chooseModel());
    this.part("finding").addEventListener("change", () => this.chooseFinding());
    this.part("slider").addEventListener("input", (e) => this.move(sigmoid(Number(e.target.value)), "slider"));
    this.part("threshold").addEventListener("input", (e) => {
      if (e.target.value !== "" && e.target.validity.valid) this.move(Number(e.target.value), "threshold");
    });
    for (const role of ["prevalence-slider", "prevalence"]) {
      this.part(role).addEventListener("input", (e) => {
        if (e.target.value !== "" && e.target.validity.valid) this.setPrevalence(Number(e.target.value) / 100, role);
      });
    }
    for (const role of ["prevalence-slider", "prevalence"]) this.part(role).value = 100 * this.prevalence;
    this.chooseModel();
  }

  // Show a model; the finding stays where the model has it.
  chooseModel() {
    const { findings } = this.models[Number(this.part("model").value)];
    const select = this.part("finding");
    const before = select.selectedOptions[0]?.textContent;
    select.replaceChildren(...findings.map((f, k) => element("option", { value: k }, f.name)));
    select.value = String(Math.max(0, findings.findIndex((f) => f.name === before)));
    this.part("finding-label").hidden = findings.length < 2;
    this.chooseFinding();
  }

  // Show a finding, at its first mark.
  chooseFinding() {
    const model = this.models[Number(this.part("model").value)];
    this.finding = model.findings[Number(this.part("finding").value)];
    this.sides = {};
    for (const key of Object.keys(SIDES)) {
      if (this.finding.sides[key]) this.sides[key] = sideOf(this.finding.sides[key]);
    }
    this.part("absent").textContent = `${this.finding.absent} (% of them)`;
    this.part("present").textContent = `${this.finding.name} (% of them)`;
    this.drawCharts();
    this.drawMarks();
    this.move(this.finding.marks[0][1], "");
  }

  drawCharts() {
    const { marks, floor } = this.finding;
    const range = rangeOf(Object.values(this.sides), marks);
    const slider = this.part("slider");
    [slider.min, slider.max, slider.step] = [range.lo, range.hi, (range.hi - range.lo) / 1000];
    let most = 0.02;
    for (const side of Object.values(this.sides)) {
      for (const label of [0, 1]) most = Math.max(most, ...histogram(side, label, range));
    }
    this.charts = {};
    for (const [key, side] of Object.entries(this.sides)) {
      const view = { side, marks, floor };
      const curves = curvesOf(side);
      const name = SIDES[key];
      this.charts[key] = [
        drawHistogram(`${name}: scores`, view, range, most),
        drawCurve(`${name}: ROC`, { x: "1 − specificity", y: "recall", floor: "y" }, curves.roc, view,
          (f) => [1 - f.specificity.value, f.recall.value]),
        drawCurve(`${name}: precision`, { x: "recall", y: "precision", floor: "x" }, curves.pr, view,
          (f) => [f.recall.value, f.tp / (f.tp + f.fp)]),
      ];
    }
    const svgs = Object.values(this.charts).flat().map((made) => made.svg);
    this.part("charts").replaceChildren(...svgs);
  }

  drawMarks() {
    const button = (text, act) => {
      const made = element("button", { type: "button" }, text);
      made.addEventListener("click", act);
      return made;
    };
    this.markButtons = this.finding.marks.map(([name, at]) => {
      const made = button(name === "@0.5" ? name : `${name} ${short(at)}`, () => this.move(at, ""));
      made.dataset.threshold = at;
      return made;
    });
    this.part("marks").replaceChildren(...this.markButtons);
    const shares = Object.entries(this.sides).map(([key, side]) => {
      const share = side.truth.reduce((sum, t) => sum + t, 0) / side.truth.length;
      return button(`as in ${SIDES[key].toLowerCase()}: ${one(100 * share)}%`, () => this.setPrevalence(share, ""));
    });
    const tenth = button("10%", () => this.setPrevalence(0.1, ""));
    this.part("prevalences").replaceChildren(tenth, ...shares);
  }

  // Set the threshold; `from`: the control that did, which is left as it is.
  move(threshold, from) {
    this.threshold = from === "slider" ? rounded(threshold) : threshold;
    if (from !== "slider") this.part("slider").value = logOdds(threshold);
    if (from !== "threshold") this.part("threshold").value = this.threshold;
    this.part("slider").setAttribute("aria-valuetext", short(this.threshold));
    for (const made of this.markButtons) made.setAttribute("aria-pressed", Number(made.dataset.threshold) === this.threshold);
    this.show();
  }

  setPrevalence(prevalence, from) {
    this.prevalence = prevalence;
    for (const role of ["prevalence-slider", "prevalence"]) {
      if (from !== role) this.part(role).value = Number((100 * prevalence).toPrecision(4));
    }
    this.show();
  }

  show() {
    const figures = {};
    for (const [key, side] of Object.entries(this.sides)) {
      figures[key] = figuresAt(side, this.threshold);
      this.charts[key].forEach((made) => made.move(figures[key], this.threshold));
    }
    const rows = ROWS.map(([name, text]) => {
      const row = element("tr");
      row.append(element("th", { scope: "row" }, name));
      for (const key of Object.keys(SIDES)) {
        const cell = element("td", { "data-figure": name, "data-side": key }, "–");
        if (figures[key]) cell.textContent = text(figures[key], atPrevalence(figures[key], this.prevalence));
        if (figures[key] && name === "Recall") {
          const known = this.finding.verdicts.find(([threshold]) => key === "test" && threshold === this.threshold);
          const [word, look] = floorWord(figures[key].recall, this.finding.floor, known?.[1]);
          cell.append(" ", element("span", { class: `floor-word ${look}` }, `floor ${this.finding.floor} ${word}`));
        }
        row.append(cell);
      }
      return row;
    });
    this.part("figures").replaceChildren(...rows);
    this.tell(figures);
  }

  // What is shown, in a sentence; a screen reader hears it when the slider has come to rest.
  tell(figures) {
    const said = Object.entries(figures).map(([key, f]) => {
      const all = f.tn === 0 && f.fn === 0 ? ", calls everybody sick" : "";
      return `${SIDES[key].toLowerCase()} recall ${three(f.recall.value)}, specificity ${three(f.specificity.value)}${all}`;
    });
    const prevalence = `prevalence ${Number((100 * this.prevalence).toPrecision(4))}%`;
    const text = `Threshold ${short(this.threshold)}, ${prevalence}: ${said.join("; ")}.`;
    this.part("state").textContent = text;
    clearTimeout(this.waiting);
    this.waiting = setTimeout(() => { this.part("said").textContent = text; }, 400);
  }
}

// ---------------------------------------------------------------- errors to look at

function watchGallery(section) {
  const selects = [...section.querySelectorAll("select")];
  const cards = [...section.querySelectorAll(".card")];
  const fits = {
    kind: (card, value) => card.dataset.kind === value,
    side: (card, value) => card.dataset.side === value,
    finding: (card, value) => card.dataset.finding === value,
    model: (card, value) => JSON.parse(card.dataset.models).includes(Number(value)),
    group: (card, value) => JSON.parse(card.dataset.groups).includes(value),
  };
  const filter = () => {
    const chosen = selects.filter((select) => select.value !== "");
    cards.forEach((card) => { card.hidden = !chosen.every((s) => fits[s.dataset.role](card, s.value)); });
    const shown = cards.filter((card) => !card.hidden).length;
    section.querySelector('[data-role="count"]').textContent = `${shown} of ${cards.length} cards`;
  };
  selects.forEach((select) => select.addEventListener("change", filter));
  if (selects.length) filter();
  section.addEventListener("click", (event) => {
    const button = event.target.closest(".enlarge");
    if (button) enlarge(button, DATA.maps[Number(section.dataset.gallery)]?.[Number(button.dataset.card)] || []);
  });
}

// Show a picture large, with the maps that explain.py drew of it.
function enlarge(button, maps) {
  const dialog = document.getElementById("page.enlarged");
  const picture = button.querySelector("img");
  const shown = [element("img", { class: "large", src: picture.src, alt: picture.alt })];
  for (const [model, address] of maps) {
    const figure = element("figure");
    figure.append(element("img", { class: "map", src: address, alt: `Maps of ${model}` }));
    figure.append(element("figcaption", {}, `${model}: a map shows what moved the score, not where the disease is.`));
    shown.push(figure);
  }
  dialog.querySelector('[data-role="picture"]').replaceChildren(...shown);
  const about = button.closest(".card, [data-row]").querySelector(".about");
  dialog.querySelector('[data-role="about"]').replaceChildren(about.cloneNode(true));
  dialog.showModal();
}

// Only a table that does not fit is a stop of the tab key.
function markScrollers() {
  for (const box of document.querySelectorAll(".wide")) box.tabIndex = box.scrollWidth > box.clientWidth ? 0 : -1;
}

document.querySelectorAll(".panel").forEach((section) => {
  if (DATA.sets[Number(section.dataset.set)].models.length) new Panel(section);
});
document.querySelectorAll(".gallery").forEach(watchGallery);
markScrollers();
addEventListener("resize", markScrollers);
const dialog = document.getElementById("page.enlarged");
dialog.querySelector('[data-role="close"]').addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
