// Heat maps of the experts and histograms of the tensors, beside the curves of charts.js; and the start of all of it.

// --- experts ----------------------------------------------------------------------------------------------------------

function makeHeats(place, run) {
  const { first: begins, last: ends, layers } = run.experts;
  return layers.map(layer => {
    const canvas = element("canvas", { role: "img" }), text = element("p");
    const block = element("div");
    block.append(element("b", {}, layer.name), canvas, text);
    place.append(block);
    const load = unpacked(layer.load, Float32Array);
    canvas.setAttribute("aria-label", `Share of tokens of each of ${layer.experts} experts of ${layer.name} over the steps`);
    const heat = { canvas, text, begins, ends, load, experts: layer.experts, drawn: 0 };
    canvas.addEventListener("pointermove", event => pointAt(stepAt(canvas, event)));
    canvas.addEventListener("pointerleave", () => pointAt(null));
    return heat;
  });
}

// Blue for an idle expert, grey for an even share, orange for twice that or more.
function colourOf(ratio) {
  const ends = ratio < 1 ? [[24, 66, 140], [190, 196, 204]] : [[190, 196, 204], [217, 72, 15]];
  const part = Math.min(1, ratio < 1 ? ratio : ratio - 1);
  return `rgb(${ends[0].map((from, i) => Math.round(from + part * (ends[1][i] - from))).join()})`;
}

function drawHeat(heat) {
  const { canvas, begins, load, experts } = heat, width = Math.max(200, canvas.clientWidth);
  const row = Math.max(4, Math.min(18, 160 / experts)), dots = window.devicePixelRatio || 1;
  [canvas.width, canvas.height] = [width * dots, row * experts * dots];
  canvas.style.height = `${row * experts}px`;
  const pen = canvas.getContext("2d");
  pen.scale(dots, dots);
  pen.beginPath();
  pen.rect(LEFT, 0, width - LEFT - RIGHT, row * experts);
  pen.clip();
  const x = placesIn(width);
  heat.drawn = 0;
  for (let i = 0; i < begins.length; i++) { // a column reaches from its first step to that of the next one
    const from = x(i ? begins[i] : Math.min(view.low, begins[0])), to = i + 1 < begins.length ? x(begins[i + 1]) : width;
    if (to < LEFT || from > width) continue;
    heat.drawn++;
    for (let e = 0; e < experts; e++) {
      pen.fillStyle = colourOf(load[i * experts + e] * experts);
      pen.fillRect(Math.floor(from), e * row, Math.ceil(to) - Math.floor(from), row - (row > 6 ? 1 : 0));
    }
  }
  readHeat(heat);
}

function readHeat({ text, begins, ends, load, experts }) {
  const i = view.cursor === null ? begins.length - 1 : Math.max(0, lastUpTo(begins, view.cursor));
  const shares = [...load.subarray(i * experts, (i + 1) * experts)].map(share => 100 * share);
  const range = begins[i] === ends[i] ? `step ${ends[i]}` : `mean of steps ${begins[i]} to ${ends[i]}`;
  const each = shares.map((share, e) => `${e}: ${share.toFixed(1)} %`).join(", ");
  const widest = `least ${Math.min(...shares).toFixed(1)} %, most ${Math.max(...shares).toFixed(1)} %`;
  text.textContent = `${range}: ${experts <= 8 ? each : widest}`;
}

// --- histograms -------------------------------------------------------------------------------------------------------

const KINDS = [["weights", "Weights"], ["exp_avg", "First moments (exp_avg), for the gradients"]];

function makeSpread(place, run, index) {
  const { steps: kept, groups } = run.histograms;
  const label = element("label", {}, "tensors of "), select = element("select"), panels = element("div", { class: "panels" });
  groups.forEach(group => select.append(element("option", {}, group.name)));
  label.append(select);
  place.append(label, panels);
  const redraw = () => {
    const group = groups[select.selectedIndex];
    const shownKinds = KINDS.filter(([kind]) => group[kind]), made = shownKinds.map(() => element("div"));
    panels.replaceChildren(...made); // first, so that their width is known
    shownKinds.forEach(([kind, title], i) => {
      const curves = ridges(kept, group[kind], made[i].clientWidth);
      curves.classList.add(`run${index % 4}`);
      made[i].append(element("b", {}, title), curves, spreadTable(kept, group[kind]));
    });
  };
  select.addEventListener("change", redraw);
  return redraw;
}

