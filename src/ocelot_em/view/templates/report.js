"use strict";
(async () => {
  const page = document.documentElement;
  const unpack = ({ textContent }) => {
    const bytes = Uint8Array.from(atob(textContent), (one) => one.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };
  const parts = await Promise.all([...document.querySelectorAll("script.packed")].map(unpack));
  const { document: models, roots, score, columns, titles, expected, contours, ink } = JSON.parse(parts.pop());
  for (const part of parts) {
    const script = document.createElement("script");
    script.textContent = part;
    document.head.append(script);
  }
  page.classList.add("live");
  await Bokeh.embed.embed_items({ all: models }, [{
    docid: "all",
    root_ids: roots.map(({ id }) => id),
    roots: Object.fromEntries(roots.map(({ id, element }) => [id, element])),
  }]);
  const live = Bokeh.documents[Bokeh.documents.length - 1];
  const [slider, source, shown, line, contour] = ["cutoff", "particles", "shown", "cutoff-line",
    "contour"].map(
    (name) => live.get_model_by_name(name));
  const heights = source.data[score];
  const { start, step } = slider;

  // The canvas does not know the page's colours.
  const inked = [...live.all_models].flatMap((model) => [...model].filter((own) => !own.is_unset)
    .map((own) => [model, own.attr, own.get_value()])
    .filter(([, , value]) => value === ink || value?.value === ink));
  const paint = () => {
    const colour = getComputedStyle(page).getPropertyValue("--ink").trim();
    for (const [model, name, value] of inked) {
      model.setv({ [name]: value === ink ? colour : { value: colour } });
    }
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  paint();

  const text = (number) => number >= 100 ? Math.round(number).toLocaleString("en")
    : number >= 0.001 ? String(Number(number.toPrecision(2))) : "fewer than 0.001";
  const count = () => {
    let n = 0; // the highest come first
    while (n < heights.length && heights[n] >= slider.value - 1e-6) n += 1;
    return n;
  };

  const field = document.getElementById("live-filter");
  const names = Object.entries(titles).flatMap(([column, title]) =>
    [column, title.replace(/ \(.*/, "").toLowerCase()].map((name) => [name, column]));
  const isText = (column) => typeof source.data[column][0] === "string";
  const signs = {
    "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b,
    "=": (a, b) => a === b, "!=": (a, b) => a !== b,
  };
  const condition = (words) => {
    const [, name, sign, value] = words.match(/^(.*?)\s*([<>!]=|[<>=])\s*(.*)$/) ?? [];
    if (!sign) {
      const texts = Object.keys(titles).filter(isText).map((column) => source.data[column]);
      return (i) => texts.some((values) => values[i].toLowerCase().includes(words));
    }
    const exact = names.filter(([own]) => own === name);
    const begun = exact.length ? exact : names.filter(([own]) => name && own.startsWith(name));
    const found = new Set(begun.map(([, column]) => column));
    if (found.size !== 1) throw new RangeError(`“${words}”: expected a column’s name, then < <= > >= = or !=`);
    const [column] = found;
    const values = source.data[column];
    if (isText(column)) return (i) => signs[sign](values[i].toLowerCase(), value);
    const number = value === "" ? NaN : Number(value);
    if (Number.isNaN(number)) throw new RangeError(`“${words}”: expected a number after ${sign}`);
    return (i) => signs[sign](values[i], number);
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
  };
  const read = () => {
    const problem = document.getElementById("live-problem");
    problem.textContent = "";
    try {
      conditions = field.value.toLowerCase().split(/,|;|\band\b/).map((words) => words.trim())
        .filter(Boolean).map(condition);
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      problem.textContent = `${error.message}.`;
      return; // the last filter stays
    }
    update();
  };
  slider.properties.value.change.connect(update);
  field.addEventListener("input", read);
  read(); // browsers keep what was typed before a page is loaded again

  document.getElementById("live-download").addEventListener("click", () => {
    const rows = [columns.join(",")];
    for (const i of shown.indices) rows.push(columns.map((name) => source.data[name][i]).join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([`${rows.join("\n")}\n`], { type: "text/csv" }));
    link.download = "particles.csv";
    link.click();
    URL.revokeObjectURL(link.href);
  });
})().catch((error) => {
  document.documentElement.classList.remove("live");
  throw error;
});
