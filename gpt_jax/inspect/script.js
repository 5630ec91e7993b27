// Draws DATA. Everything is built from it; nothing is fetched.
const $ = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  for (const child of children) node.append(child);
  return node;
};
const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";
const number = (x, digits = 3) => (x === null || x === undefined ? "n/a" : x.toFixed(digits));
const tip = $("div", { class: "tip" });
document.body.append(tip);
const showTip = (event, text) => {
  tip.textContent = text;
  tip.style.display = "block";
  tip.style.left = Math.min(event.pageX + 14, window.scrollX + window.innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = event.pageY + 14 + "px";
};
const hideTip = () => { tip.style.display = "none"; };

// Colours: white to blue from 0 to 1; blue - white - red from -1 to 1.
const mix = (a, b, t) => a.map((x, i) => Math.round(x + (b[i] - x) * t));
const css = (rgb) => `rgb(${rgb.join(",")})`;
const BLUE = [31, 95, 168], RED = [190, 45, 40], WHITE = [255, 255, 255];
const oneSided = (t) => css(mix(WHITE, BLUE, Math.max(0, Math.min(1, t))));
const twoSided = (t) => css(t < 0 ? mix(WHITE, BLUE, Math.min(1, -t)) : mix(WHITE, RED, Math.min(1, t)));
const ink = (t) => (Math.abs(t) > 0.55 ? "#fff" : "#111");

function section(title, about) {
  const part = $("section", {}, $("h2", {}, title), $("p", { class: "about" }, about));
  document.getElementById("page").append(part);
  return part;
}

// A grid of numbers: rows x columns, hover for the value, click if wanted.
function grid(values, { rows, columns, signed = false, scale, describe, onclick, cell = 34, digits = 2 }) {
  const flat = values.flat().filter((x) => x !== null);
  const top = scale ?? (Math.max(...flat.map(Math.abs)) || 1);
  const table = $("table", { class: "grid" });
  table.append($("tr", {}, $("th"), ...columns.map((c) => $("th", {}, c))));
  values.forEach((line, i) => {
    const tr = $("tr", {}, $("th", {}, rows[i]));
    line.forEach((x, j) => {
      const t = x === null ? 0 : x / top;
      const td = $("td", {
        style: `background:${signed ? twoSided(t) : oneSided(t)};color:${ink(t)};min-width:${cell}px`,
        onmousemove: (event) => showTip(event, describe(i, j, x)), onmouseleave: hideTip,
      }, cell >= 30 ? number(x, digits) : "");
      if (onclick) { td.classList.add("click"); td.addEventListener("click", () => onclick(i, j)); }
      tr.append(td);
    });
    table.append(tr);
  });
  return $("div", { class: "box" }, table);
}

const choose = (label, options, value, onchange) => {
  const select = $("select", { "aria-label": label, onchange: (event) => onchange(Number(event.target.value)) });
  options.forEach((name, i) => select.append($("option", { value: i, ...(i === value ? { selected: "" } : {}) }, name)));
  return $("label", {}, label + " ", select);
};

const L = DATA.layers, H = DATA.heads, T = DATA.tokens.length;
const layerNames = [...Array(L).keys()].map((l) => `layer ${l}`);
const headNames = [...Array(H).keys()].map((h) => `head ${h}`);

function drawText() {
  if (!DATA.losses) return;
  const part = section("The text, token by token",
    `Darker is worse: -log p of each token, mean ${number(DATA.losses.reduce((a, b) => a + b, 0) / (T - 1))} nats. Hover for what the model expected.`);
  part.append(coloured(DATA.losses, 8, oneSided, (t) => {
    const guesses = DATA.lens.ids[L][t - 1].map((name, k) => `${visible(name)} ${number(DATA.lens.probabilities[L][t - 1][k])}`);
    return `token ${t} ${visible(DATA.tokens[t])}: ${number(DATA.losses[t - 1])} nats\nexpected: ${guesses.join("  ")}`;
  }));
}

// Tokens as coloured spans; values[t - 1] belongs to token t.
function coloured(values, top, colour, describe) {
  const box = $("div", { class: "text" });
  DATA.tokens.forEach((name, t) => {
    const x = t ? values[t - 1] / top : 0;
    const span = $("span", { style: t ? `background:${colour(x * 0.8)};color:${ink(x * 0.8)}` : "" }, visible(name));
    if (t) {
      span.addEventListener("mousemove", (event) => showTip(event, describe(t)));
      span.addEventListener("mouseleave", hideTip);
    }
    box.append(span);
  });
  return box;
}

let drawMap = () => {};
function drawAttention() {
  const part = section("Attention",
    "Choose a layer and a head, or click a small map. Rows are queries, columns the keys they look at; hover for the weight.");
  let layer = 0, head = 0;
  const controls = $("p"), small = $("div", { class: "maps" }), large = $("div", { class: "large" }), lines = $("div", { class: "text" });
  const paint = (canvas, l, h, size) => {
    canvas.width = canvas.height = T * size;
    const context = canvas.getContext("2d");
    DATA.attention[l][h].forEach((row, i) => row.forEach((x, j) => {
      context.fillStyle = oneSided(Math.sqrt(x / 1000));
      context.fillRect(j * size, i * size, size, size);
    }));
  };
  for (let l = 0; l < L; l++) for (let h = 0; h < H; h++) {
    const canvas = $("canvas", { class: "small", title: `layer ${l}, head ${h}`, "data-head": `${l}.${h}`, onclick: () => drawMap(l, h) });
    paint(canvas, l, h, Math.max(1, Math.floor(72 / T)));
    small.append($("figure", {}, canvas, $("figcaption", {}, `${l}.${h}`)));
  }
  const from = (i) => {
    lines.replaceChildren($("div", { class: "about" }, `what token ${i} ${visible(DATA.tokens[i])} looks at:`));
    DATA.tokens.forEach((name, j) => {
      const x = DATA.attention[layer][head][i][j] / 1000;
      lines.append($("span", { style: `background:${oneSided(x)};color:${ink(x)};${i === j ? "outline:2px solid #d99a00" : ""}` }, visible(name)));
    });
  };
  drawMap = (l, h) => {
    layer = l; head = h;
    controls.replaceChildren(choose("layer", layerNames, layer, (v) => drawMap(v, head)), " ", choose("head", headNames, head, (v) => drawMap(layer, v)));
    const size = Math.max(4, Math.min(14, Math.floor(620 / T)));
    const canvas = $("canvas", { id: "map", onmouseleave: hideTip, onmousemove: (event) => {
      const i = Math.min(T - 1, Math.floor(event.offsetY / size)), j = Math.min(T - 1, Math.floor(event.offsetX / size));
      showTip(event, `query ${i} ${visible(DATA.tokens[i])} → key ${j} ${visible(DATA.tokens[j])}: ${number(DATA.attention[layer][head][i][j] / 1000)}`);
      from(i);
    } });
    paint(canvas, layer, head, size);
    large.replaceChildren($("div", { class: "axis" }, `layer ${layer}, head ${head}: query (down), key (across), weight 0 white to 1 blue (square root)`), canvas);
    from(T - 1);
    small.querySelectorAll("canvas").forEach((c) => c.classList.toggle("on", c.dataset.head === `${layer}.${head}`));
  };
  part.append(controls, $("div", { class: "side" }, large, small), lines);
  drawMap(DATA.start.layer, DATA.start.head);
}

function drawLens() {
  const part = section("Logit lens",
    "What each layer would predict as the next token if it were the last: final norm and output layer on the residual stream. Blue is its probability; hover for the top five.");
  const names = [...layerNames.map((n) => "into " + n), "output"];
  const table = $("table", { class: "lens" });
  table.append($("tr", {}, $("th"), ...DATA.tokens.map((name) => $("th", {}, visible(name)))));
  for (let l = L; l >= 0; l--) {
    const tr = $("tr", {}, $("th", {}, names[l]));
    DATA.tokens.forEach((name, t) => {
      const p = DATA.lens.probabilities[l][t], ids = DATA.lens.ids[l][t];
      tr.append($("td", { style: `background:${oneSided(p[0])};color:${ink(p[0])}`, onmouseleave: hideTip,
        onmousemove: (event) => showTip(event, `${names[l]}, after token ${t} ${visible(name)}:\n` + ids.map((x, k) => `${visible(x)}  ${number(p[k])}`).join("\n") + `\nentropy ${number(DATA.lens.entropies[l][t], 2)} nats`) }, visible(ids[0])));
    });
    table.append(tr);
  }
  part.append($("div", { class: "box" }, table));
}

function drawHeads() {
  const part = section("Heads", "What each head attends to, and what it is worth. Click a cell to see its attention on the text.");
  const names = Object.keys(DATA.measures);
  let which = 0;
  const box = $("div"), controls = $("p");
  const draw = (k) => {
    which = k;
    const m = DATA.measures[names[which]];
    controls.replaceChildren(choose("measure", names, which, draw));
    box.replaceChildren($("p", { class: "about" }, m.about), grid(m.values, {
      rows: layerNames, columns: headNames, signed: m.signed, scale: m.scale, cell: 52, digits: 3,
      describe: (l, h, x) => `layer ${l}, head ${h}: ${number(x, 4)} ${m.unit}`,
      onclick: (l, h) => { drawMap(l, h); document.getElementById("map").scrollIntoView({ block: "center" }); },
    }));
  };
  part.append(controls, box);
  draw(0);
  if (DATA.repetition) part.append($("p", { class: "about" },
    `On repeated random tokens: ${number(DATA.repetition.first)} nats the first time, ${number(DATA.repetition.second)} the second.`));
}

function drawAttribution() {
  if (!DATA.attribution) return;
  const a = DATA.attribution;
  const part = section("Direct logit attribution",
    `What each part adds to the logit of ${visible(a.token)} (${number(a.logit, 2)}) after token ${a.position}, ${visible(DATA.tokens[a.position])}. Red raises it, blue lowers it.`);
  const rows = [["embedding", a.embedding]];
  a.heads.forEach((line, l) => {
    line.forEach((x, h) => rows.push([`head ${l}.${h}`, x]));
    rows.push([`attention bias ${l}`, a.attention_bias[l]], [`mlp ${l}`, a.mlp[l]]);
  });
  rows.push(["norm and output bias", a.rest]);
  const top = Math.max(...rows.map(([, x]) => Math.abs(x))) || 1;
  const table = $("table", { class: "bars" });
  rows.filter(([, x]) => Math.abs(x) > 1e-6).forEach(([name, x]) => table.append($("tr", {}, $("th", {}, name), $("td", { class: "number" }, number(x)),
    $("td", {}, $("div", { class: "bar", style: `width:${Math.abs(x) / top * 260}px;background:${css(x > 0 ? RED : BLUE)}` })))));
  part.append(table);
}

function drawPatching() {
  if (!DATA.patching) return;
  const p = DATA.patching;
  const part = section("Activation patching",
    `Clean: "${p.clean_text}". Corrupt: "${p.corrupt_text}". Logit of ${visible(p.answers[0])} minus that of ${visible(p.answers[1])} at the last token: ${number(p.clean, 2)} clean, ${number(p.corrupt, 2)} corrupt. A cell is how much of that comes back when the clean activation is put into the corrupt run: 0 nothing, 1 all.`);
  part.append($("h3", {}, "Residual stream into a layer, at a token"), grid(p.residual, {
    rows: layerNames, columns: p.tokens.map(visible), signed: true, scale: 1, cell: 46,
    describe: (l, t, x) => `into layer ${l}, token ${t} ${visible(p.tokens[t])}: recovery ${number(x)}`,
  }), $("h3", {}, "Output of a head, at all tokens"), grid(p.heads, {
    rows: layerNames, columns: headNames, signed: true, scale: 1, cell: 52,
    describe: (l, h, x) => `layer ${l}, head ${h}: recovery ${number(x)}`,
  }));
}

function drawDifference() {
  if (!DATA.difference) return;
  const d = DATA.difference;
  const part = section("Losses beside another checkpoint",
    `Red tokens are harder for ${DATA.name} than for ${d.name}, blue ones easier. Mean ${number(d.mean)} nats a token.`);
  const top = Math.max(...d.values.map(Math.abs)) || 1;
  part.append(coloured(d.values, top, twoSided, (t) =>
    `token ${t} ${visible(DATA.tokens[t])}: ${number(d.losses[t - 1])} here, ${number(d.other[t - 1])} there, difference ${number(d.values[t - 1])} nats`));
}

drawText();
drawAttention();
drawLens();
drawHeads();
drawAttribution();
drawPatching();
drawDifference();
