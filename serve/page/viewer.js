// <vilseg-viewer name="…" context="…" data="…">: shows a segmentation, with class names at the pointer and a live threshold.
// `data` is base64 of the JSON of `viewer_data` in serve/encoding.py. `context` is JSON with `settings`, values to apply, and
// `link`, query parameters for the page's address. Settings are stored by name, so a new image keeps them.
(() => {
  "use strict";
  const NO_CLASS = 255;
  const defaults = { view: "classes", opacity: 0.6, threshold: 0 };
  const settings = {};
  const settingsOf = (name) => (settings[name] ??= { ...defaults });

  const STYLE = `
    :host { display: block; color: var(--body-text-color, #222); font: 14px/1.4 system-ui, sans-serif; }
    .stage { position: relative; display: flex; justify-content: center; border-radius: 8px; overflow: hidden;
             background: var(--background-fill-secondary, #f4f4f5); }
    canvas { display: block; max-width: 100%; max-height: 70vh; touch-action: pan-y; image-rendering: auto; }
    canvas.small { width: 100%; object-fit: contain; image-rendering: pixelated; }
    .tip { position: absolute; pointer-events: none; padding: 2px 8px; border-radius: 6px; background: #111d; color: #fff;
           white-space: nowrap; transform: translate(-50%, calc(-100% - 12px)); display: none; }
    ul { list-style: none; display: flex; flex-wrap: wrap; gap: 6px; margin: 10px 0 0; padding: 0; }
    button { display: flex; align-items: center; gap: 8px; border: 1px solid var(--border-color-primary, #ddd);
             border-radius: 8px; padding: 4px 10px; font: inherit; color: inherit; cursor: pointer;
             background: var(--background-fill-primary, #fff); }
    button:focus-visible { outline: 2px solid var(--color-accent, #f60); outline-offset: 1px; }
    button[aria-pressed="true"] { border-color: currentColor; box-shadow: 0 0 0 1px currentColor; }
    i { width: 12px; height: 12px; border-radius: 3px; flex: none; }
    small { opacity: 0.75; font-variant-numeric: tabular-nums; }
    .note { margin: 8px 0 0; opacity: 0.75; }`;

  const percent = (fraction) => (fraction > 0 && fraction < 0.005 ? "<1 %" : `${Math.round(fraction * 100)} %`);

  function loadImage(url) {
    return new Promise((resolve, reject) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = () => reject(new Error("an image of the result cannot be shown"));
      image.src = url;
    });
  }

  function pixels(image) {
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return context.getImageData(0, 0, canvas.width, canvas.height);
  }

  // Clusters get pastel colours, which no class has, with hues a golden angle apart.
  function clusterColour(index) {
    const hue = (index * 137.508) % 360;
    const channel = (n) => {
      const k = (n + hue / 30) % 12;
      return Math.round(255 * (0.72 - 0.2 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
    };
    return [channel(0), channel(8), channel(4)];
  }

  // Dark blue, green, yellow with evenly increasing lightness, so that scores can be distinguished without colours too.
  const RAMP = [[48, 18, 59], [49, 86, 143], [32, 144, 140], [94, 201, 98], [253, 231, 37]];
  function scoreColour(score) {
    const at = Math.min(score / 255, 0.9999) * (RAMP.length - 1);
    const low = Math.floor(at), part = at - low;
    return RAMP[low].map((value, i) => Math.round(value + part * (RAMP[low + 1][i] - value)));
  }
  const CLUSTERS = Array.from({ length: 256 }, (_, i) => clusterColour(i));
  const SCORES = Array.from({ length: 256 }, (_, i) => scoreColour(i));

  class Viewer extends HTMLElement {
    static observedAttributes = ["data"];

    constructor() {
      super();
      const root = this.attachShadow({ mode: "open" });
      root.innerHTML = `<style>${STYLE}</style>
        <div class="stage"><canvas role="img"></canvas><div class="tip" role="status"></div></div>
        <ul aria-label="Classes in the picture"></ul><p class="note"></p>`;
      [this.canvas, this.tip, this.list, this.note] = ["canvas", ".tip", "ul", ".note"].map((q) => root.querySelector(q));
      this.canvas.addEventListener("pointermove", (event) => this.hover(event));
      this.canvas.addEventListener("pointerdown", (event) => this.hover(event));
      this.canvas.addEventListener("pointerleave", () => this.leave());
      this.marked = this.kept = null;
    }

    get settings() { return settingsOf(this.getAttribute("name")); }

    async attributeChangedCallback(_, __, data) {
      if (!data) return;
      const turn = (this.turn = (this.turn ?? 0) + 1);
      const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
      const result = JSON.parse(new TextDecoder().decode(bytes));
      const context = JSON.parse(this.getAttribute("context") || "{}");
      Object.assign(this.settings, context.settings);
      try {
        const [image, maps] = await Promise.all([loadImage(result.image), loadImage(result.maps)]);
        if (turn !== this.turn) return; // a newer result arrived while the images were loading
        this.result = result;
        this.photo = pixels(image);
        this.maps = pixels(maps);
      } catch (error) {
        this.note.textContent = String(error.message);
        return;
      }
      this.marked = this.kept = null;
      this.canvas.width = this.photo.width;
      this.canvas.height = this.photo.height;
      this.canvas.classList.toggle("small", this.photo.width < 320);
      this.update();
      if (context.link) writeLink(context.link);
      this.setAttribute("ready", String(turn));
    }

    // Return the class index of a pixel, with the threshold applied.
    label(at) {
      const { data } = this.maps;
      const below = data[4 * at + 1] < this.settings.threshold * 255;
      return below ? this.belowThreshold : data[4 * at];
    }

    update() {
      if (!this.result) return;
      const { classes, background } = this.result;
      const index = background === null ? -1 : classes.findIndex((entry) => entry.name === background);
      this.belowThreshold = index < 0 ? NO_CLASS : index;
      this.count();
      this.draw();
    }

    count() {
      const { classes } = this.result;
      const total = this.maps.width * this.maps.height;
      const areas = new Array(classes.length).fill(0), sums = new Array(classes.length).fill(0);
      let unlabelled = 0;
      for (let at = 0; at < total; at++) {
        const label = this.label(at);
        if (label === NO_CLASS) { unlabelled++; continue; }
        areas[label]++;
        sums[label] += this.maps.data[4 * at + 1] / 255;
      }
      const order = classes.map((_, i) => i).filter((i) => areas[i] > 0).sort((a, b) => areas[b] - areas[a]);
      this.list.replaceChildren(...order.map((i) => {
        const item = document.createElement("li"), button = document.createElement("button");
        const swatch = document.createElement("i"), name = document.createElement("span"), details = document.createElement("small");
        swatch.style.background = `rgb(${classes[i].colour})`;
        name.textContent = classes[i].name;
        details.textContent = `${percent(areas[i] / total)} · score ${(sums[i] / areas[i]).toFixed(2)}`;
        button.append(swatch, name, details);
        button.type = "button";
        button.dataset.class = classes[i].name;
        button.setAttribute("aria-pressed", String(this.kept === i));
        button.addEventListener("click", () => { this.kept = this.kept === i ? null : i; this.update(); this.focusOn(i); });
        for (const [event, mark] of [["pointerenter", i], ["focus", i], ["pointerleave", null], ["blur", null]])
          button.addEventListener(event, () => { this.marked = mark; this.draw(); });
        item.append(button);
        return item;
      }));
      const names = order.map((i) => `${classes[i].name} ${percent(areas[i] / total)}`).join(", ");
      this.canvas.setAttribute("aria-label", `The picture with its classes: ${names || "none"}`);
      this.note.textContent = unlabelled ? `${percent(unlabelled / total)} of the picture has no class at this threshold.` : "";
    }

    focusOn(index) {
      const name = this.result.classes[index].name;
      [...this.list.querySelectorAll("button")].find((button) => button.dataset.class === name)?.focus();
    }

    draw() {
      if (!this.result) return;
      const { view, opacity } = this.settings;
      const { classes } = this.result;
      const { data: photo, width, height } = this.photo;
      const out = new ImageData(width, height);
      const marked = this.marked ?? this.kept;
      for (let at = 0, p = 0; at < width * height; at++, p += 4) {
        const label = this.label(at);
        let tint = null, weight = opacity;
        if (view === "classes" && label !== NO_CLASS) tint = classes[label].colour;
        else if (view === "clusters") tint = CLUSTERS[this.maps.data[p + 2]];
        else if (view === "scores") tint = SCORES[this.maps.data[p + 1]];
        if (marked !== null && label !== marked) weight *= 0.15;
        const grey = 0.299 * photo[p] + 0.587 * photo[p + 1] + 0.114 * photo[p + 2];
        for (let c = 0; c < 3; c++) out.data[p + c] = tint === null ? photo[p + c] : (1 - weight) * grey + weight * tint[c];
        out.data[p + 3] = 255;
      }
      this.canvas.getContext("2d").putImageData(out, 0, 0);
    }

    hover(event) {
      if (!this.result) return;
      const box = this.canvas.getBoundingClientRect(), stage = this.canvas.parentElement.getBoundingClientRect();
      const x = Math.floor(((event.clientX - box.left) / box.width) * this.photo.width);
      const y = Math.floor(((event.clientY - box.top) / box.height) * this.photo.height);
      if (x < 0 || y < 0 || x >= this.photo.width || y >= this.photo.height) return this.leave();
      const at = y * this.photo.width + x, label = this.label(at);
      const [, score, cluster] = this.maps.data.subarray(4 * at, 4 * at + 3);
      const name = label === NO_CLASS ? "no class" : this.result.classes[label].name;
      const more = this.settings.view === "clusters" ? `cluster ${cluster}` : (score / 255).toFixed(2);
      this.tip.textContent = `${name} · ${more}`;
      this.tip.style.display = "block";
      const half = this.tip.offsetWidth / 2 + 4;
      this.tip.style.left = `${Math.max(half, Math.min(stage.width - half, event.clientX - stage.left))}px`;
      this.tip.style.top = `${Math.max(this.tip.offsetHeight + 12, event.clientY - stage.top)}px`;
      const mark = label === NO_CLASS ? null : label;
      if (mark !== this.marked) { this.marked = mark; this.draw(); }
    }

    leave() {
      this.tip.style.display = "none";
      if (this.marked !== null) { this.marked = null; this.draw(); }
    }
  }
  customElements.define("vilseg-viewer", Viewer);

  function writeLink(values) {
    const url = new URL(location.href);
    for (const [name, value] of Object.entries(values))
      value === null || value === "" ? url.searchParams.delete(name) : url.searchParams.set(name, value);
    history.replaceState(history.state, "", url);
  }

  // Called by Gradio's controls with the names of viewers and the settings to change.
  window.vilseg = {
    set(names, changes) {
      for (const name of names) Object.assign(settingsOf(name), changes);
      for (const viewer of document.querySelectorAll("vilseg-viewer"))
        if (names.includes(viewer.getAttribute("name"))) "threshold" in changes ? viewer.update() : viewer.draw();
      if (names.includes("picture")) writeLink(changes);
    },
    download(id) {
      // Gradio sets the URL of the file shortly after the event that creates it, so wait for it.
      setTimeout(() => document.querySelector(`#${id}`)?.closest("a, button")?.click() ?? document.querySelector(`#${id} button`)?.click(), 300);
    },
    async copyLink() {
      await navigator.clipboard.writeText(location.href);
    },
  };
})();
