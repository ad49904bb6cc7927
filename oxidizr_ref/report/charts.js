// The curves: charts that share a range of steps and a cursor. No library; all numbers are in the element "data".
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const HEIGHT = 200, FIRST_HEIGHT = 280, LEFT = 56, RIGHT = 10, TOP = 8, BOTTOM = 22;
const view = { low: 0, high: 1, cursor: null, smoothing: 0 };
const charts = [], heats = [];

// --- small things -----------------------------------------------------------------------------------------------------

function element(tag, attributes = {}, text = "") {
  const svg = ["svg", "path", "line", "text", "rect", "circle"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

function unpacked(text, kind) {
  const octets = atob(text), bytes = new Uint8Array(octets.length);
  for (let i = 0; i < octets.length; i++) bytes[i] = octets.charCodeAt(i);
  return new kind(bytes.buffer); // little-endian, as every machine with a browser is
}

function shown(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e5) return Math.round(value).toLocaleString("en");
  return size && size < 1e-3 ? Number(value.toPrecision(4)).toExponential() : String(Number(value.toPrecision(5)));
}

// The index of the last number of an ascending array that is at most x; -1 where there is none.
function lastUpTo(ascending, x) {
  let low = -1, high = ascending.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (ascending[middle] <= x) low = middle; else high = middle;
  }
  return low;
}

function nearest(ascending, x) {
  const before = lastUpTo(ascending, x);
  if (before < 0) return 0;
  return before + 1 < ascending.length && ascending[before + 1] - x < x - ascending[before] ? before + 1 : before;
}

// Round numbers between low and high: 1, 2 or 5 times a power of ten apart; of logarithms whole powers, where several fit.
function ticks(low, high, about, logarithmic) {
  const span = high - low || 1, power = 10 ** Math.floor(Math.log10(span / about)), found = [];
  let apart = [1, 2, 5, 10].find(factor => factor * power >= span / about) * power;
  if (logarithmic && span >= 2) apart = Math.max(1, Math.ceil(apart));
  for (let i = Math.ceil(low / apart - 1e-9); i * apart <= high + 1e-9 * span; i++) found.push(i * apart);
  return found;
}

// Where steps stand in a picture so wide, and the step below a pointer that is over one.
function placesIn(width) {
  return step => LEFT + (step - view.low) / (view.high - view.low) * (width - LEFT - RIGHT);
}

function stepAt(picture, event) {
  const box = picture.getBoundingClientRect(), inside = box.width - LEFT - RIGHT;
  return view.low + Math.min(1, Math.max(0, (event.clientX - box.left - LEFT) / inside)) * (view.high - view.low);
}

for (const curves of data.runs.flatMap(run => [run.curves, ...run.branches]))
  curves.axes = curves.axes.map(axis => unpacked(axis, Float64Array));

// --- curves -----------------------------------------------------------------------------------------------------------

function makeCurves(chart) {
  const curves = [];
  data.runs.forEach((run, index) => {
    const several = data.runs.length > 1;
    for (const [place, [key, name]] of chart.curves.entries()) {
      if (!run.curves.columns[key]) continue;
      const label = [several ? run.name : "", name].filter(Boolean).join(" ");
      const colour = `run${(several ? index : place) % 4}`; // the colours tell runs apart, or else what is drawn of the one
      curves.push(curveOf(run.curves, key, label, colour, key === "eval_loss" ? "held" : ""));
    }
    for (const branch of run.branches)
      for (const [key] of chart.curves)
        if (branch.columns[key]) curves.push({ ...curveOf(branch, key, "", `run${index % 4}`, "left"), branch: true });
  });
  return curves;
}

function curveOf({ axes, columns }, key, label, colour, kind) {
  const ys = unpacked(columns[key].values, Float32Array);
  return { label, colour, kind, xs: axes[columns[key].axis], ys, smooth: ys };
}

