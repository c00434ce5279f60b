"use strict";
// Sorting by a click or a key on a heading. Without script the tables are whole, only not sortable.
const value = (row, at) => {
  const text = row.cells[at].textContent.trim();
  return [text, parseFloat(text.replace(/−/g, "-").replace(/^[<>] /, ""))];
};
for (const table of document.querySelectorAll("table.sort")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const words = head.classList.contains("t");
      const sign = down ? -1 : 1;
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [row, ...value(row, at)]);
      rows.sort(([, a, x], [, b, y]) => {
        if (words) return sign * a.localeCompare(b, undefined, { numeric: true });
        // What has no number comes last in either direction.
        if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
        return sign * (x - y);
      });
      body.append(...rows.map(([row]) => row));
    });
  });
}
// Paper shows what is folded away on the screen.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((part) => { part.open = true; });
});
addEventListener("afterprint", () => folded.forEach((part) => { part.open = false; }));
