startOrRead(async () => {
  const { score, columns, titles, expected, contours, estimates, model } = await startPage();
  const [slider, source, shown, line, contour] = ["cutoff", "particles", "shown", "cutoff-line",
    "contour"].map(model);
  const heights = source.data[score];
  const { start, step } = slider;

  const text = (number) => number >= 100 ? Math.round(number).toLocaleString("en")
    : number >= 0.001 ? String(Number(number.toPrecision(2))) : "fewer than 0.001";
  const count = () => {
    let n = 0; // the highest come first
    while (n < heights.length && heights[n] >= slider.value - 1e-6) n += 1;
    return n;
  };
  let conditions = [];
  const update = () => {
    const n = count();
    const at = Math.round((slider.value - start) / step);
    const passing = Array.from({ length: n }, (_, i) => i)
      .filter((i) => conditions.every((passes) => passes(i)));
    if (conditions.length || passing.length !== shown.indices.length) shown.indices = passing;
    if (contours.length) {
      const each = Math.ceil(expected.length / contours.length);
      contour.data = contours[Math.min(Math.floor(at / each), contours.length - 1)];
    }
    if (line) line.location = slider.value;
    const all = `${n.toLocaleString("en")} particle${n === 1 ? "" : "s"}`;
    document.getElementById("live-count").textContent =
      conditions.length ? `${passing.length.toLocaleString("en")} of ${all}` : all;
    document.getElementById("live-passing").textContent =
      conditions.length ? ` ${passing.length === 1 ? "passes" : "pass"} the filter` : "";
    document.getElementById("live-expected").textContent = expected.length ? text(expected[at]) : "unknown";
    for (const [name, values] of Object.entries(estimates)) {
      const value = values[at];
      document.getElementById(`live-${name}`).textContent = value === null ? "unknown"
        : value.toFixed(2);
    }
  };
  slider.properties.value.change.connect(update);
  watchFilter(source.data, titles, (found) => {
    conditions = found;
    update();
  });
  offerDownload(source.data, columns, shown, "particles.csv");
});
