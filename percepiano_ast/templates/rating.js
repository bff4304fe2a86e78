"use strict";
const clock = (s) => `${Math.floor(s / 60)}:${String(Math.floor(s % 60)).padStart(2, "0")}`;
recordings.forEach((one, number) => {
  const section = document.getElementById(`recording${number}`);
  const svg = section.querySelector("svg"), sound = section.querySelector("audio");
  const x = (t) => (1000 * t) / one.seconds, y = (percentile) => 200 - 2 * percentile;
  const seek = (t) => { if (sound) { sound.currentTime = t; sound.play(); } };
  const draw = (name, values) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries({ "vector-effect": "non-scaling-stroke", ...values })) element.setAttribute(key, value);
    return svg.appendChild(element);
  };
  let cursor;
  const show = (k) => {
    svg.replaceChildren();
    const [family, low, high] = one.poles[k], course = one.course[k], moments = one.moments[k];
    section.querySelector(".which").textContent = `${family} over time: ${low} (bottom) to ${high} (top)`;
    draw("line", { x1: 0, x2: 1000, y1: 100, y2: 100, class: "half" });
    draw("line", { x1: 0, x2: 1000, y1: y(one.percentiles[k]), y2: y(one.percentiles[k]), class: "whole", "stroke-dasharray": "6 4" });
    let part = [];
    const flush = () => {
      if (part.length > 1) draw("polyline", { points: part.join(" "), fill: "none", class: "line", "stroke-width": 2.5 });
      else if (part.length) draw("circle", { cx: part[0].split(",")[0], cy: part[0].split(",")[1], r: 5, class: "dot" });
      part = [];
    };
    course.forEach((value, i) => { if (value === null) flush(); else part.push(`${x(one.times[i])},${y(value)}`); });
    flush();
    cursor = draw("line", { x1: 0, x2: 0, y1: 0, y2: 200, class: "cursor", "stroke-width": 2 });
    const rated = course.filter((value) => value !== null);
    const summary = rated.length
      ? `Windows of 8 s lie between percentile ${Math.min(...rated).toFixed(0)} and ${Math.max(...rated).toFixed(0)}; the whole recording (dashed) is at ${one.percentiles[k].toFixed(0)}.`
      : "No window holds enough notes to be rated.";
    section.querySelector(".summary").textContent = summary;
    svg.setAttribute("aria-label", `${family}, ${low} to ${high}, over time. ${summary}`);
    const box = section.querySelector(".moments");
    box.replaceChildren();
    moments.forEach(([start, stop, percentile], i) => {
      const text = `${clock(start)} to ${clock(stop)}`, item = document.createElement(sound ? "button" : "span");
      item.textContent = text;
      if (sound) { item.type = "button"; item.setAttribute("aria-label", `Play ${text}`); item.onclick = () => seek(start); }
      box.append(i ? ` Most ${low}: ` : `Most ${high}: `, item, ` (percentile ${percentile.toFixed(0)}).`);
    });
    if (sound && rated.length) box.append(" Click on the curve to listen from there.");
    section.querySelector("tbody").replaceChildren(...one.times.map((time, i) => {
      const row = document.createElement("tr");
      for (const text of [clock(time), course[i] === null ? "not rated" : course[i].toFixed(0)]) row.appendChild(document.createElement("td")).textContent = text;
      return row;
    }));
    section.querySelectorAll(".row").forEach((row) => row.setAttribute("aria-pressed", String(Number(row.dataset.dimension) === k)));
  };
  section.querySelectorAll(".row").forEach((row) => { row.onclick = () => show(Number(row.dataset.dimension)); });
  svg.onclick = (event) => { const box = svg.getBoundingClientRect(); seek(((event.clientX - box.left) / box.width) * one.seconds); };
  if (sound) sound.ontimeupdate = () => { cursor.setAttribute("x1", x(sound.currentTime)); cursor.setAttribute("x2", x(sound.currentTime)); };
  show(0);
});
