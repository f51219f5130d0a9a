// Runs in a page that holds reports in frames, and writes what it measures into #out, which --dump-dom returns.
"use strict";
const near = (a, b) => {
  const w = Math.min(a.right, b.right) - Math.max(a.left, b.left), h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  return w > 1 && h > 3;  // line boxes are a little taller than their letters
};
const finite = (box) => [box.x, box.y, box.width, box.height].every(Number.isFinite) && box.width > 0 && box.height > 0;
const within = (inner, outer) => inner.left >= outer.left - 1 && inner.right <= outer.right + 1 && inner.top >= outer.top - 1 && inner.bottom <= outer.bottom + 1;

function plot(svg) {
  const frame = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")].map((e) => [e, e.getBoundingClientRect()]);
  const marks = [...svg.querySelectorAll(".mark:not(.key), .bar, .strip path")].map((e) => [e, e.getBoundingClientRect()]);
  const view = svg.viewBox.baseVal;
  const inView = marks.every(([e]) => {
    const box = e.getBBox();
    return box.x >= view.x - 0.5 && box.y >= view.y - 0.5 && box.x + box.width <= view.x + view.width + 0.5 && box.y + box.height <= view.y + view.height + 0.5;
  });
  const clashes = [];
  texts.forEach(([e, a], i) => texts.slice(0, i).forEach(([f, b]) => { if (near(a, b)) clashes.push(`${f.textContent} / ${e.textContent}`); }));
  for (const [e, a] of texts) for (const [m, b] of marks) if (e.matches(".label") && m.matches(".mark") && near(a, b)) clashes.push(`${e.textContent} / mark`);
  return {
    title: svg.querySelector("title").textContent, described: svg.getAttribute("aria-labelledby") === svg.querySelector("title").id,
    marks: marks.length, finite: marks.every(([, b]) => finite(b)), inView, outside: texts.filter(([, b]) => !within(b, frame)).map(([e]) => e.textContent),
    clashes, labels: svg.querySelectorAll("text.label").length, steps: svg.querySelectorAll(".steps").length,
    arrows: svg.querySelectorAll(".arrow").length, shapes: new Set(marks.filter(([e]) => e.matches(".mark")).map(([e]) => getComputedStyle(e).fill)).size,
  };
}

function measure(frame) {
  const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
  for (const details of page.querySelectorAll("details")) details.open = true;
  const shown = [...page.querySelectorAll("svg")].filter((svg) => svg.getClientRects().length);
  const smallest = Math.min(...[...page.querySelectorAll("figure svg text")].filter((e) => e.getClientRects().length).map((e) => e.getBoundingClientRect().height));
  return {
    name: frame.name, width: root.clientWidth, scroll: Math.max(root.scrollWidth, page.body.scrollWidth), title: page.title, plots: shown.map(plot), smallest,
    tables: [...page.querySelectorAll("table")].map((t) => t.tBodies[0].rows.length), scripts: page.scripts.length, images: page.images.length,
    resources: view.performance.getEntriesByType("resource").map((e) => e.name), ran: !root.classList.contains("no-script"),
  };
}

function press(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, ground = () => view.getComputedStyle(page.documentElement).backgroundColor;
  const head = [...page.querySelectorAll("th")].find((th) => th.textContent === "perplexity"), body = head.closest("table").tBodies[0];
  const column = () => [...body.rows].map((row) => row.cells[head.cellIndex].textContent);
  const grounds = [ground()], orders = [];
  for (let k = 0; k < 2; k++) { page.getElementById("theme").click(); grounds.push(ground()); }
  for (let k = 0; k < 2; k++) { head.querySelector("button").click(); orders.push([head.getAttribute("aria-sort"), column()]); }
  const mark = page.querySelector(".wide .mark:not(.key)"), box = mark.getBoundingClientRect();
  mark.dispatchEvent(new view.PointerEvent("pointermove", { bubbles: true, clientX: box.x + 3, clientY: box.y + 3 }));
  const tips = [page.getElementById("tip").textContent];
  const cell = page.querySelector(".wide .strip path"), at = cell.getBoundingClientRect();
  cell.dispatchEvent(new view.PointerEvent("pointermove", { bubbles: true, clientX: at.x + 2, clientY: at.y + 3 }));
  tips.push(page.getElementById("tip").textContent);
  return { grounds, orders, tips };
}

addEventListener("load", () => {
  const out = document.getElementById("out");
  try {
    const frames = [...document.querySelectorAll("iframe")];
    const result = { frames: frames.map(measure) };
    const pressed = frames.find((frame) => frame.dataset.press !== undefined);
    if (pressed) result.pressed = press(pressed);
    out.textContent = JSON.stringify(result);
  } catch (error) {
    out.textContent = JSON.stringify({ error: `${error}\n${error.stack}` });
  }
});
