"use strict";
const table = document.querySelector("table"), body = table.tBodies[0];
const words = new Intl.Collator(undefined, { numeric: true });
const value = (row, column) => row.cells[column]?.dataset.value ?? "";
function compare(a, b) {
  return isNaN(a) || isNaN(b) ? words.compare(a, b) : a - b;
}
for (const button of table.tHead.querySelectorAll("button")) {
  button.addEventListener("click", () => {
    const heading = button.parentNode, column = heading.cellIndex;
    const sign = heading.getAttribute("aria-sort") === heading.dataset.first ? -1 : 1;
    const first = heading.dataset.first === "ascending" ? sign : -sign;
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [value(one, column), value(other, column)];
      return (a === "") - (b === "") || first * compare(a, b);
    });
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", first > 0 ? "ascending" : "descending");
    body.append(...rows);
  });
}
