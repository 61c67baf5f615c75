"use strict";
// The page is complete without this script: drawings become charts with values and zoom,
// steps under each other become a slider, and tables can be sorted.

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function short(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  const digits = size && (size < 1e-4 || size >= 1e5) ? value.toExponential(2) : value.toPrecision(4);
  return digits.includes("e") ? digits.replace(/\.?0+e/, "e") : String(Number(digits));
}

// ------------------------------------------------------------------ a page that loads itself again

const KEY = `report ${location.pathname}`;

// What the reader had chosen before the page loaded itself again; {} otherwise.
function chosenBefore() {
  try {
    const text = sessionStorage.getItem(KEY);
    sessionStorage.removeItem(KEY);
    return JSON.parse(text) ?? {};
  } catch {
    return {};
  }
}

const before = chosenBefore();

// Texts that open, by their place: new steps may come before them.
function* folded() {
  const seen = {};
  for (const details of all("details")) {
    const section = details.closest("section")?.id ?? "";
    const step = details.closest(".slide")?.dataset.step ?? "";
    const name = `${section}/${step}/${details.querySelector("summary").textContent}`;
    seen[name] = (seen[name] ?? 0) + 1;
    yield [`${name}/${seen[name]}`, details];
  }
}

for (const [name, details] of folded()) {
  if (before.open && name in before.open) details.open = before.open[name];
}

function loadAgain() {
  // Not while somebody looks closely.
  if (charts.some(zoomed) || document.fullscreenElement) return;
  const open = Object.fromEntries([...folded()].map(([name, details]) => [name, details.open]));
  const steps = sliders.map((slider) => slider.chosenStep());
  try {
    sessionStorage.setItem(KEY, JSON.stringify({ open, steps, scroll: scrollY }));
  } catch {
    // Without storage the page begins at its top.
  }
  location.reload();
}

// ------------------------------------------------------------------ curves

// A box beside the pointer: the step, and the value of every curve there.
function valuesAtPointer() {
  const box = document.createElement("div");
  box.className = "values";
  return {
    hooks: {
      init: (chart) => chart.over.append(box),
      setCursor: (chart) => {
        const { idx, left, top } = chart.cursor;
        box.hidden = idx === null || idx === undefined || left < 0;
        if (box.hidden) return;
        box.replaceChildren(`step ${chart.data[0][idx]}`);
        chart.series.slice(1).forEach((series, i) => {
          const value = chart.data[i + 1][idx];
          if (value === null || value === undefined) return;
          const line = document.createElement("div");
          const dot = document.createElement("i");
          dot.style.background = series.stroke();
          line.append(dot, `${series.label} ${short(value)}`);
          box.append(line);
        });
        // On the side with more room.
        const right = left > chart.over.clientWidth / 2;
        box.style.left = right ? "" : `${left + 12}px`;
        box.style.right = right ? `${chart.over.clientWidth - left + 12}px` : "";
        box.style.top = `${Math.max(0, Math.min(top, chart.over.clientHeight - box.offsetHeight))}px`;
      },
    },
  };
}

function drawCurves(place) {
  const { log, curves } = JSON.parse(place.dataset.plot);
  const size = () => ({ width: place.clientWidth, height: Math.round(place.clientWidth * 0.52) });
  const axis = {
    stroke: () => css("--muted"),
    font: "11px system-ui, sans-serif",
    grid: { stroke: () => css("--line"), width: 1 },
    ticks: { show: false },
    values: (_, splits) => splits.map(short),
  };
  const options = {
    ...size(),
    legend: { show: false },
    cursor: { drag: { x: true, y: false }, y: false },
    scales: { x: { time: false }, y: { distr: log ? 3 : 1 } },
    axes: [{ ...axis, grid: { show: false }, size: 24, gap: 4 }, { ...axis, size: 52 }],
    series: [
      {},
      ...curves.map((curve) => ({
        label: curve.name,
        stroke: curve.color + (curve.faint ? "66" : ""),
        width: curve.faint ? 1 : 2,
        spanGaps: true,
        points: { show: curve.x.length <= 12, size: 5, fill: curve.color },
      })),
    ],
    plugins: [valuesAtPointer()],
  };
  place.replaceChildren();
  const chart = new uPlot(options, uPlot.join(curves.map((c) => [c.x, c.y])), place);
  place.title = "drag to zoom, double-click for all steps";
  new ResizeObserver(() => chart.setSize(size())).observe(place);
  return chart;
}

const charts = all("[data-plot]").map(drawCurves);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  charts.forEach((chart) => chart.redraw(false, true));
});

const zoomed = (chart) => {
  const steps = chart.data[0];
  return chart.scales.x.min > steps[0] || chart.scales.x.max < steps[steps.length - 1];
};

// ------------------------------------------------------------------ sliders

const sliders = [];

for (const box of all(".slides")) {
  const slides = [...box.children];
  if (slides.length < 2) continue;
  const last = slides.length - 1;
  const slider = document.createElement("input");
  const step = before.steps?.[sliders.length];
  const place = slides.findIndex((slide) => slide.dataset.step === step);
  Object.assign(slider, { type: "range", min: 0, max: last, value: place < 0 ? last : place });
  const said = document.createElement("output");
  const label = document.createElement("label");
  label.className = "slider";
  label.append(slider, said);
  slider.addEventListener("input", () => {
    slides.forEach((slide, i) => {
      slide.hidden = i !== Number(slider.value);
    });
    const chosen = slides[slider.value];
    said.textContent = `step ${chosen.dataset.step}`;
    slider.setAttribute("aria-valuetext", said.textContent);
    // A hidden film may have been paused; a browser that forbids playing shows its first frame.
    all("video", chosen).forEach((film) => film.play().catch(() => {}));
  });
  box.before(label);
  box.classList.add("chosen");
  slider.dispatchEvent(new Event("input"));
  // Who looks at the last step wants the new last step.
  slider.chosenStep = () => (Number(slider.value) === last ? null : slides[slider.value].dataset.step);
  sliders.push(slider);
}

// ------------------------------------------------------------------ tables

// The value of a cell: a number where it has one. What is missing comes last either way.
function cellValue(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.value ?? cell.textContent.trim();
  const value = Number(text);
  return text === "" ? null : Number.isNaN(value) ? text : value;
}

function sortRows(table, column, sign) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, value: cellValue(row, column) }));
  rows.sort((a, b) => {
    if (a.value === null || b.value === null) return (a.value === null) - (b.value === null);
    if (typeof a.value === "number" && typeof b.value === "number") return sign * (a.value - b.value);
    return sign * String(a.value).localeCompare(String(b.value));
  });
  body.append(...rows.map(({ row }) => row));
}

for (const table of all("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = head.ariaSort === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.ariaSort = order;
      sortRows(table, column, order === "ascending" ? 1 : -1);
    });
  });
}

// ------------------------------------------------------------------ back to where the reader was

if (before.scroll !== undefined) {
  history.scrollRestoration = "manual";
  scrollTo(0, before.scroll);
  // Films that were not measured yet move what is below them.
  addEventListener("load", () => scrollTo(0, before.scroll));
}
const seconds = Number(document.body.dataset.refresh);
// From when all films are there, so that a slow machine gets to show the page.
if (seconds > 0) addEventListener("load", () => setInterval(loadAgain, seconds * 1000));
