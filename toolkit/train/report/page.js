"use strict";
// While the pointer is over a chart, the legend of every chart shows the values at that step.
(() => {
  const ns = "http://www.w3.org/2000/svg";
  const charts = [...document.querySelectorAll("svg[data-points]")].map((svg) => {
    const cursor = document.createElementNS(ns, "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", 10);
    cursor.setAttribute("y2", svg.viewBox.baseVal.height - 24);
    const figure = svg.closest("figure");
    const values = [...figure.querySelectorAll(".legend li:not(.mark) b")];
    const heading = figure.querySelector("h3");
    return { svg, cursor, values, heading, title: heading.textContent, last: values.map((b) => b.textContent), dots: [], ...JSON.parse(svg.dataset.points) };
  });
  const show = (v) => v === null ? "–" : Math.abs(v) >= 5e-4 && Math.abs(v) < 1e6 || v === 0 ? String(+v.toPrecision(4)) : v.toExponential(1);
  const nearest = (list, wanted) => list.reduce((best, x, i) => Math.abs(x - wanted) < Math.abs(list[best] - wanted) ? i : best, 0);
  const clear = (c) => {
    c.cursor.remove();
    c.dots.forEach((dot) => dot.remove());
    c.dots = [];
    c.heading.textContent = c.title;
    c.values.forEach((b, i) => { b.textContent = c.last[i]; b.classList.remove("now"); });
  };
  const point = (step) => charts.forEach((c) => {
    clear(c);
    const i = nearest(c.x, step);
    c.cursor.setAttribute("x1", c.px[i]);
    c.cursor.setAttribute("x2", c.px[i]);
    c.svg.append(c.cursor);
    c.heading.textContent = `${c.title}, step ${c.x[i]}`;
    c.py.forEach((ys, line) => {
      if (ys[i] === null) return;
      const dot = document.createElementNS(ns, "circle");
      dot.setAttribute("class", `hover t${line + 1}`);
      dot.setAttribute("cx", c.px[i]);
      dot.setAttribute("cy", ys[i]);
      dot.setAttribute("r", 4);
      c.svg.append(dot);
      c.dots.push(dot);
    });
    c.values.forEach((b, line) => { b.textContent = show(c.y[line][i]); b.classList.add("now"); });
  });
  charts.forEach((c) => {
    c.svg.addEventListener("pointermove", (event) => {
      const box = c.svg.getBoundingClientRect();
      point(c.x[nearest(c.px, (event.clientX - box.left) / box.width * c.svg.viewBox.baseVal.width)]);
    });
    c.svg.addEventListener("pointerleave", () => charts.forEach(clear));
  });
})();
