"use strict";
// The headers of tables of class "sortable" become buttons: by falling values first, by rising ones the second time.
const makeSortable = () => document.querySelectorAll("table.sortable").forEach((table) => {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent.trim();
    return text === "" || isNaN(text) ? text : Number(text);
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const known = [], unknown = [];
      for (const row of body.rows) (key(row, column) === "" ? unknown : known).push(row);
      const sign = order === "descending" ? -1 : 1;
      known.sort((a, b) => sign * compare(key(a, column), key(b, column)));
      body.append(...known, ...unknown);
    });
  });
});
makeSortable();