// Exponential moving averages that weigh the first values as if they had always been there, each by its true share.
function smoothed(ys, weight) {
  if (!weight) return ys;
  const found = new Float32Array(ys.length);
  let sum = 0, share = 0;
  for (let i = 0; i < ys.length; i++) {
    sum = weight * sum + (1 - weight) * ys[i];
    share = weight * share + 1 - weight;
    found[i] = sum / share;
  }
  return found;
}

// The visible part as a path; where several points share a pixel column, its first, least, greatest and last. Counts them.
function pathOf(xs, ys, x, y, begin, end) {
  const path = [], many = end - begin > 2 * (x(view.high) - x(view.low));
  let drawn = 0, broken = true;
  const put = i => {
    const at = y(ys[i]);
    if (Number.isFinite(at)) {
      path.push(`${broken ? "M" : "L"}${x(xs[i]).toFixed(1)} ${at.toFixed(1)}`);
      drawn++;
    }
    broken = !Number.isFinite(at);
  };
  for (let i = begin; i < end; ) {
    const column = Math.floor(x(xs[i]));
    let last = i, least = i, greatest = i;
    while (many && last + 1 < end && Math.floor(x(xs[last + 1])) === column) {
      last++;
      if (ys[last] < ys[least]) least = last;
      if (ys[last] > ys[greatest]) greatest = last;
    }
    for (const place of new Set([i, ...[least, greatest].sort((a, b) => a - b), last])) put(place);
    i = last + 1;
  }
  return { path: path.join(""), drawn };
}

function makeChart(chart) {
  const figure = element("figure"), caption = element("figcaption"), svg = element("svg", { class: "chart", tabindex: 0 });
  const log = element("button", { type: "button", "aria-pressed": false, title: "logarithmic axis" }, "log");
  const made = { ...chart, svg, log, logarithmic: false, curves: makeCurves(chart), legends: [] };
  caption.append(element("b", {}, chart.title), element("span", { class: "note" }, chart.unit));
  for (const curve of made.curves.filter(curve => !curve.branch)) {
    const legend = element("span", { class: `legend ${curve.colour}` }), value = element("span");
    legend.append(element("i", { class: curve.kind }), element("span", {}, curve.label), value);
    caption.append(legend);
    made.legends.push({ curve, value });
  }
  log.addEventListener("click", () => toggleLog(made));
  caption.append(log);
  figure.append(caption, svg);
  document.getElementById("charts").append(figure);
  listen(made);
  return made;
}

function toggleLog(chart) {
  chart.logarithmic = !chart.logarithmic;
  chart.log.setAttribute("aria-pressed", chart.logarithmic);
  draw(chart);
}

function draw(chart) {
  const { svg, curves } = chart, width = Math.max(200, svg.clientWidth), height = chart === charts[0] ? FIRST_HEIGHT : HEIGHT;
  const scale = chart.logarithmic ? v => (v > 0 ? Math.log10(v) : NaN) : v => v;
  const x = placesIn(width);
  let low = Infinity, high = -Infinity;
  for (const curve of curves) {
    curve.begin = Math.max(0, lastUpTo(curve.xs, view.low));
    curve.end = Math.min(curve.xs.length, lastUpTo(curve.xs, view.high) + 2);
    for (let i = curve.begin; i < curve.end; i++) {
      const at = curve.xs[i] < view.low || curve.xs[i] > view.high ? NaN : scale(curve.ys[i]);
      if (at < low) low = at;
      if (at > high && at < Infinity) high = at;
    }
  }
  if (!(low <= high)) [low, high] = [0, 1];
  const margin = 0.06 * (high - low) || Math.abs(0.1 * low) || 0.5;
  [low, high] = [low - margin, high + margin];
  const y = value => height - BOTTOM - (scale(value) - low) / (high - low) * (height - TOP - BOTTOM);
  chart.x = x;
  chart.drawn = 0;
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.style.height = `${height}px`;
  drawGrid(chart, x, low, high, width, height);
  const clip = element("svg", { x: LEFT, y: 0, width: width - LEFT - RIGHT, height, viewBox: `${LEFT} 0 ${width - LEFT - RIGHT} ${height}` });
  for (const change of data.runs.flatMap(run => run.changes))
    clip.append(element("line", { class: "change", x1: x(change.step), x2: x(change.step), y1: TOP, y2: height - BOTTOM }));
  for (const curve of curves) drawCurve(chart, clip, curve, x, y);
  chart.line = element("line", { class: "cursor", y1: TOP, y2: height - BOTTOM, visibility: "hidden" });
  chart.chosen = element("rect", { class: "chosen", y: TOP, height: height - TOP - BOTTOM, width: 0 });
  clip.append(chart.chosen, chart.line);
  svg.append(clip);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", inWords(chart));
  readOut(chart);
}

