"use strict";
const clock = (s) => `${Math.floor(s / 60)}:${String(Math.floor(s % 60)).padStart(2, "0")}`;
recordings.forEach((one, number) => {
  const section = document.getElementById(`recording${number}`);
  const svg = section.querySelector("svg"), sound = section.querySelector("audio");
  const x = (t) => (1000 * t) / one.seconds, y = (v) => 200 * (1 - Math.min(Math.max(v, 0), 1));
  const seek = (t) => { if (sound) { sound.currentTime = t; sound.play(); } };
  const draw = (name, values) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries({ "vector-effect": "non-scaling-stroke", ...values })) element.setAttribute(key, value);
    return svg.appendChild(element);
  };
  let cursor;
  const show = (k) => {
    svg.replaceChildren();
    const [family, low, high] = one.poles[k];
    section.querySelector(".which").textContent = `${family} over time: ${low} (below) to ${high} (above); stretches of 8 s. Click to listen.`;
    draw("line", { x1: 0, x2: 1000, y1: y(one.ratings[k]), y2: y(one.ratings[k]), stroke: "#999", "stroke-dasharray": "6 4" });
    let part = [];
    const flush = () => {
      if (part.length > 1) draw("polyline", { points: part.join(" "), fill: "none", stroke: "#0072b2", "stroke-width": 2.5 });
      else if (part.length) draw("circle", { cx: part[0].split(",")[0], cy: part[0].split(",")[1], r: 5, fill: "#0072b2" });
      part = [];
    };
    one.course[k].forEach((value, i) => { if (value === null) flush(); else part.push(`${x(one.times[i])},${y(value)}`); });
    flush();
    cursor = draw("line", { x1: 0, x2: 0, y1: 0, y2: 200, stroke: "#d55e00", "stroke-width": 2 });
    const moments = section.querySelector(".moments");
    moments.replaceChildren();
    one.moments[k].forEach(([start, stop, rating], i) => {
      const button = document.createElement("button");
      button.textContent = `${clock(start)} to ${clock(stop)}`;
      button.onclick = () => seek(start);
      moments.append(i ? ` Most ${low}: ` : `Most ${high}: `, button, ` (${rating.toFixed(2)} by itself).`);
    });
    section.querySelectorAll("tr[data-dimension]").forEach((row) => row.classList.toggle("chosen", Number(row.dataset.dimension) === k));
  };
  section.querySelectorAll("tr[data-dimension]").forEach((row) => {
    row.onclick = () => show(Number(row.dataset.dimension));
    row.onkeydown = (event) => { if (event.key === "Enter") row.onclick(); };
  });
  svg.onclick = (event) => { const box = svg.getBoundingClientRect(); seek(((event.clientX - box.left) / box.width) * one.seconds); };
  if (sound) sound.ontimeupdate = () => { cursor.setAttribute("x1", x(sound.currentTime)); cursor.setAttribute("x2", x(sound.currentTime)); };
  show(0);
});
