"use strict";
/* Tables that can be sorted and searched. Everything is read from the page itself; without this
   script all rows are there, in the order in which they were written. */

const MARKS = { "\u00b7": " ", "\u21b5": "\n", "\u2192": "\t" };

/* What is not known comes last, in either direction. */
function compared(left, right, isDescending) {
  if (left === null || right === null) return (left === null) - (right === null);
  const order = left < right ? -1 : left > right ? 1 : 0;
  return isDescending ? -order : order;
}

function cellValue(cell) {
  const text = cell.dataset.value ?? cell.textContent.trim();
  if (text === "" || text === "\u2013") return null;
  const value = Number(text);
  return Number.isNaN(value) ? text.toLowerCase() : value;
}

/* A column sorts as numbers only if all of its cells are numbers. */
function columnValues(rows, column) {
  const values = rows.map((row) => cellValue(row.cells[column]));
  const isNumeric = values.every((value) => value === null || typeof value === "number");
  return { values: isNumeric ? values : values.map((value) => value === null ? null : String(value)), isNumeric };
}

/* White space is found as it is and as the page shows it. */
function needlesOf(query) {
  const needle = query.toLowerCase();
  return [needle, needle.replace(/[\u00b7\u21b5\u2192]/g, (mark) => MARKS[mark])];
}

/* A row says what it is searched by, or all of it is. */
function haystackOf(row) {
  return (row.dataset.text ?? row.textContent.replace(/\s+/g, " ")).toLowerCase();
}

function start(table) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const haystacks = new Map(rows.map((row) => [row, haystackOf(row)]));
  const heads = Array.from(table.tHead.rows[0].cells);
  const tools = document.querySelector(`[data-tools="${table.id}"]`);
  const box = tools.querySelector("input"), status = tools.querySelector("output");
  const all = document.querySelector(`[data-all="${table.id}"]`);
  let ordered = rows, limit = Number(table.dataset.limit) || Infinity;

  const show = (most = limit) => {
    const needles = needlesOf(box.value);
    const found = ordered.filter((row) => needles.some((needle) => haystacks.get(row).includes(needle)));
    const shown = found.slice(0, most);
    body.replaceChildren(...shown);
    const counted = shown.length < found.length ? `${shown.length} of ${found.length}` : `${found.length}`;
    status.textContent = box.value ? `${counted} of ${rows.length} rows contain that` : `${counted} rows`;
    all.hidden = shown.length === found.length;
    return shown;
  };

  const sort = (column) => {
    const { values, isNumeric } = columnValues(rows, column);
    const current = heads[column].getAttribute("aria-sort");
    const opposite = { ascending: "descending", descending: "ascending" };
    const direction = opposite[current] ?? (isNumeric ? "descending" : "ascending");
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", direction);
    const places = rows.map((_, place) => place);
    places.sort((left, right) =>
      compared(values[left], values[right], direction === "descending") || left - right);
    ordered = places.map((place) => rows[place]);
    show();
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(column));
    head.append(button);
  });
  box.addEventListener("input", () => show());
  all.addEventListener("click", () => {
    const next = limit;
    limit = Infinity;
    show()[next]?.querySelector("summary, a, button")?.focus();
  });
  window.addEventListener("beforeprint", () => show(Infinity));
  window.addEventListener("afterprint", () => show());
  tools.hidden = false;
  show();
}

document.querySelectorAll("table[data-browse]").forEach(start);
