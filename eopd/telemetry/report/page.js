"use strict";
// What a page without a network can do by itself: the switch of colours, the card of a token, the readout of a chart.
(() => {
  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const dataAfter = (element) => JSON.parse(element.parentElement.querySelector("script").textContent);
  const nats = (value) => (value === null ? "−∞" : minus(value.toFixed(3)));
  const minus = (text) => text.replace("-", "−");
  const chance = (logprob) => (logprob === null ? "0%" : percent(100 * Math.exp(logprob)));
  const percent = (value) => (value < 0.01 ? "below 0.01" : value < 10 ? value.toPrecision(2) : value.toFixed(1)) + "%";

  for (const input of document.querySelectorAll(".controls input"))
    input.addEventListener("change", () => document.body.classList.toggle("by-kl", input.value === "kl" && input.checked));

  // --- tokens
  const card = document.getElementById("card");
  const parsed = new Map();
  let here = null;

  const fill = (data, row) => {
    const [text, id, student, teacher, low, high, gate, candidates, chances, rest, rank] = row;
    const name = data.texts[text];
    const numbers = make("dl");
    const say = (label, value) => numbers.append(make("dt", label), make("dd", value));
    const kl = student === null || teacher === null ? "∞" : (student - teacher >= 0 ? "+" : "") + minus((student - teacher).toFixed(3));
    say("student gives it", chance(student));
    say("teacher gives it", chance(teacher));
    say("log p − log q", kl + " nats");
    say("teacher entropy H", (low === high ? nats(low) : nats(low) + " to " + nats(high)) + " nats");
    if (gate) say("gate", gate);
    const list = make("ol");
    candidates.forEach((candidate, i) => {
      const item = make("li", undefined, i === rank ? "taken" : "");
      const bar = make("i");
      bar.style.width = chances[i] + "%";
      item.append(make("code", data.texts[candidate].replace(/^ | $/g, "␣")), bar, make("b", percent(chances[i])));
      list.append(item);
    });
    const others = make("li");
    const bar = make("i");
    bar.style.width = rest + "%";
    bar.style.opacity = 0.4;
    others.append(make("span", "all others"), bar, make("b", percent(rest)));
    list.append(others);
    card.replaceChildren(make("h4", "“" + name + "”"), make("p", "token " + id + "; what the teacher would have written:"), list, make("p"), numbers);
  };

  const leave = () => {
    if (here) here.classList.remove("here");
    here = null;
    card.hidden = true;
  };

  const show = (span) => {
    if (span === here) return;
    leave();
    const text = span.parentElement;
    if (!parsed.has(text)) parsed.set(text, dataAfter(text));
    const data = parsed.get(text);
    here = span;
    span.classList.add("here");
    fill(data, data.tokens[Array.prototype.indexOf.call(text.children, span)]);
    card.hidden = false;
    place();
  };

  const place = () => {
    if (!here) return;
    const box = here.getClientRects()[0];
    const left = Math.max(8, Math.min(box.left, innerWidth - card.offsetWidth - 8));
    const below = box.bottom + 8;
    const top = below + card.offsetHeight < innerHeight ? below : Math.max(8, box.top - card.offsetHeight - 8);
    card.style.left = left + "px";
    card.style.top = top + "px";
  };

  for (const text of document.querySelectorAll(".tokens")) {
    text.addEventListener("pointerover", (event) => event.target !== text && show(event.target));
    text.addEventListener("click", (event) => event.target !== text && show(event.target));
    text.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && leave());
    text.addEventListener("blur", leave);
    text.addEventListener("keydown", (event) => {
      if (event.key === "Escape") leave();
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !text.children.length) return;
      event.preventDefault();
      const at = here && here.parentElement === text ? Array.prototype.indexOf.call(text.children, here) + step : 0;
      show(text.children[Math.max(0, Math.min(at, text.children.length - 1))]);
    });
  }
  addEventListener("scroll", place, { passive: true });

  // --- charts
  const readout = document.getElementById("readout");
  const SVG = "http://www.w3.org/2000/svg";

  const nearest = (points, x) => {
    if (x < points[0][0] || x > points[points.length - 1][0]) return null;
    let low = 0, high = points.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - points[low - 1][0] < points[low][0] - x ? points[low - 1] : points[low];
  };

  const watch = (chart) => {
    const { x: name, grid, box: [left, top, right, bottom], from, to, percent: shares, lines } = JSON.parse(chart.nextElementSibling.textContent);
    const cross = document.createElementNS(SVG, "line");
    cross.setAttribute("class", "cross");
    cross.setAttribute("y1", top);
    cross.setAttribute("y2", bottom);
    cross.style.display = "none";
    chart.append(cross);
    const hide = () => { cross.style.display = "none"; readout.hidden = true; };
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const at = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
      const share = (at - left) / (right - left);
      if (share < 0 || share > 1 || !lines.length) return hide();
      const cell = (from + share * (to - from)) / grid;
      const x = name === "step" ? Math.round(cell) : Number((Math.floor(cell) * grid).toPrecision(6)); // bins: their left edge
      cross.style.display = "";
      for (const end of ["x1", "x2"]) cross.setAttribute(end, at);
      readout.replaceChildren(make("b", name + " " + x), ...lines.map((line) => {
        const row = make("div");
        const point = nearest(line.points, x);
        const [y, low, high] = (point || []).slice(1).map((value) => (shares ? (100 * value).toFixed(1) + "%" : String(value)).replace(/^-/, "−"));
        row.append(make("span", line.label), make("b", y === undefined ? "–" : low === undefined ? y : y + " (" + low + " to " + high + ")"));
        return row;
      }));
      readout.hidden = false;
      readout.style.left = Math.max(8, Math.min(event.clientX + 14, innerWidth - readout.offsetWidth - 8)) + "px";
      readout.style.top = Math.max(8, event.clientY - readout.offsetHeight - 10) + "px";
    });
  };
  document.querySelectorAll("svg.chart").forEach(watch);
})();
