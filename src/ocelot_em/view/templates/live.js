"use strict";
// Draw the models of the page; return them with all that the page's own script needs.
const startPage = async () => {
  const page = document.documentElement;
  const unpack = ({ textContent }) => {
    const bytes = Uint8Array.from(atob(textContent), (one) => one.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };
  const parts = await Promise.all([...document.querySelectorAll("script.packed")].map(unpack));
  const content = JSON.parse(parts.pop());
  for (const part of parts) {
    const script = document.createElement("script");
    script.textContent = part;
    document.head.append(script);
  }
  page.classList.add("live");
  await Bokeh.embed.embed_items({ all: content.document }, [{
    docid: "all",
    root_ids: content.roots.map(({ id }) => id),
    roots: Object.fromEntries(content.roots.map(({ id, element }) => [id, element])),
  }]);
  const models = Bokeh.documents[Bokeh.documents.length - 1];

  // The canvas does not know the page's colours.
  const inked = [...models.all_models].flatMap((model) => [...model].filter((own) => !own.is_unset)
    .map((own) => [model, own.attr, own.get_value()])
    .filter(([, , value]) => value === content.ink || value?.value === content.ink));
  const paint = () => {
    const colour = getComputedStyle(page).getPropertyValue("--ink").trim();
    for (const [model, name, value] of inked) {
      model.setv({ [name]: value === content.ink ? colour : { value: colour } });
    }
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  paint();
  return { ...content, model: (name) => models.get_model_by_name(name) };
};

// Read conditions on columns, and words, as they are typed; onChange gets functions of a row.
const watchFilter = (data, titles, onChange) => {
  const field = document.getElementById("live-filter");
  const names = Object.entries(titles).flatMap(([column, title]) =>
    [column, title.replace(/ \(.*/, "").toLowerCase()].map((name) => [name, column]));
  const isText = (column) => typeof data[column][0] === "string";
  const signs = {
    "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b,
    "=": (a, b) => a === b, "!=": (a, b) => a !== b,
  };
  const condition = (words) => {
    const [, name, sign, value] = words.match(/^(.*?)\s*([<>!]=|[<>=])\s*(.*)$/) ?? [];
    if (!sign) {
      const texts = Object.keys(titles).filter(isText).map((column) => data[column]);
      return (i) => texts.some((values) => values[i].toLowerCase().includes(words));
    }
    const exact = names.filter(([own]) => own === name);
    const begun = exact.length ? exact : names.filter(([own]) => name && own.startsWith(name));
    const found = new Set(begun.map(([, column]) => column));
    if (found.size !== 1) throw new RangeError(`“${words}”: expected a column’s name, then < <= > >= = or !=`);
    const [column] = found;
    const values = data[column];
    if (isText(column)) return (i) => signs[sign](values[i].toLowerCase(), value);
    const number = value === "" ? NaN : Number(value);
    if (Number.isNaN(number)) throw new RangeError(`“${words}”: expected a number after ${sign}`);
    return (i) => signs[sign](values[i], number);
  };
  const read = () => {
    const problem = document.getElementById("live-problem");
    problem.textContent = "";
    let conditions;
    try {
      conditions = field.value.toLowerCase().split(/,|;|\band\b/).map((words) => words.trim())
        .filter(Boolean).map(condition);
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      problem.textContent = `${error.message}.`;
      return; // the last filter stays
    }
    onChange(conditions);
  };
  field.addEventListener("input", read);
  read(); // browsers keep what was typed before a page is loaded again
};

const offerDownload = (data, columns, shown, name) => {
  document.getElementById("live-download").addEventListener("click", () => {
    const rows = [columns.join(",")];
    for (const i of shown.indices) rows.push(columns.map((own) => data[own][i]).join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([`${rows.join("\n")}\n`], { type: "text/csv" }));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  });
};

const startOrRead = (start) => start().catch((error) => {
  document.documentElement.classList.remove("live");
  throw error;
});
