// Draws the report's charts from the data in the page, in the colours of the page's scheme.
(() => {
  "use strict";

  const study = JSON.parse(document.getElementById("study-data").textContent);
  const root = document.documentElement;
  const plots = [...document.querySelectorAll(".plot")];
  const styles = new Map(study.norms.map((norm) => [norm.norm, norm]));
  const hidden = new Set();
  let logarithmic = Object.values(study.charts).some((chart) => chart.log);

  // A style is a colour, a marker and a dash; their numbers have no common divisor, so that no two styles are alike.
  const COLOURS = 8;
  const DASHES = ["1.5px,3px", "solid", "8px,3px", "4px,2px", "8px,3px,1.5px,3px"];
  const MARKERS = [
    ["circle", "M14 2.5a3.5 3.5 0 1 0 .01 0z"],
    ["square", "M11 3h6v6h-6z"],
    ["diamond", "M14 1.5l4.5 4.5-4.5 4.5-4.5-4.5z"],
    ["triangle-up", "M14 1.7l4.4 7.6h-8.8z"],
    ["triangle-down", "M14 10.3l4.4-7.6h-8.8z"],
    ["cross", "M12.7 2h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z"],
    ["star", "M14 1l1.5 3.4 3.6.4-2.7 2.4.8 3.6-3.2-1.9-3.2 1.9.8-3.6-2.7-2.4 3.6-.4z"],
  ];

  const token = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const colour = (norm) => token(`norm-${styles.get(norm).style % COLOURS}`);
  const dash = (norm) => DASHES[styles.get(norm).style % DASHES.length];
  const marker = (norm) => MARKERS[styles.get(norm).style % MARKERS.length][0];
  // Plotly reads a little HTML in its texts; what comes from outside is text.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const title = (norm) => plain(styles.get(norm).title);

  function axis(more) {
    return {
      gridcolor: token("grid"), linecolor: token("line"), zeroline: false, automargin: true,
      tickfont: { color: token("quiet"), size: 12 },
      ...more,
    };
  }

  function layout(plot, more) {
    return {
      width: plot.clientWidth, height: plot.clientHeight, margin: { l: 56, r: 16, t: 16, b: 48 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: token("ink") },
      hoverlabel: { bgcolor: token("raised"), bordercolor: token("line"), font: { color: token("ink"), size: 13 } },
      hovermode: "closest", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      ...more,
    };
  }

  // Plotly labels the 2 and 5 of a decade by their digit alone; here every label is the whole number.
  function logAxis(values) {
    const positive = values.filter((value) => value > 0);
    const [first, last] = [Math.min(...positive), Math.max(...positive)].map((value) => Math.floor(Math.log10(value)));
    const ticks = [];
    for (let decade = first; decade <= last && positive.length; decade += 1) {
      for (const digit of last - first > 3 ? [1] : [1, 2, 5]) ticks.push(Number(`${digit}e${decade}`));
    }
    return { type: "log", tickvals: ticks, ticktext: ticks.map((tick) => (tick < 1e-4 ? tick.toExponential() : String(tick))) };
  }

  // Score, time and memory against the batch size

  function dodge(chart, size, place, count) {
    const logs = chart.ticks.map(Math.log2);
    const gaps = logs.slice(1).map((value, index) => value - logs[index]);
    const room = 0.4 * Math.min(2, ...gaps);
    return size * 2 ** (count > 1 ? room * (place / (count - 1) - 0.5) : 0);
  }

  function bar(values, ends, sign) {
    return values.map((value, index) => (ends[index] === null ? 0 : sign * (ends[index] - value)));
  }

  function batchTraces(chart) {
    const shown = chart.series.filter((one) => !hidden.has(one.norm) && one.x.length);
    return shown.map((one, place) => ({
      type: "scatter", mode: "lines+markers", name: title(one.norm), meta: one.norm,
      x: one.x.map((size) => dodge(chart, size, place, shown.length)), y: one.y,
      customdata: one.x.map((size, index) => [size, plain(one.text[index])]),
      error_y: {
        type: "data", symmetric: false, array: bar(one.y, one.high, 1), arrayminus: bar(one.y, one.low, -1),
        color: colour(one.norm), thickness: 1.4, width: 4,
      },
      line: { color: colour(one.norm), dash: dash(one.norm), width: 1.8 },
      marker: { color: colour(one.norm), symbol: marker(one.norm), size: 9 },
      hovertemplate: "<b>%{fullData.name}</b><br>batch size %{customdata[0]}<br>%{customdata[1]}<extra></extra>",
    }));
  }

  function batchLayout(plot, chart) {
    const scale = chart.log !== undefined && logarithmic && plot.id.startsWith("score") ? "log" : "linear";
    const ends = chart.ticks.map(Math.log10);
    const values = chart.series.flatMap((one) => [...one.y, ...one.low, ...one.high]);
    return layout(plot, {
      xaxis: axis({
        type: "log", tickvals: chart.ticks, ticktext: chart.ticks.map(String), showgrid: false, showline: true, ticks: "outside",
        tickcolor: token("line"), title: { text: "batch size", font: { color: token("quiet"), size: 13 } },
        range: [ends[0] - 0.22, ends[ends.length - 1] + 0.22],
      }),
      yaxis: axis(scale === "log" ? logAxis(values) : { type: "linear", rangemode: "tozero" }),
    });
  }

  // Learning curves

  // A curve of one point, after one epoch, has no line.
  function curveMode(one) {
    return one.steps.length > 1 ? "lines" : "markers";
  }

  function seedsTrace(one, part, place) {
    const points = one.seeds.map((seed) => [[...seed.steps, null], [...seed[part], null]]);
    return {
      type: "scatter", mode: curveMode(one), meta: one.norm, name: `${title(one.norm)}, each seed`, hoverinfo: "skip",
      x: points.flatMap(([steps]) => steps), y: points.flatMap(([, losses]) => losses), connectgaps: false,
      xaxis: `x${place}`, yaxis: `y${place}`, line: { color: colour(one.norm), width: 1 }, marker: { color: colour(one.norm), size: 5 }, opacity: 0.35,
    };
  }

  function meanTrace(one, part, place) {
    return {
      type: "scatter", mode: curveMode(one), meta: one.norm, name: title(one.norm), x: one.steps, y: one[part],
      xaxis: `x${place}`, yaxis: `y${place}`, line: { color: colour(one.norm), dash: dash(one.norm), width: 2.4 },
      marker: { color: colour(one.norm), symbol: marker(one.norm), size: 9 },
      hovertemplate: "<b>%{fullData.name}</b><br>step %{x}: %{y:.4g}<extra></extra>",
    };
  }

  function curveTraces(chart) {
    const shown = chart.series.filter((one) => !hidden.has(one.norm));
    return [["train", ""], ["valid", "2"]].flatMap(([part, place]) => [
      ...shown.map((one) => seedsTrace(one, part, place)),
      ...shown.map((one) => meanTrace(one, part, place)),
    ]);
  }

  function curveLayout(plot, chart) {
    const stacked = plot.clientWidth < 620;
    const heading = (text, place) => ({
      text, showarrow: false, xref: `x${place} domain`, yref: `y${place} domain`, x: 0, y: 1, xanchor: "left", yanchor: "bottom",
      yshift: 4, font: { color: token("quiet"), size: 13 },
    });
    const losses = logAxis(chart.series.flatMap((one) => one.seeds.flatMap((seed) => [...seed.train, ...seed.valid])));
    const step = { title: { text: "step", font: { color: token("quiet"), size: 13 }, standoff: 6 }, showgrid: false, showline: true };
    return layout(plot, {
      grid: { rows: stacked ? 2 : 1, columns: stacked ? 1 : 2, pattern: "independent", xgap: 0.12, ygap: 0.25 },
      margin: { l: 56, r: 16, t: 30, b: 48 },
      xaxis: axis(step), xaxis2: axis({ ...step, matches: "x" }),
      yaxis: axis(losses),
      yaxis2: axis({ ...losses, matches: "y" }),
      annotations: [heading("training loss", ""), heading("validation loss", "2")],
    });
  }

  function draw(plot) {
    const chart = study.charts[plot.id];
    const options = { displayModeBar: false, responsive: false, doubleClick: "reset" };
    return chart.kind === "batch"
      ? Plotly.react(plot, batchTraces(chart), batchLayout(plot, chart), options)
      : Plotly.react(plot, curveTraces(chart), curveLayout(plot, chart), options);
  }

  const drawAll = () => Promise.all(plots.map(draw));

  // Swatches, buttons, colour scheme, print

  function fillSwatch(swatch) {
    const style = Number(swatch.dataset.style);
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    const shape = document.createElementNS("http://www.w3.org/2000/svg", "path");
    line.setAttribute("d", "M0 6H28");
    line.setAttribute("stroke-width", "1.8");
    line.setAttribute("stroke-dasharray", DASHES[style % DASHES.length].replace("solid", "none").replaceAll("px", ""));
    shape.setAttribute("d", MARKERS[style % MARKERS.length][1]);
    for (const part of [line, shape]) {
      part.style.stroke = part === line ? `var(--norm-${style % COLOURS})` : "none";
      part.style.fill = part === line ? "none" : `var(--norm-${style % COLOURS})`;
    }
    swatch.replaceChildren(line, shape);
  }

  function toggle(norm) {
    hidden.has(norm) ? hidden.delete(norm) : hidden.add(norm);
    for (const button of document.querySelectorAll(".legend button")) {
      button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.norm)));
    }
    drawAll();
  }

  function setUpScale() {
    const button = document.querySelector("button.log");
    if (!button) return;
    button.hidden = false;
    button.setAttribute("aria-pressed", String(logarithmic));
    button.addEventListener("click", () => {
      logarithmic = !logarithmic;
      button.setAttribute("aria-pressed", String(logarithmic));
      drawAll();
    });
  }

  let opened = null;
  function print(begins) {
    if (begins === (opened !== null)) return;
    if (begins) {
      opened = [...document.querySelectorAll("details:not([open])")];
      root.dataset.scheme = "light";
    } else {
      delete root.dataset.scheme;
    }
    for (const details of opened) details.open = begins;
    if (!begins) opened = null;
    root.classList.toggle("printing", begins);
    drawAll();
  }

  document.querySelectorAll(".swatch").forEach(fillSwatch);
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => toggle(button.dataset.norm));
  }
  setUpScale();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  matchMedia("print").addEventListener("change", (event) => print(event.matches));
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  drawAll().then(() => {
    const widths = new Map(plots.map((plot) => [plot, plot.clientWidth]));
    const observer = new ResizeObserver((entries) => {
      for (const { target } of entries) {
        if (widths.get(target) === target.clientWidth) continue;
        widths.set(target, target.clientWidth);
        requestAnimationFrame(() => draw(target));
      }
    });
    plots.forEach((plot) => observer.observe(plot));
    root.dataset.ready = "true";
  });
})();
