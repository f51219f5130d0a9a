"use strict";
(() => {
  const root = document.documentElement;
  root.classList.remove("no-script");

  // light or dark: the reader's setting until the button is pressed
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const button = document.getElementById("theme");
  const name = () => { button.textContent = dark() ? "Light" : "Dark"; button.setAttribute("aria-label", `Switch to ${dark() ? "light" : "dark"} mode`); };
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();

  // sort a table by a column; empty and failed cells stay at the end
  for (const head of document.querySelectorAll("th[data-sort]")) {
    const press = document.createElement("button");
    press.type = "button";
    press.textContent = head.textContent;
    head.replaceChildren(press);
    press.addEventListener("click", () => {
      const body = head.closest("table").tBodies[0], column = head.cellIndex;
      const order = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
      const key = (row) => row.cells[column]?.dataset.key ?? "";
      const rows = [...body.rows].sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        return order * (head.dataset.sort === "number" ? x - y : x.localeCompare(y));
      });
      body.replaceChildren(...rows);
    });
  }

  // one tooltip for marks, bars and cells; replaces the browser's own
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  for (const title of document.querySelectorAll(".mark > title, .bar > title")) {
    title.parentElement.dataset.tip = title.textContent;
    title.remove();
  }
  const strip = (group, event) => {
    const svg = group.ownerSVGElement, point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const columns = group.dataset.columns.split(" "), values = group.dataset.values.split(" ");
    let k = Math.floor((point.x - group.dataset.left) / group.dataset.pitch);
    if (k >= columns.length - 1 && columns.at(-1) === "-") k = columns.length - 1;
    if (!(k >= 0 && k < columns.length)) return "";
    const where = columns[k] === "-" ? "outside of the blocks" : `block ${columns[k]}`;
    return `${group.dataset.name}, ${where}: ${values[k] === "-" ? "nothing" : values[k].replace("_", " ")}`;
  };
  document.addEventListener("pointermove", (event) => {
    const mark = event.target.closest?.("[data-tip]"), group = event.target.closest?.(".strip");
    const text = mark ? mark.dataset.tip : group ? strip(group, event) : "";
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(6, Math.min(event.clientX + 14, innerWidth - box.width - 6))}px`;
    tip.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18}px`;
  });
  document.addEventListener("pointerleave", () => { tip.hidden = true; });
})();