function drawGrid(chart, x, low, high, width, height) {
  for (const at of ticks(low, high, height / 45, chart.logarithmic)) {
    const place = height - BOTTOM - (at - low) / (high - low) * (height - TOP - BOTTOM);
    chart.svg.append(element("path", { class: "grid", d: `M${LEFT} ${place.toFixed(1)}H${width - RIGHT}` }));
    const value = chart.logarithmic ? Number((10 ** at).toPrecision(3)) : Number(at.toPrecision(6));
    chart.svg.append(element("text", { x: LEFT - 6, y: place + 4, "text-anchor": "end" }, shown(value)));
  }
  for (const step of ticks(view.low, view.high, Math.max(2, width / 90), false)) {
    if (!Number.isInteger(step)) continue;
    const anchor = x(step) > width - 40 ? "end" : "middle";
    const place = anchor === "end" ? width - 2 : x(step);
    chart.svg.append(element("text", { x: place, y: height - 5, "text-anchor": anchor }, step.toLocaleString("en")));
  }
}

function drawCurve(chart, clip, curve, x, y) {
  const kind = `curve ${curve.colour} ${curve.kind}`;
  if (view.smoothing && !curve.branch)
    clip.append(element("path", { class: `${kind} faint`, d: pathOf(curve.xs, curve.ys, x, y, curve.begin, curve.end).path }));
  const { path, drawn } = pathOf(curve.xs, curve.branch ? curve.ys : curve.smooth, x, y, curve.begin, curve.end);
  clip.append(element("path", { class: kind, d: path }));
  chart.drawn += drawn;
  if (curve.end - curve.begin <= 40 && !curve.branch)
    for (let i = curve.begin; i < curve.end; i++)
      if (Number.isFinite(y(curve.smooth[i])))
        clip.append(element("circle", { class: `dot ${curve.colour}`, r: 2.5, cx: x(curve.xs[i]), cy: y(curve.smooth[i]) }));
}

function inWords(chart) {
  const words = chart.legends.map(({ curve }) => {
    const last = curve.xs.length - 1;
    return `${curve.label} from ${shown(curve.ys[0])} at step ${curve.xs[0]} to ${shown(curve.ys[last])} at step ${curve.xs[last]}`;
  });
  return `${chart.title}: ${words.join("; ")}`;
}

// The values at the logged step nearest to the cursor; without one, the last.
function readOut(chart) {
  for (const { curve, value } of chart.legends) {
    const place = view.cursor === null ? curve.xs.length - 1 : nearest(curve.xs, view.cursor);
    const step = view.cursor !== null && curve.xs[place] !== view.cursor ? ` (at ${curve.xs[place].toLocaleString("en")})` : "";
    value.textContent = shown(curve.smooth[place]) + step;
  }
  const seen = view.cursor !== null && view.cursor >= view.low && view.cursor <= view.high;
  chart.line.setAttribute("visibility", seen ? "visible" : "hidden");
  if (seen) for (const end of ["x1", "x2"]) chart.line.setAttribute(end, chart.x(view.cursor));
}

