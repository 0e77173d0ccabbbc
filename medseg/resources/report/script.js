"use strict";
// Tables sort by a click on a column's head: numbers by value, text as people sort it.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0], column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b), i = parseFloat(x), j = parseFloat(y);
      const numeric = head.dataset.kind === "number";
      if (numeric && Number.isNaN(i) !== Number.isNaN(j)) return Number.isNaN(i) ? 1 : -1; // no value: last, either way
      const order = numeric ? (i === j || Number.isNaN(i) ? 0 : i - j) : x.localeCompare(y, undefined, { numeric: true });
      return down ? -order : order;
    });
    body.append(...rows);
  });
}
// A slider moves the strip of slices behind the window of every panel of its plane.
for (const slider of document.querySelectorAll("input[type=range]")) {
  const plane = document.getElementById(slider.dataset.plane), height = Number(slider.dataset.height);
  const captions = JSON.parse(slider.dataset.captions), output = plane.querySelector("output");
  const move = () => {
    for (const strip of plane.querySelectorAll("g.strip")) strip.setAttribute("transform", `translate(0 ${-height * slider.valueAsNumber})`);
    output.textContent = captions[slider.valueAsNumber];
  };
  slider.addEventListener("input", move);
  move();
}
for (const box of document.querySelectorAll("input[type=checkbox]")) {
  const show = () => box.closest("section").classList.toggle("plain", !box.checked);
  box.addEventListener("change", show);
  show();
}
