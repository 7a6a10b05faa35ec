"use strict";
// Draw the charts, hide runs and switch tabs. Content of a run's files is used as text or data, never as markup.

const report = JSON.parse(document.getElementById("report").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 640px)");
// All buttons of the mode bar. Plotly's own choice differs between versions and includes one that sends the chart away.
const modeBarButtons = [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]];
const state = { hidden: new Set(), axis: "steps" };
const drawn = new Set();

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const runColor = (run) => color(`--run-${run % 10}`);

/** Interpolate linearly at the sorted positions `x` through the points (`xs`, `ys`). */
function interpolate(x, xs, ys) {
  let i = 1;
  return x.map((at) => {
    while (i < xs.length - 1 && xs[i] < at) i += 1;
    if (xs.length < 2) return ys[0] ?? null;
    const width = xs[i] - xs[i - 1];
    const fraction = width ? (at - xs[i - 1]) / width : 1;
    return ys[i - 1] + fraction * (ys[i] - ys[i - 1]);
  });
}

/** Convert steps of a run to the unit of the selected axis. */
function convertSteps(steps, run) {
  const { batch_size: batch, clock } = report.runs[run];
  if (state.axis === "images") return steps.map((step) => (batch === null ? null : step * batch));
  if (state.axis === "hours") return interpolate(steps, clock[0], clock[1]);
  return steps;
}

/** Return a trace with its colors, the unit of the selected axis and its visibility. */
function styled(trace) {
  const { run, paper, has_steps: hasSteps, heatmap } = trace.meta;
  const result = { ...trace, visible: run === undefined || !state.hidden.has(run) };
  if (heatmap) {
    // A power scale, so that small shares are visible.
    const [low, high] = [color("--surface"), color("--heat")];
    const scale = [0.01, 0.05, 0.2, 1].map((share) => [share, blend(low, high, share ** 0.35)]);
    return { ...result, colorscale: [[0, low], ...scale] };
  }
  const traceColor = paper === undefined ? runColor(run) : color(`--paper-${paper}`);
  const edge = trace.marker?.symbol === "star" ? { width: 1, color: color("--surface") } : {};
  result.line = { ...trace.line, color: traceColor };
  result.marker = { ...trace.marker, color: traceColor, line: { ...trace.marker?.line, ...edge } };
  if (trace.error_y) result.error_y = { ...trace.error_y, color: traceColor };
  if (hasSteps) result.x = convertSteps(trace.x, run);
  return result;
}

/** Interpolate between two colors of the form #rrggbb. */
function blend(from, to, fraction) {
  const parts = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
  const [a, b] = [parts(from), parts(to)];
  return `rgb(${a.map((value, i) => Math.round(value + fraction * (b[i] - value))).join(",")})`;
}

/** Return a Plotly axis in the colors of the page. */
function axis(layout, title) {
  return {
    ...layout,
    title: { ...layout?.title, text: title ?? layout?.title?.text, font: { size: 12, color: color("--muted") }, standoff: 8 },
    gridcolor: color("--grid"), zerolinecolor: color("--line"), linecolor: color("--line"),
    tickfont: { size: 11, color: color("--muted") },
  };
}

/** Draw or redraw a chart. */
function draw(element) {
  const { data, layout } = report.figures[element.id];
  const hasSteps = data.some((trace) => trace.meta.has_steps);
  const units = { steps: "steps", images: "images seen", hours: "hours, pauses included" };
  drawn.add(element);
  return Plotly.react(
    element,
    data.map(styled),
    {
      ...layout,
      autosize: true,
      // Space for the mode bar above the plot, where there is one.
      margin: { ...layout.margin, t: narrow.matches ? 8 : 32 },
      modebar: { bgcolor: color("--surface"), color: color("--muted"), activecolor: color("--text") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("--text") },
      hoverlabel: { bgcolor: color("--surface"), bordercolor: color("--line"), font: { color: color("--text") }, align: "left" },
      legend: { orientation: "h", y: -0.18, yanchor: "top", x: 0, font: { size: 11 }, itemsizing: "constant" },
      // Dragging scrolls the page on touch screens and zooms elsewhere.
      dragmode: matchMedia("(pointer: coarse)").matches || narrow.matches ? false : "zoom",
      uirevision: state.axis,
      xaxis: axis(layout.xaxis, hasSteps ? units[state.axis] : undefined),
      yaxis: axis(layout.yaxis),
    },
    { responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : "hover",
      modeBarButtons, showSendToCloud: false, plotlyServerURL: "" },
  );
}

/** Draw the charts of an opened tab; hidden elements have no width to draw into. */
function drawVisible() {
  for (const element of document.querySelectorAll(".chart"))
    if (!drawn.has(element) && element.offsetParent !== null) draw(element);
}

const redraw = () => drawn.forEach((element) => element.offsetParent !== null ? draw(element) : drawn.delete(element));

for (const input of document.querySelectorAll(".chip input"))
  input.addEventListener("change", () => {
    const run = Number(input.value);
    state.hidden[input.checked ? "delete" : "add"](run);
    for (const element of document.querySelectorAll(`[data-run="${run}"]`)) element.hidden = !input.checked;
    redraw();
  });

for (const input of document.querySelectorAll(".choice input"))
  input.addEventListener("change", () => { state.axis = input.value; redraw(); });

for (const list of document.querySelectorAll("[role=tablist]")) {
  const tabs = [...list.querySelectorAll("[role=tab]")];
  const select = (tab) => {
    for (const other of tabs) {
      const isSelected = other === tab;
      other.setAttribute("aria-selected", isSelected);
      other.tabIndex = isSelected ? 0 : -1;
      document.getElementById(other.getAttribute("aria-controls")).hidden = !isSelected;
    }
    drawVisible();
  };
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(index + step + tabs.length) % tabs.length];
      select(next);
      next.focus();
    });
  });
}

dark.addEventListener("change", redraw);
narrow.addEventListener("change", redraw);
drawVisible();
document.documentElement.dataset.ready = "true";
