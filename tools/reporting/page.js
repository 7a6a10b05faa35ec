"use strict";
// Draws the charts of the report, hides runs, and moves between tabs. Everything that comes from a run's
// files is set as text or as data, never as markup.

const report = JSON.parse(document.getElementById("report").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 640px)");
const state = { hidden: new Set(), axis: "steps" };
const drawn = new Set();

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const runColor = (run) => color(`--run-${run % 10}`);

/** Values of `values` at `at`, by straight lines through the sorted `places`. */
function interpolate(at, places, values) {
  let i = 1;
  return at.map((x) => {
    while (i < places.length - 1 && places[i] < x) i += 1;
    if (places.length < 2) return values[0] ?? null;
    const width = places[i] - places[i - 1];
    const share = width ? (x - places[i - 1]) / width : 1;
    return values[i - 1] + share * (values[i] - values[i - 1]);
  });
}

/** Steps of a run in the unit of the chosen axis. */
function counted(steps, run) {
  const { batch_size: batch, clock } = report.runs[run];
  if (state.axis === "images") return steps.map((step) => (batch === null ? null : step * batch));
  if (state.axis === "hours") return interpolate(steps, clock[0], clock[1]);
  return steps;
}

/** A trace of the report as it is drawn now: coloured, counted, hidden or not. */
function dressed(trace) {
  const { run, paper, of_steps: ofSteps, heatmap } = trace.meta;
  const result = { ...trace, visible: run === undefined || !state.hidden.has(run) };
  if (heatmap) {
    const [none, most] = [color("--surface"), color("--heat")];
    // A small share is what one looks for: the colour rises fast, then slowly.
    const stops = [0, 0.01, 0.05, 0.2, 1].map((share) => [share, blend(none, most, share ** 0.35)]);
    return { ...result, colorscale: [[0, none], ...stops.slice(1)] };
  }
  const own = paper === undefined ? runColor(run) : color(`--paper-${paper}`);
  const edge = trace.marker?.symbol === "star" ? { width: 1, color: color("--surface") } : {};
  result.line = { ...trace.line, color: own };
  result.marker = { ...trace.marker, color: own, line: { ...trace.marker?.line, ...edge } };
  if (trace.error_y) result.error_y = { ...trace.error_y, color: own };
  if (ofSteps) result.x = counted(trace.x, run);
  return result;
}

/** A colour between two of the form #rrggbb. */
function blend(from, to, share) {
  const parts = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
  const [a, b] = [parts(from), parts(to)];
  return `rgb(${a.map((value, i) => Math.round(value + share * (b[i] - value))).join(",")})`;
}

function axis(own, title) {
  return {
    ...own,
    title: { ...own?.title, text: title ?? own?.title?.text, font: { size: 12, color: color("--muted") }, standoff: 8 },
    gridcolor: color("--grid"), zerolinecolor: color("--line"), linecolor: color("--line"),
    tickfont: { size: 11, color: color("--muted") },
  };
}

/** Draws a chart, or draws it again after something has changed. */
function draw(element) {
  const { data, layout } = report.figures[element.id];
  const ofSteps = data.some((trace) => trace.meta.of_steps);
  const units = { steps: "steps", images: "images seen", hours: "hours, pauses included" };
  drawn.add(element);
  return Plotly.react(
    element,
    data.map(dressed),
    {
      ...layout,
      autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("--text") },
      hoverlabel: { bgcolor: color("--surface"), bordercolor: color("--line"), font: { color: color("--text") }, align: "left" },
      legend: { orientation: "h", y: -0.18, yanchor: "top", x: 0, font: { size: 11 }, itemsizing: "constant" },
      // A finger scrolls the page; a mouse zooms.
      dragmode: matchMedia("(pointer: coarse)").matches || narrow.matches ? false : "zoom",
      uirevision: state.axis,
      xaxis: axis(layout.xaxis, ofSteps ? units[state.axis] : undefined),
      yaxis: axis(layout.yaxis),
    },
    { responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : "hover",
      modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] },
  );
}

/** Draws what has come into view by opening a tab; what is hidden has no width to be drawn in. */
function drawShown() {
  for (const element of document.querySelectorAll(".chart"))
    if (!drawn.has(element) && element.offsetParent !== null) draw(element);
}

const redraw = () => drawn.forEach((element) => element.offsetParent !== null ? draw(element) : drawn.delete(element));

for (const input of document.querySelectorAll(".chip input"))
  input.addEventListener("change", () => {
    const run = Number(input.value);
    state.hidden[input.checked ? "delete" : "add"](run);
    for (const element of document.querySelectorAll(`[data-of="${run}"]`)) element.hidden = !input.checked;
    redraw();
  });

for (const input of document.querySelectorAll(".choice input"))
  input.addEventListener("change", () => { state.axis = input.value; redraw(); });

for (const list of document.querySelectorAll("[role=tablist]")) {
  const tabs = [...list.querySelectorAll("[role=tab]")];
  const select = (tab) => {
    for (const other of tabs) {
      const chosen = other === tab;
      other.setAttribute("aria-selected", chosen);
      other.tabIndex = chosen ? 0 : -1;
      document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
    }
    drawShown();
  };
  tabs.forEach((tab, place) => {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(place + step + tabs.length) % tabs.length];
      select(next);
      next.focus();
    });
  });
}

dark.addEventListener("change", redraw);
narrow.addEventListener("change", redraw);
drawShown();
document.documentElement.dataset.ready = "true";
