// Values of plots under the pointer, and the search through samples. All text is put in as text.
"use strict";
(() => {
  const make = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);

  const show = (svg, plot, marks, event) => {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const across = plot.by === "x";
    const at = across ? (event.clientX - box.left) / box.width * view.width
      : (event.clientY - box.top) / box.height * view.height;
    let group = plot.groups[0];
    for (const each of plot.groups) if (Math.abs(each[0] - at) < Math.abs(group[0] - at)) group = each;
    const [position, title, points] = group;
    marks.replaceChildren();
    if (across) {
      marks.append(make("line", {x1: position, x2: position, y1: plot.from, y2: plot.to}));
    }
    const lines = [document.createElement("b")];
    lines[0].textContent = title;
    for (const [series, other, name, value] of points) {
      const [cx, cy] = across ? [position, other] : [other, position];
      marks.append(make("circle", {cx, cy, r: 2.6, class: `s${series}`}));
      const line = document.createElement("span"), colour = document.createElement("i");
      colour.className = `s${series}`;
      line.append(colour, `${name} `);
      line.append(Object.assign(document.createElement("strong"), {textContent: value}));
      lines.push(line);
    }
    tip.replaceChildren(...lines);
    tip.hidden = false;
    const wide = document.documentElement.clientWidth, room = tip.offsetWidth + 14;
    const left = event.clientX + room < wide ? event.clientX + 14 : event.clientX - room;
    tip.style.left = `${Math.max(4, Math.min(left, wide - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 10)}px`;
  };
  for (const svg of document.querySelectorAll("svg[data-plot]")) {
    const plot = JSON.parse(svg.dataset.plot), marks = make("g", {class: "marks"});
    if (!plot.groups.length) continue;
    svg.append(marks);
    for (const name of ["pointermove", "pointerdown"]) {
      svg.addEventListener(name, event => show(svg, plot, marks, event));
    }
    svg.addEventListener("pointerleave", () => { tip.hidden = true; marks.replaceChildren(); });
  }

  const form = document.querySelector(".filters");
  if (!form) return;
  const samples = [...document.querySelectorAll(".sample")];
  const texts = samples.map(each => each.textContent.toLowerCase());
  const count = form.querySelector("output"), search = form.querySelector("input");
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = [...form.querySelectorAll("select")].filter(each => each.value);
    let shown = 0;
    samples.forEach((each, index) => {
      const fits = words.every(word => texts[index].includes(word))
        && wanted.every(select => each.dataset[select.name] === select.value);
      each.hidden = !fits;
      shown += fits;
    });
    count.textContent = `${shown} of ${samples.length}`;
  };
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", event => event.preventDefault());
  filter();
})();
