startOrRead(async () => {
  const { columns, titles, model } = await startPage();
  const [source, shown] = ["particles", "shown"].map(model);
  const all = source.data[columns[0]].map((_, i) => i);
  watchFilter(source.data, titles, (conditions) => {
    shown.indices = all.filter((i) => conditions.every((passes) => passes(i)));
    document.getElementById("live-count").textContent = shown.indices.length === all.length ? ""
      : `${shown.indices.length.toLocaleString("en")} of ${all.length.toLocaleString("en")} particles pass the filter.`;
  });
  offerDownload(source.data, columns, shown, "comparison.csv");
});
