"use strict";
(() => {
  const table = document.getElementById("list");
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row, place) => ({
    row,
    place,
    name: row.cells[1].querySelector("code").textContent,
  }));
  const filter = document.getElementById("filter");
  const shown = document.getElementById("shown");
  const choices = [...document.querySelectorAll("[data-show]")];
  let show = "all";

  // What a cell is sorted by: its number, else its text; without a number it comes last.
  const key = (row, column, numeric) => {
    const cell = row.cells[column];
    if (!numeric) return cell.textContent.trim();
    const value = cell.dataset.v;
    return value === "inf" ? Infinity : value === "-inf" ? -Infinity : value === "" ? NaN : Number(value);
  };

  const compare = (a, b, sign) => {
    if (typeof a === "string") return sign * a.localeCompare(b, "en", { numeric: true });
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
    return a === b ? 0 : sign * (a < b ? -1 : 1);
  };

  const sort = (header) => {
    const column = header.cellIndex;
    const numeric = header.classList.contains("n");
    const before = header.getAttribute("aria-sort");
    const first = numeric ? "descending" : "ascending";
    const other = numeric ? "ascending" : "descending";
    const now = before === first ? other : first;
    for (const each of table.tHead.rows[0].cells) each.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", now);
    const sign = now === "ascending" ? 1 : -1;
    const keyed = rows.map((each) => ({ each, k: key(each.row, column, numeric) }));
    keyed.sort((a, b) => compare(a.k, b.k, sign) || a.each.place - b.each.place);
    body.append(...keyed.map(({ each }) => each.row));
  };

  const matches = (row) =>
    show === "all" || (show === "failed" ? row.dataset.status === "fail" : "adapted" in row.dataset);

  const apply = () => {
    const words = filter.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
    let visible = 0;
    for (const { row, name } of rows) {
      const low = name.toLowerCase();
      const keep = matches(row) && words.every((word) => low.includes(word));
      row.hidden = !keep;
      visible += keep;
    }
    const all = rows.length.toLocaleString("en");
    shown.value = visible === rows.length ? `${all} tensors` : `${visible.toLocaleString("en")} of ${all} tensors`;
  };

  const choose = (which) => {
    show = which;
    for (const each of choices) each.setAttribute("aria-pressed", String(each.dataset.show === which));
    apply();
  };

  for (const header of table.tHead.rows[0].cells) {
    header.querySelector("button").addEventListener("click", () => sort(header));
  }
  for (const each of choices) each.addEventListener("click", () => choose(each.dataset.show));
  filter.addEventListener("input", apply);

  const find = (name) => {
    filter.value = name;
    choose("all");
    document.getElementById("tensors").scrollIntoView();
    filter.focus({ preventScroll: true });
  };

  for (const map of document.querySelectorAll(".map")) {
    const cells = [...map.querySelectorAll("td[data-name]")];
    const readout = map.querySelector(".readout");
    const say = (cell) => {
      const { name, value, more } = cell.dataset;
      const rest = more ? ` and ${more} more, the largest` : "";
      const failed = cell.classList.contains("failed") ? ", failed" : "";
      readout.replaceChildren(
        Object.assign(document.createElement("code"), { textContent: name }),
        `${rest}: `,
        Object.assign(document.createElement("b"), { textContent: value }),
        failed,
      );
    };
    const enter = (cell) => {
      for (const each of cells) each.tabIndex = each === cell ? 0 : -1;
      cell.focus();
    };
    const step = (cell, down, right) => {
      let row = cell.parentElement;
      let column = cell.cellIndex;
      for (;;) {
        column += right;
        if (down) row = down > 0 ? row.nextElementSibling : row.previousElementSibling;
        const next = row && row.cells[column];
        if (!next || !("name" in next.dataset || next.className === "none")) return;
        if ("name" in next.dataset) return enter(next);
      }
    };
    const keys = {
      ArrowLeft: (cell) => step(cell, 0, -1),
      ArrowRight: (cell) => step(cell, 0, 1),
      ArrowUp: (cell) => step(cell, -1, 0),
      ArrowDown: (cell) => step(cell, 1, 0),
      Home: (cell) => enter(cell.parentElement.querySelector("td[data-name]")),
      End: (cell) => enter([...cell.parentElement.querySelectorAll("td[data-name]")].at(-1)),
      Enter: (cell) => find(cell.dataset.name),
    };
    if (cells.length) cells[0].tabIndex = 0;
    const cellOf = (event) => event.target.closest("td[data-name]");
    map.addEventListener("focusin", (event) => cellOf(event) && say(cellOf(event)));
    map.addEventListener("mouseover", (event) => cellOf(event) && say(cellOf(event)));
    map.addEventListener("click", (event) => cellOf(event) && enter(cellOf(event)));
    map.addEventListener("dblclick", (event) => cellOf(event) && find(cellOf(event).dataset.name));
    map.addEventListener("keydown", (event) => {
      const cell = cellOf(event);
      if (!cell || !(event.key in keys)) return;
      event.preventDefault();
      keys[event.key](cell);
    });
  }
})();
