"use strict";
// ABOUT: classes, colours, layers, photos, chunk, files ("" where this file holds everything). Pictures come in by calls of
// ESOL.add, one for each chunk of a layer: from scripts further down, or from files that are loaded when somebody looks.
const ESOL = (() => {
  const photos = ABOUT.photos, chunks = {}, loading = {}, waiting = {};
  let thumbs = [], order = [], only = -1, shown = "", level = 0, at = 0, large = -1;
  const $ = (id) => document.getElementById(id);

  const add = (layer, start, entries) => {
    const name = `${layer} ${start / ABOUT.chunk}`;
    chunks[name] = entries;
    for (const told of waiting[name] || []) told();
    delete waiting[name];
  };
  const entry = (layer, i) => new Promise((done, failed) => {
    const chunk = Math.floor(i / ABOUT.chunk), name = `${layer} ${chunk}`;
    const answer = () => done(chunks[name][i - chunk * ABOUT.chunk]);
    if (chunks[name]) return answer();
    if (!ABOUT.files) return done(0);
    (waiting[name] = waiting[name] || []).push(answer);
    if (loading[name]) return;
    loading[name] = document.createElement("script");
    loading[name].src = `${ABOUT.files}/${layer}-${String(chunk).padStart(4, "0")}.js`;
    loading[name].onerror = () => failed(new Error(`${loading[name].src} is missing`));
    document.head.append(loading[name]);
  });
  const picture = (data, kind) => new Promise((done, failed) => {
    const image = new Image();
    image.onload = () => done(image);
    image.onerror = () => failed(new Error("a picture cannot be read"));
    image.src = `data:image/${kind};base64,${data}`;
  });
  // The first channel of a gray PNG, enlarged to a size.
  const values = async (data, width, height, smooth) => {
    const image = await picture(data, "png"), canvas = document.createElement("canvas");
    canvas.width = width; canvas.height = height;
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    pen.imageSmoothingEnabled = smooth;
    pen.drawImage(image, 0, 0, width, height);
    const pixels = pen.getImageData(0, 0, width, height).data, found = new Uint8Array(width * height);
    for (let p = 0; p < found.length; p++) found[p] = pixels[4 * p];
    return found;
  };
  const colours = ABOUT.colours.map((text) => text.match(/\d+/g).map(Number));
  const heats = [[12, 7, 60], [86, 15, 109], [187, 55, 84], [249, 142, 8], [252, 255, 164]];
  const heat = (value) => {
    const place = value / 255 * 4, low = Math.min(3, Math.floor(place));
    return heats[low].map((c, k) => c + (heats[low + 1][k] - c) * (place - low));
  };
  const paint = (pen, width, height, of) => {
    const image = pen.getImageData(0, 0, width, height), data = image.data;
    for (let p = 0; p < width * height; p++) {
      const over = of(p);
      if (!over) continue;
      for (let k = 0; k < 3; k++) data[4 * p + k] += (over[0][k] - data[4 * p + k]) * over[1];
    }
    pen.putImageData(image, 0, 0);
  };
  const label = (mask) => (p) => mask[p] === 0 ? [[0, 0, 0], .3]
    : mask[p] === 255 ? [[255, 255, 255], .6] : [colours[mask[p]] || [255, 255, 255], .6];

  // What can be shown: the photo, each source of class maps, each stage with masks.
  const views = ABOUT.layers.flatMap((layer) => layer.kind === "maps"
    ? (layer.sources || [""]).map((source) => ({ name: source || layer.name, layer: layer.name, kind: "maps", source }))
    : [{ name: layer.name === "photos" ? "photo" : layer.name, layer: layer.name, kind: layer.kind }]);
  const draw = async (canvas, i, view, base) => {
    const [width, height] = photos[i].shape;
    const image = await picture(base || await entry("photos", i), "jpeg");
    canvas.width = width; canvas.height = height;
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    pen.drawImage(image, 0, 0, width, height);
    if (view.kind === "photo") return;
    const own = await entry(view.layer, i);
    if (!own) return;
    if (view.kind === "mask") return paint(pen, width, height, label(await values(own, width, height, false)));
    const maps = own[view.source] || [];
    const best = new Uint8Array(width * height), whose = new Uint8Array(width * height);
    for (const [number, data] of maps) {
      const map = await values(data, width, height, true);
      for (let p = 0; p < map.length; p++) if (map[p] > best[p]) { best[p] = map[p]; whose[p] = number + 1; }
    }
    if (!level) return paint(pen, width, height, (p) => [heat(best[p]), .6]);
    const mask = whose.map((number, p) => best[p] > level * 2.55 ? number : 0);
    paint(pen, width, height, label(mask));
  };

  const sorted = () => {
    const way = $("order").value, high = 1e9;
    order = photos.map((_, i) => i).filter((i) => only < 0 || photos[i].labels.includes(only));
    const value = {
      worst: (i) => photos[i].iou ?? high,
      trust: (i) => photos[i].judge === null ? high : photos[i].judge - (photos[i].lost || []).length * 1e6,
      name: (i) => i,
      class: (i) => photos[i].labels.length ? photos[i].labels[0] : high,
    }[way];
    if (way === "name") order.sort((a, b) => photos[a].key < photos[b].key ? -1 : 1);
    else order.sort((a, b) => value(a) - value(b) || a - b);
  };
  const cells = new Map();
  const measure = () => {
    const room = $("grid").clientWidth - 8, columns = Math.max(2, Math.floor(room / 168));
    return { columns, width: Math.floor(room / columns) - 6, step: (innerWidth <= 600 ? 90 : 120) + 48 };
  };
  const layout = () => {
    const { columns, width, step } = measure(), grid = $("grid");
    $("room").style.height = `${Math.ceil(order.length / columns) * step + 8}px`;
    const first = Math.max(0, Math.floor(grid.scrollTop / step) - 1) * columns;
    const last = Math.min(order.length, (Math.ceil((grid.scrollTop + grid.clientHeight) / step) + 1) * columns);
    for (const [place, cell] of cells) if (place < first || place >= last) { cell.remove(); cells.delete(place); }
    for (let place = first; place < last; place++) {
      let cell = cells.get(place);
      if (!cell) { cell = make(place); cells.set(place, cell); $("room").append(cell); }
      cell.style.cssText = `left:${4 + place % columns * (width + 6)}px;top:${4 + Math.floor(place / columns) * step}px;width:${width}px`;
      cell.classList.toggle("at", place === at);
    }
  };
  const make = (place) => {
    const i = order[place], cell = document.createElement("div"), canvas = document.createElement("canvas");
    const about = photos[i], name = document.createElement("p"), more = document.createElement("p");
    name.textContent = about.key;
    const lost = (about.lost || []).map((c) => ABOUT.classes[c]);
    more.textContent = [about.labels.map((c) => ABOUT.classes[c]).join(", ") || "no object",
      about.iou === null ? "" : `IoU ${about.iou}`, about.judge === null ? "" : `judge ${about.judge}`,
      lost.length ? `lacks ${lost.join(", ")}` : ""].filter(Boolean).join(" · ");
    name.title = about.key; more.title = more.textContent;
    cell.className = "cell"; cell.dataset.photo = i;
    cell.append(canvas, name, more);
    cell.onclick = () => { at = place; open(i); };
    show(canvas, i);
    return cell;
  };
  const fail = (error) => { $("caption").textContent = error.message; };
  const show = (canvas, i) => {
    const view = views.find((one) => one.name === shown) || views[0];
    const base = view.kind === "photo" && thumbs[i] ? thumbs[i] : undefined;
    draw(canvas, i, view, base).catch(fail);
  };
  const again = () => { for (const cell of cells.values()) cell.remove(); cells.clear(); layout(); };
  const pick = (name) => {
    shown = name;
    for (const button of $("layers").children) button.setAttribute("aria-pressed", button.dataset.view === name);
    again();
  };
  const open = (i) => {
    large = i;
    const about = photos[i];
    $("caption").textContent = `${about.key} · ${about.labels.map((c) => ABOUT.classes[c]).join(", ") || "no object"}`;
    $("views").replaceChildren(...views.map((view) => {
      const figure = document.createElement("figure"), canvas = document.createElement("canvas");
      const caption = document.createElement("figcaption");
      caption.textContent = view.name;
      figure.append(canvas, caption);
      draw(canvas, i, view).catch(fail);
      return figure;
    }));
    if (!$("large").open) $("large").showModal();
    layout();
  };
  const step = (by) => {
    at = Math.min(order.length - 1, Math.max(0, at + by));
    const { columns, step: tall } = measure(), top = Math.floor(at / columns) * tall, grid = $("grid");
    if (top < grid.scrollTop) grid.scrollTop = top;
    if (top + tall > grid.scrollTop + grid.clientHeight) grid.scrollTop = top + tall - grid.clientHeight;
    layout();
    if ($("large").open) open(order[at]);
  };
  const keys = (event) => {
    const columns = measure().columns, opened = $("large").open;
    const ways = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: opened ? 1 : columns, ArrowUp: opened ? -1 : -columns };
    if (event.target.matches("input, select")) return;
    if (event.key in ways) { step(ways[event.key]); event.preventDefault(); }
    else if (event.key === "Enter" && document.activeElement === $("grid")) { open(order[at]); event.preventDefault(); }
    else if (/^[1-9]$/.test(event.key) && views[event.key - 1]) pick(views[event.key - 1].name);
  };
  const start = () => {
    for (const [number, view] of views.entries()) {
      const button = document.createElement("button");
      button.type = "button"; button.textContent = view.name; button.dataset.view = view.name;
      if (number < 9) button.title = `key ${number + 1}`;
      button.onclick = () => pick(view.name);
      $("layers").append(button);
    }
    $("order").onchange = () => { sorted(); at = 0; $("grid").scrollTop = 0; again(); };
    $("threshold").oninput = (event) => {
      level = Number(event.target.value);
      $("level").textContent = level ? (level / 100).toFixed(2) : "map";
      const maps = views.filter((view) => view.kind === "maps");
      if (maps.length && !maps.some((view) => view.name === shown)) pick(maps[maps.length - 1].name);
      else again();
      if ($("large").open) open(large);
    };
    if (!views.some((view) => view.kind === "maps")) $("threshold").disabled = true;
    for (const button of $("legend").children) button.onclick = () => {
      only = only === Number(button.dataset.class) ? -1 : Number(button.dataset.class);
      for (const other of $("legend").children) other.setAttribute("aria-pressed", Number(other.dataset.class) === only);
      sorted(); at = 0; again();
    };
    $("grid").onscroll = layout;
    addEventListener("resize", again);
    addEventListener("keydown", keys);
    sorted();
    pick((views.find((view) => view.layer === ABOUT.best) || views[views.length - 1]).name);
  };
  return { add, start, thumbs: (some) => { thumbs = thumbs.concat(some); }, order: () => order, views };
})();
