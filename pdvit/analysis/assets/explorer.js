(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  // The model with most layers sets the steps; others show the layer that is nearest in depth.
  const LEADER = data.models.reduce((deepest, model) => (model.layers.length > deepest.layers.length ? model : deepest));
  const STEPS = LEADER.layers.length;
  const relativeDepth = (model, layer) => model.depths[layer] / Math.max(1, model.deepest);
  const LEVELS = 127; // cosines are kept as integers from -127 to 127
  const NAMES = data.names.map((name, image) => (data.names.indexOf(name) < image ? `${name} (${image + 1})` : name));
  const START = {
    image: 0,
    step: STEPS - 1,
    query: { x: 0.5, y: 0.5 }, // parts of the image, so that grids of any size can be compared
    probe: null, // where a patch is pinned: what is under the pointer
    signed: true,
    stretched: false, // whether the colours of each map reach from its lowest to its highest number
    overlay: 1,
  };
  const state = { ...START };

  // ---- numbers ----------------------------------------------------------------------------------------------------

  const decoded = new Map();
  /** Return the cosines of one map: those of patches i < j, row by row. */
  function cosines(model, image, layer) {
    const text = data.models[model].cosines[image][layer];
    if (!decoded.has(text)) decoded.set(text, Int8Array.from(atob(text), (letter) => letter.charCodeAt(0)));
    return decoded.get(text);
  }

  function cosine(triangle, count, i, j) {
    if (i === j) return LEVELS;
    const [low, high] = i < j ? [i, j] : [j, i];
    return triangle[(low * (2 * count - low - 1)) / 2 + high - low - 1];
  }

  function layerOf(number) {
    const model = data.models[number], target = relativeDepth(LEADER, state.step);
    const away = model.layers.map((_, layer) => Math.abs(relativeDepth(model, layer) - target));
    return away.indexOf(Math.min(...away));
  }
  const clamp = (value, max) => Math.min(max, Math.max(0, value));

  /** Return row, column and number of the patch that holds a point. */
  function patchAt(point, [rows, columns]) {
    const row = clamp(Math.floor(point.y * rows), rows - 1);
    const column = clamp(Math.floor(point.x * columns), columns - 1);
    return { row, column, index: row * columns + column };
  }

  const shown = (value) => (state.signed ? value : Math.abs(value));
  function text(value, digits = 2) {
    const rounded = value.toFixed(digits);
    return rounded.replace("-", Number(rounded) === 0 ? "" : "\u2212");
  }
  const place = (patch) => `row ${patch.row}, column ${patch.column}`; // from 0, as in pdvit plot maps --patch

  /** Return all that one map shows for the current patch. */
  function reading(model) {
    const layer = layerOf(model), grid = data.models[model].grids[layer], count = grid[0] * grid[1];
    const triangle = cosines(model, state.image, layer), query = patchAt(state.query, grid);
    const values = Array.from({ length: count }, (_, j) => cosine(triangle, count, query.index, j));
    const others = values.filter((_, j) => j !== query.index).map((value) => shown(value) / LEVELS);
    const probe = state.probe && patchAt(state.probe, grid);
    const sum = others.reduce((total, value) => total + value, 0);
    return {
      layer, grid, query, probe, values,
      mean: sum / others.length,
      low: others.reduce((a, b) => Math.min(a, b), 1),
      high: others.reduce((a, b) => Math.max(a, b), -1),
      pair: probe && shown(values[probe.index]) / LEVELS,
    };
  }

  // ---- colours: lightness is linear in OKLab, so that equal steps of cosine look like equal steps -------------------

  /** Return linear sRGB of a colour in OKLCH; parts outside 0 to 1 are colours that no screen has. */
  function linear(lightness, chroma, hue) {
    const a = chroma * Math.cos((hue * Math.PI) / 180), b = chroma * Math.sin((hue * Math.PI) / 180);
    const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
    const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
    const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
    return [
      4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
      -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
      -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
    ];
  }
  /** Return red, green and blue; the chroma is lowered until a screen has the colour, never its lightness. */
  function colour(lightness, chroma, hue) {
    let low = 0, high = chroma;
    for (let turn = 0; turn < 20; turn += 1) {
      const middle = turn ? (low + high) / 2 : high;
      if (linear(lightness, middle, hue).every((part) => part >= 0 && part <= 1)) low = middle;
      else high = middle;
    }
    return linear(lightness, low, hue).map((part) => {
      const light = Math.min(1, Math.max(0, part));
      return Math.round(255 * (light <= 0.0031308 ? 12.92 * light : 1.055 * light ** (1 / 2.4) - 0.055));
    });
  }
  const diverging = (value) => colour(0.955 - 0.555 * Math.abs(value), 0.17 * Math.abs(value) ** 0.8, value < 0 ? 258 : 34);
  const sequential = (value) => colour(0.2 + 0.73 * value, 0.11 + 0.1 * value * (1 - value), 288 + 167 * value);
  const table = (map, low) => Array.from({ length: 2 * LEVELS + 1 }, (_, k) => map(Math.max(low, (k - LEVELS) / LEVELS)));
  const COLOURS = { signed: table(diverging, -1), absolute: table(sequential, 0) };
  /** Return the colour of a cosine, times 127, in a map whose numbers lie between `low` and `high`. */
  function colourOf(value, { low, high }) {
    if (!state.stretched) return COLOURS[state.signed ? "signed" : "absolute"][shown(value) + LEVELS];
    return COLOURS.absolute[LEVELS + Math.round(LEVELS * partOf(shown(value) / LEVELS, low, high))];
  }
  const partOf = (value, low, high) => clamp((value - low) / Math.max(high - low, 1 / LEVELS), 1);

  // ---- maps --------------------------------------------------------------------------------------------------------

  const RELIEF = 0.36; // how strongly the image shows through its patches
  const pictures = data.pictures.map((source) => Object.assign(new Image(), { src: source, onload: () => refresh() }));
  const element = (name, className, parent) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (parent) parent.append(made);
    return made;
  };

  const panes = data.models.map((model, number) => {
    const figure = element("figure", `pane model-${number}`, at("panes")), caption = element("figcaption", "", figure);
    const name = element("span", "model", caption);
    name.textContent = name.title = model.name;
    const layer = element("span", "layer", caption);
    const canvas = element("canvas", "map", figure);
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-roledescription", "similarity map");
    const line = element("div", "reading", figure);
    const pane = { number, layer, canvas, value: element("output", "value", line), about: element("span", "about", line) };
    listen(pane);
    return pane;
  });

  function listen({ canvas }) {
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
    };
    canvas.addEventListener("pointermove", (event) => moveTo(point(event)));
    canvas.addEventListener("pointerdown", (event) => {
      moveTo(point(event));
      if (event.pointerType === "mouse" && event.button === 0) pin(point(event));
    });
  }

  function draw(pane) {
    const found = reading(pane.number), [rows, columns] = found.grid, { canvas } = pane;
    const picture = pictures[data.models[pane.number].pictures[state.image]];
    if (!picture.naturalWidth) return found;
    canvas.style.aspectRatio = `${picture.naturalWidth} / ${picture.naturalHeight}`;
    const dots = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * dots);
    canvas.height = Math.round((canvas.width * picture.naturalHeight) / picture.naturalWidth);
    const brush = canvas.getContext("2d");
    const left = (column) => Math.round((column * canvas.width) / columns);
    const top = (row) => Math.round((row * canvas.height) / rows);
    const box = ({ row, column }) => [left(column), top(row), left(column + 1) - left(column), top(row + 1) - top(row)];
    if (pane.of !== picture || pane.grid !== found.grid || pane.pixels.width !== canvas.width) {
      Object.assign(pane, { of: picture, grid: found.grid }, texture(picture, found.grid, canvas.width, canvas.height, box));
    }
    brush.putImageData(painted(pane, found, box), 0, 0);
    frame(brush, box(found.query), dots, []);
    if (found.probe) frame(brush, box(found.probe), dots, [3 * dots, 2 * dots]);
    return found;
  }

  /** Return the pixels of an image, and how much lighter each is than the mean of its patch. */
  function texture(picture, [rows, columns], width, height, box) {
    const paper = element("canvas");
    Object.assign(paper, { width, height });
    const brush = paper.getContext("2d", { willReadFrequently: true });
    brush.imageSmoothingEnabled = picture.naturalWidth * 4 > width; // pixels of tiny images stay pixels
    brush.imageSmoothingQuality = "high";
    brush.drawImage(picture, 0, 0, width, height);
    const pixels = brush.getImageData(0, 0, width, height), relief = new Float32Array(width * height);
    for (let index = 0; index < rows * columns; index += 1) {
      const [left, top, across, down] = box({ row: Math.floor(index / columns), column: index % columns });
      let sum = 0;
      for (let row = top; row < top + down; row += 1) {
        for (let at = row * width + left; at < row * width + left + across; at += 1) {
          const first = 4 * at;
          relief[at] = 0.3 * pixels.data[first] + 0.59 * pixels.data[first + 1] + 0.11 * pixels.data[first + 2];
          sum += relief[at];
        }
      }
      const mean = sum / (across * down);
      for (let row = top; row < top + down; row += 1) {
        for (let at = row * width + left; at < row * width + left + across; at += 1) relief[at] = RELIEF * (relief[at] - mean);
      }
    }
    return { pixels, relief, made: new ImageData(new Uint8ClampedArray(pixels.data), width, height) };
  }

  /** Return the map as pixels: each patch in its colour, on average exactly, with the relief of the image in it. */
  function painted({ pixels, relief, made }, found, box) {
    const { values, grid: [, columns] } = found;
    const own = state.overlay, under = 1 - own, from = pixels.data, into = made.data;
    values.forEach((value, index) => {
      const [red, green, blue] = colourOf(value, found);
      const [left, top, across, down] = box({ row: Math.floor(index / columns), column: index % columns });
      for (let row = top; row < top + down; row += 1) {
        const end = row * pixels.width + left + across;
        for (let at = end - across, first = 4 * at; at < end; at += 1, first += 4) {
          const light = relief[at];
          into[first] = under * from[first] + own * (red + light);
          into[first + 1] = under * from[first + 1] + own * (green + light);
          into[first + 2] = under * from[first + 2] + own * (blue + light);
        }
      }
    });
    return made;
  }

  /** Outline a patch so that it stands out from any colour. */
  function frame(brush, [left, top, across, down], dots, dash) {
    const [x, y, width, height] = [left + 2 * dots, top + 2 * dots, across - 4 * dots, down - 4 * dots];
    for (const [ink, thick, gaps] of [["rgb(0 0 0 / 0.75)", 4 * dots, []], ["#fff", 2 * dots, dash]]) {
      brush.lineWidth = thick;
      brush.setLineDash(gaps);
      brush.strokeStyle = ink;
      brush.strokeRect(x, y, width, height);
    }
    brush.setLineDash([]);
  }

  function describe(pane, found) {
    const model = data.models[pane.number], measure = state.signed ? "cos" : "|cos|";
    pane.layer.textContent = `${model.layers[found.layer]}\u2002${found.grid.join("\u2009×\u2009")}`;
    pane.value.textContent = text(found.probe ? found.pair : found.mean);
    pane.about.textContent = found.probe
      ? `${measure} with the pinned patch${state.stretched ? `; all from ${text(found.low)} to ${text(found.high)}` : ""}`
      : `mean ${measure} with the other ${found.values.length - 1}; from ${text(found.low)} to ${text(found.high)}`;
    const label = `${model.name}, ${model.layers[found.layer]}, patch ${place(found.query)}: `;
    pane.canvas.setAttribute("aria-label", `${label}${pane.value.textContent} ${pane.about.textContent}. Arrow keys move the patch.`);
  }

  // ---- the curve of P ----------------------------------------------------------------------------------------------

  const LEFT = 34, RIGHT = 16, TOP = 10, BOTTOM = 22; // explorer.css aligns the slider with them
  function svg(name, attributes, words) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (words !== undefined) made.textContent = words;
    return made;
  }

  function drawCurve() {
    const curve = at("curve"), width = curve.clientWidth, height = curve.clientHeight;
    const across = (part) => LEFT + part * (width - LEFT - RIGHT);
    const up = (value) => TOP + (1 - value) * (height - TOP - BOTTOM);
    const parts = [];
    for (const value of [0, 0.5, 1]) {
      parts.push(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: up(value), y2: up(value) }));
      parts.push(svg("text", { x: LEFT - 8, y: up(value) + 4, "text-anchor": "end" }, String(value)));
    }
    const now = across(relativeDepth(LEADER, state.step));
    parts.push(svg("line", { class: "now", x1: now, x2: now, y1: TOP - 4, y2: height - BOTTOM }));
    const every = Math.ceil((STEPS * 26) / Math.max(1, width - LEFT - RIGHT)); // names that fit side by side
    LEADER.layers.forEach((layer, step) => {
      if (step !== state.step && (step % every || Math.abs(step - state.step) < every)) return;
      const name = layer.replace(/^block /, "");
      const anchor = name.length > 2 && step === STEPS - 1 && width < 500 ? "end" : "middle";
      const where = { x: across(relativeDepth(LEADER, step)) + (anchor === "end" ? RIGHT - 2 : 0), y: height - 6, "text-anchor": anchor };
      parts.push(svg("text", { ...where, class: step === state.step ? "now" : "" }, name));
    });
    data.models.forEach((model, number) => {
      const values = model.similarity[state.image], own = `model-${number}`;
      const place = (value, step) => [across(relativeDepth(model, step)), up(value)];
      const untrained = model.random[state.image]?.map(place), points = values.map(place);
      if (untrained) parts.push(svg("path", { class: `${own} random`, d: `M${untrained.join("L")}` }));
      parts.push(svg("path", { class: own, d: `M${points.join("L")}` }));
      points.forEach(([x, y], step) => {
        parts.push(svg("circle", { class: own, cx: x, cy: y, r: step === layerOf(number) ? 4.5 : 2 }));
      });
    });
    curve.replaceChildren(...parts);
    const texts = data.models.map((model, number) => {
      const layer = layerOf(number), span = element("span");
      element("i", `model-${number}`, span);
      span.append(data.models.length > 1 ? `${model.name} ` : `${model.layers[layer]} `);
      element("b", "", span).textContent = text(model.similarity[state.image][layer], 3);
      const untrained = model.random[state.image];
      if (untrained) span.append(` (random weights ${text(untrained[layer], 3)})`);
      return span;
    });
    at("p-values").replaceChildren(...texts);
    const sentence = data.models.map((model, number) => `${model.name}: ${text(model.similarity[state.image][layerOf(number)], 3)}`);
    curve.setAttribute("aria-label", `P by layer, now at ${LEADER.layers[state.step]}. ${sentence.join("; ")}`);
    at("layer").setAttribute("aria-valuetext", LEADER.layers[state.step]);
  }

  function layerByPointer(event) {
    if (event.type === "pointermove" && !event.buttons) return;
    const box = at("curve").getBoundingClientRect();
    const part = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
    const away = LEADER.depths.map((_, step) => Math.abs(relativeDepth(LEADER, step) - part));
    goTo(away.indexOf(Math.min(...away)));
  }

  // ---- controls ----------------------------------------------------------------------------------------------------

  const scale = at("scale");
  /** Return the names of the ends and the middle of the colour scale, and what it is in words. */
  function ticks([{ low, high }, ...others]) {
    if (state.stretched && others.length) return [["lowest", "highest"], "Colours from the lowest (dark) to the highest number (light) of each map"];
    if (state.stretched) return [[low, (low + high) / 2, high].map((value) => text(value)), `Colours from ${text(low)} (dark) to ${text(high)} (light)`];
    if (state.signed) return [["\u22121", "0", "1"], "Colours from -1 (blue) over 0 (white) to 1 (red)"];
    return [["0", "0.5", "1"], "Colours from 0 (dark) to 1 (light)"];
  }

  function drawLegend(all) {
    const whole = { low: state.signed ? -1 : 0, high: 1 };
    const values = Array.from({ length: 255 }, (_, k) => (state.signed ? k - LEVELS : Math.round(k / 2)));
    const pixels = new Uint8ClampedArray(values.flatMap((value) => [...colourOf(value, whole), 255]));
    scale.getContext("2d").putImageData(new ImageData(pixels, 255, 1), 0, 0);
    const [names, words] = ticks(all);
    scale.setAttribute("aria-label", words);
    at("ticks").replaceChildren(...names.map((tick) => {
      const span = element("span");
      span.textContent = tick;
      return span;
    }));
    at("needles").replaceChildren(...all.filter((found) => found.probe).map((found, number) => {
      const needle = element("span", `needle model-${number}`), { low, high } = state.stretched ? found : whole;
      needle.style.left = `${100 * partOf(found.pair, low, high)}%`;
      return needle;
    }));
  }

  // ---- the picture, and the link to what is shown ------------------------------------------------------------------

  const MARGIN = 16, LINE = 22;
  /** Return all maps side by side as one picture, with their names, numbers and the colour scale. */
  function picture() {
    const dots = window.devicePixelRatio || 1, made = element("canvas"), brush = made.getContext("2d");
    const style = getComputedStyle(document.body), widths = panes.map((pane) => pane.canvas.width / dots);
    const height = Math.max(...panes.map((pane) => pane.canvas.height / dots));
    made.width = dots * (widths.reduce((sum, width) => sum + width + MARGIN, MARGIN));
    made.height = dots * (height + 2 * MARGIN + 4 * LINE);
    brush.scale(dots, dots);
    brush.fillStyle = style.backgroundColor;
    brush.fillRect(0, 0, made.width, made.height);
    brush.fillStyle = style.color;
    brush.font = `13px ${style.fontFamily}`;
    const below = MARGIN + LINE + height;
    let left = MARGIN;
    panes.forEach((pane, number) => {
      const model = data.models[number], value = text(model.similarity[state.image][layerOf(number)], 3);
      brush.fillText(`${model.name}, ${model.layers[layerOf(number)]}, P ${value}`, left, MARGIN + 12, widths[number]);
      brush.drawImage(pane.canvas, left, MARGIN + LINE, widths[number], pane.canvas.height / dots);
      brush.fillText(`${pane.value.textContent} ${pane.about.textContent}`, left, below + LINE - 4, widths[number]);
      left += widths[number] + MARGIN;
    });
    const bar = Math.min(220, widths[0]);
    brush.drawImage(scale, MARGIN, below + LINE + 6, bar, 10);
    const names = [...at("ticks").children].map((tick) => tick.textContent);
    names.forEach((name, number) => {
      brush.textAlign = ["left", "center", "right"][Math.round((2 * number) / (names.length - 1))];
      brush.fillText(name, MARGIN + (bar * number) / (names.length - 1), below + 2 * LINE + 12);
    });
    brush.textAlign = "left";
    const patches = [state.probe, state.query].flatMap((point) => (point ? [place(patchAt(point, grid()))] : []));
    const words = `${NAMES[state.image]}: ${state.signed ? "cos" : "|cos|"} ${patches.length > 1 ? "of" : "with"} ${patches.join(" with ")}`;
    brush.fillText(words, MARGIN, below + 3 * LINE + 12, left - 2 * MARGIN);
    return made;
  }

  function save() {
    const name = [data.models[0].name, LEADER.layers[state.step], NAMES[state.image]].join("-");
    picture().toBlob((blob) => {
      const link = element("a");
      link.href = URL.createObjectURL(blob);
      link.download = `${name.replace(/\.\w+$/, "").replace(/[^\p{L}\p{N}.=_-]+/gu, "-").slice(0, 100)}.png`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    });
  }

  const grid = () => data.models[0].grids[layerOf(0)];
  /** Return what is shown as a fragment of the address; patches are ROW-COLUMN of the first map, from 0. */
  function fragment() {
    const words = new URLSearchParams({ image: NAMES[state.image], layer: LEADER.layers[state.step] });
    for (const [key, point] of [["patch", state.query], ["with", state.probe]]) {
      if (point) words.set(key, [patchAt(point, grid()).row, patchAt(point, grid()).column].join("-"));
    }
    if (!state.signed) words.set("measure", "absolute");
    if (state.stretched) words.set("contrast", "stretched");
    if (state.overlay < 1) words.set("overlay", Math.round(100 * state.overlay));
    return `#${words}`;
  }

  /** Show what the fragment of the address names, and the start where it names nothing that is here. */
  function follow() {
    const words = new URLSearchParams(location.hash.slice(1)), among = (names, key, other) => {
      const found = names.indexOf(words.get(key));
      return found < 0 ? other : found;
    };
    Object.assign(state, START, { image: among(NAMES, "image", START.image), step: among(LEADER.layers, "layer", START.step) });
    for (const [key, part] of [["patch", "query"], ["with", "probe"]]) {
      const found = /^(\d+)-(\d+)$/.exec(words.get(key) || "");
      if (found) state[part] = { x: (Number(found[2]) + 0.5) / grid()[1], y: (Number(found[1]) + 0.5) / grid()[0] };
    }
    state.signed = words.get("measure") !== "absolute";
    state.stretched = words.get("contrast") === "stretched";
    if (/^\d+$/.test(words.get("overlay") || "")) state.overlay = clamp(Number(words.get("overlay")), 100) / 100;
    refresh();
  }

  let pending;
  function remember() {
    clearTimeout(pending);
    pending = setTimeout(() => { // browsers limit how often the address may change
      try {
        history.replaceState(null, "", fragment());
      } catch { /* a page inside another one may have no address of its own */ }
    }, 200);
  }

  let waiting = false;
  function refresh() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; render(); });
  }

  function render() {
    const all = panes.map((pane) => { const found = draw(pane); describe(pane, found); return found; });
    const [first] = all;
    drawCurve();
    drawLegend(all);
    remember();
    at("layer").value = LEADER.depths[state.step];
    [...at("images").children].forEach((button, image) => button.setAttribute("aria-pressed", image === state.image));
    at("image-name").selectedIndex = state.image;
    at("signed").setAttribute("aria-pressed", state.signed);
    at("absolute").setAttribute("aria-pressed", !state.signed);
    at("stretch").setAttribute("aria-pressed", state.stretched);
    at("overlay").value = Math.round(100 * state.overlay);
    at("overlay-value").textContent = `${Math.round(100 * state.overlay)}\u2009%`;
    at("where").textContent = first.probe ? `${place(first.probe)}, with pinned ${place(first.query)}` : place(first.query);
    at("pin").setAttribute("aria-pressed", Boolean(state.probe));
    at("pin").textContent = state.probe ? "Unpin" : "Pin this patch";
    at("hint").textContent = state.probe
      ? "Move over others to read their cosine with it."
      : "Colours are cosines with the framed patch. Click it to keep it.";
  }

  function moveTo(point) {
    state[state.probe ? "probe" : "query"] = point;
    refresh();
  }
  function pin(point) {
    if (state.probe) state.query = point || state.probe;
    state.probe = state.probe ? null : { ...state.query };
    refresh();
  }
  function goTo(step) { state.step = clamp(step, STEPS - 1); refresh(); }
  function choose(image) { state.image = (image + data.names.length) % data.names.length; refresh(); }
  function measure(signed) { state.signed = signed; refresh(); }
  function stretch() { state.stretched = !state.stretched; refresh(); }
  let lastOverlay = 1;
  function toggleOverlay() {
    if (state.overlay) [lastOverlay, state.overlay] = [state.overlay, 0];
    else state.overlay = lastOverlay;
    refresh();
  }
  function step(across, down) {
    const grid = data.models[active()].grids[layerOf(active())], patch = patchAt(state.probe || state.query, grid);
    const row = clamp(patch.row + down, grid[0] - 1), column = clamp(patch.column + across, grid[1] - 1);
    moveTo({ x: (column + 0.5) / grid[1], y: (row + 0.5) / grid[0] });
  }
  /** Return the model whose grid the arrow keys walk: that of the map with the focus, else the first. */
  const active = () => Math.max(0, panes.findIndex((pane) => pane.canvas === document.activeElement));

  const KEYS = {
    ArrowLeft: () => step(-1, 0), ArrowRight: () => step(1, 0), ArrowUp: () => step(0, -1), ArrowDown: () => step(0, 1),
    j: () => goTo(state.step - 1), k: () => goTo(state.step + 1), Home: () => goTo(0), End: () => goTo(STEPS - 1),
    b: () => choose(state.image - 1), n: () => choose(state.image + 1),
    p: () => pin(), c: () => measure(!state.signed), s: stretch, o: toggleOverlay, "?": () => at("help").showModal(),
  };
  document.addEventListener("keydown", (event) => {
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    // A list takes letters, which find a name; sliders have arrows of their own.
    const own = event.target.matches?.(key.length > 1 ? "input[type=range], select" : "select");
    if (event.ctrlKey || event.metaKey || event.altKey || own || at("help").open || !(key in KEYS)) return;
    event.preventDefault();
    KEYS[key]();
    requestAnimationFrame(() => { at("spoken").textContent = panes.map((pane) => pane.canvas.getAttribute("aria-label")).join(" "); });
  });

  NAMES.forEach((name, image) => {
    element("option", "", at("image-name")).textContent = name;
    const button = element("button", "", at("images"));
    button.type = "button";
    button.title = name;
    button.setAttribute("aria-label", name);
    element("img", "", button).src = data.pictures[data.models[0].pictures[image]];
    button.firstChild.alt = "";
    button.addEventListener("click", () => choose(image));
  });
  data.notes.forEach((note) => { element("li", "", at("notes")).textContent = note; });
  document.body.classList.toggle("several", panes.length > 1);
  at("subtitle").textContent = "cosines between the patches of an image, layer by layer";
  at("layer").max = LEADER.deepest;
  at("layer").addEventListener("input", (event) => { // past layers that were left out, in the direction it was moved
    const depth = Number(event.target.value), on = depth > LEADER.depths[state.step];
    const step = on ? LEADER.depths.findIndex((it) => it >= depth) : LEADER.depths.findLastIndex((it) => it <= depth);
    goTo(step < 0 && on ? STEPS - 1 : step);
    event.target.value = LEADER.depths[state.step];
  });
  at("overlay").addEventListener("input", (event) => { state.overlay = event.target.value / 100; refresh(); });
  at("signed").addEventListener("click", () => measure(true));
  at("absolute").addEventListener("click", () => measure(false));
  at("stretch").addEventListener("click", stretch);
  at("image-name").addEventListener("change", (event) => choose(event.target.selectedIndex));
  at("save").addEventListener("click", save);
  window.addEventListener("hashchange", follow);
  at("pin").addEventListener("click", () => pin());
  at("open-help").addEventListener("click", () => at("help").showModal());
  for (const type of ["pointerdown", "pointermove"]) at("curve").addEventListener(type, layerByPointer);
  new ResizeObserver(refresh).observe(document.body);
  follow();
})();