// --- the cursor and the range -----------------------------------------------------------------------------------------

// All logged steps of all runs, ascending: where the cursor may stand.
const steps = Float64Array.from(new Set(data.runs.flatMap(run => run.curves.axes.flatMap(axis => [...axis])))).sort();
const first = steps.length ? steps[0] : 0, last = steps.length > 1 ? steps[steps.length - 1] : first + 1;

function pointAt(step) {
  view.cursor = step === null || !steps.length ? null : steps[nearest(steps, step)];
  charts.forEach(readOut);
  heats.forEach(readHeat);
  tellWhere();
}

function show(low, high) {
  const span = Math.min(Math.max(high - low, Math.min(2, last - first)), last - first);
  view.low = Math.min(Math.max(low, first), last - span);
  view.high = view.low + span;
  drawAll();
}

function zoom(factor, about = view.cursor ?? (view.low + view.high) / 2) {
  show(about - (about - view.low) * factor, about + (view.high - about) * factor);
}

function tellWhere() {
  const [low, high] = [Math.ceil(view.low), Math.floor(view.high)].map(step => step.toLocaleString("en"));
  const cursor = view.cursor === null ? "" : `step ${view.cursor.toLocaleString("en")} · `;
  document.getElementById("where").textContent = `${cursor}steps ${low} to ${high}`;
}

function drawAll() {
  charts.forEach(draw);
  heats.forEach(drawHeat);
  tellWhere();
}

function listen(chart) {
  const { svg } = chart;
  let from = null;
  svg.addEventListener("pointerdown", event => {
    pointAt(stepAt(svg, event));
    if (event.pointerType === "mouse" && !event.button) from = event.clientX; // a finger moves the cursor
  });
  svg.addEventListener("pointermove", event => {
    pointAt(stepAt(svg, event));
    if (from === null) return;
    const left = svg.getBoundingClientRect().left;
    chart.chosen.setAttribute("x", Math.min(from, event.clientX) - left);
    chart.chosen.setAttribute("width", Math.abs(event.clientX - from));
  });
  addEventListener("pointerup", event => {
    if (from === null) return;
    const wide = Math.abs(event.clientX - from) > 5;
    const ends = [{ clientX: from }, event].map(place => stepAt(svg, place)).sort((a, b) => a - b);
    from = null;
    if (wide) show(...ends); else chart.chosen.setAttribute("width", 0);
  });
  svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") pointAt(null); });
  svg.addEventListener("dblclick", () => show(first, last));
  svg.addEventListener("wheel", event => {
    if (!event.ctrlKey && !event.metaKey && document.activeElement !== svg) return; // else nobody could scroll past it
    event.preventDefault();
    zoom(event.deltaY < 0 ? 0.8 : 1.25, stepAt(svg, event));
  }, { passive: false });
  svg.addEventListener("keydown", event => onKey(event, chart));
}

function onKey(event, chart) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const place = view.cursor === null ? steps.length - 1 : nearest(steps, view.cursor), far = event.shiftKey ? 10 : 1;
  const acts = {
    ArrowLeft: () => pointAt(steps[Math.max(0, place - far)]),
    ArrowRight: () => pointAt(steps[Math.min(steps.length - 1, place + far)]),
    Home: () => pointAt(first), End: () => pointAt(last), "+": () => zoom(0.8), "-": () => zoom(1.25),
    0: () => show(first, last), Escape: () => pointAt(null), l: () => toggleLog(chart), L: () => toggleLog(chart),
  };
  if (!acts[event.key]) return;
  event.preventDefault();
  acts[event.key]();
  const values = chart.legends.map(({ curve, value }) => `${curve.label} ${value.textContent}`).join(", ");
  document.getElementById("spoken").textContent = view.cursor === null ? "" : `step ${view.cursor}: ${values}`;
}