function ridges(kept, { low, high, shares }, room) {
  const width = Math.max(200, room), apart = 22, tall = 70;
  const height = tall + apart * (kept.length - 1) + 28, bins = shares[0].length;
  const svg = element("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img" });
  svg.style.cursor = "auto";
  svg.setAttribute("aria-label", `Histograms between ${shown(low)} and ${shown(high)} at steps ${kept.join(", ")}`);
  const x = bin => 4 + bin / bins * (width - 66);
  shares.forEach((row, i) => {
    const base = tall + apart * i, most = Math.max(...row) || 1;
    const line = row.map((share, bin) => `L${x(bin + 0.5).toFixed(1)} ${(base - share / most * (tall - 8)).toFixed(1)}`).join("");
    svg.append(element("path", { class: "ridge", d: `M${x(0)} ${base}${line}L${x(bins)} ${base}Z` }));
    svg.append(element("text", { x: width - 4, y: base, "text-anchor": "end" }, kept[i].toLocaleString("en")));
  });
  for (const at of ticks(low, high, 4, false)) {
    const place = x((at - low) / (high - low) * bins), value = shown(Number(at.toPrecision(6)));
    if (place > 20 && place < width - 80) svg.append(element("text", { x: place, y: height - 6, "text-anchor": "middle" }, value));
  }
  svg.append(element("text", { x: width - 4, y: height - 6, "text-anchor": "end" }, "step"));
  return svg;
}

function spreadTable(kept, { spreads }) {
  const table = element("table"), head = element("tr");
  const bad = spreads.some(spread => spread.not_finite);
  const columns = ["step", "mean", "deviation", "least", "greatest", ...(bad ? ["not finite"] : [])];
  head.append(...columns.map(name => element("th", { scope: "col" }, name)));
  table.append(head);
  spreads.forEach((spread, i) => {
    const row = element("tr"), numbers = [spread.mean, spread.deviation, spread.smallest, spread.largest];
    const cells = [kept[i].toLocaleString("en"), ...numbers.map(number => shown(Number(number.toPrecision(3))))];
    row.append(...[...cells, ...(bad ? [spread.not_finite] : [])].map(text => element("td", {}, text)));
    table.append(row);
  });
  return table;
}

// --- the start --------------------------------------------------------------------------------------------------------

const spreads = [];
const controls = document.getElementById("controls");
[view.low, view.high] = [first, last];
if (controls) {
  charts.push(...data.charts.map(makeChart));
  for (const place of document.querySelectorAll(".heat")) heats.push(...makeHeats(place, data.runs[place.dataset.run]));
  const slider = document.getElementById("smoothing");
  slider.addEventListener("input", () => {
    view.smoothing = Number(slider.value);
    slider.nextElementSibling.textContent = slider.value;
    for (const chart of charts) for (const curve of chart.curves) curve.smooth = smoothed(curve.ys, view.smoothing);
    charts.forEach(draw);
  });
  controls.addEventListener("submit", event => event.preventDefault());
  for (const [id, act] of [["closer", () => zoom(0.5)], ["wider", () => zoom(2)], ["all", () => show(first, last)]])
    document.getElementById(id).addEventListener("click", act);
  drawAll();
}
for (const place of document.querySelectorAll(".spread"))
  spreads.push(makeSpread(place, data.runs[place.dataset.run], Number(place.dataset.run)));
spreads.forEach(redraw => redraw());

let width = document.body.clientWidth;
addEventListener("resize", () => {
  if (document.body.clientWidth === width) return; // a phone's address bar that hides changes the height alone
  width = document.body.clientWidth;
  if (controls) drawAll();
  spreads.forEach(redraw => redraw());
});
