// The page: filters, and a grid that contains only the cards near the viewport.

const GAP = 14, CARD_WIDTH = 290, TEXT_HEIGHT = 78; // px; the height of the text is fixed, so that card positions can be computed
const PAGE_CARDS = 20000; // maximum number of cards per page; browsers limit the height of an element to some ten million px
const MOST_CLASSES = 200; // maximum number of unchosen classes in the list; the text field finds the others
const BINS = 25;

const form = $("filters"), grid = $("grid");
const chosen = new Set(); // indices of the classes to filter by
const cards = new Map(); // position in `order` -> element
let order = new Uint32Array(0); // indices of the rows that pass the filter, sorted
let laidOutWidth = 0, page = 0, columns = 1, cardWidth = CARD_WIDTH, cardHeight = CARD_WIDTH;

// ---------------------------------------------------------------------------------------------------------- filter

function query() {
  const value = Object.fromEntries(new FormData(form));
  return {
    text: value.text, status: value.status, classes: chosen, all: value.match === "all", order: value.order,
    share: new Bounds(value.share_min, value.share_max, 100), score: new Bounds(value.score_min, value.score_max, 1),
  };
}

// The filter, the order and the open image are stored in the address after "#". Writing is delayed until there is a pause,
// because browsers block a page that changes its address some hundred times in half a minute, as a held arrow key would.
let addressDue = 0;
function writeAddress() {
  clearTimeout(addressDue);
  addressDue = setTimeout(() => history.replaceState(null, "", `${location.href.split("#")[0]}#${address()}`), 200);
}

function address() {
  const state = new URLSearchParams();
  for (const [name, value] of new FormData(form)) if (value) state.append(name, value);
  for (const index of chosen) state.append("class", about.classes[index]);
  if (openRow >= 0) state.append("open", rows.paths[openRow]);
  else if (openWanted) state.append("open", openWanted);
  return state;
}

function readAddress() {
  clearTimeout(addressDue);
  const state = new URLSearchParams(location.hash.slice(1));
  form.reset();
  for (const field of form.elements) {
    const value = state.get(field.name);
    if (!field.name || value === null) continue;
    if (field.type === "radio") field.checked = field.value === value;
    else field.value = value;
  }
  chosen.clear();
  for (const name of state.getAll("class")) {
    const index = about.classes.indexOf(name);
    if (index >= 0) chosen.add(index);
  }
  openWanted = state.get("open") ?? "";
}

function applyFilter({ keepPlace = false } = {}) {
  const asked = query();
  order = rows.select(asked);
  if (!keepPlace) page = 0;
  page = Math.min(page, Math.max(0, Math.ceil(order.length / PAGE_CARDS) - 1));
  showCounts(asked);
  showHistogram(asked);
  layOut();
  if (!keepPlace && grid.getBoundingClientRect().top < 0) document.querySelector(".results").scrollIntoView();
  if (openRow >= 0) showPosition();
}

function changeFilter() {
  applyFilter();
  writeAddress();
}

function showCounts(asked) {
  const loading = rows.count < about.rows ? ` · loading, ${number(rows.count)} so far` : "";
  const all = order.length === rows.count;
  $("count").textContent = (all ? pictures(about.rows) : `${number(order.length)} of ${pictures(about.rows)}`) + loading;
  $("count-all").textContent = number(rows.count);
  $("count-ok").textContent = number(rows.count - rows.rejectedCount);
  $("count-rejected").textContent = number(rows.rejectedCount);
  $("nothing").hidden = order.length > 0 || rows.count < about.rows;
  if (about.rows === 0) $("nothing").textContent = "There are no pictures here.";
  const active = [asked.text, asked.status, chosen.size, asked.share.bounded, asked.score.bounded].filter(Boolean).length;
  $("active").textContent = active ? `· ${active} set` : "";
  $("clear").hidden = !active;
  for (const of of document.querySelectorAll(".of")) {
    of.textContent = chosen.size ? `of the chosen class${chosen.size > 1 ? "es" : ""}` : of.dataset.none;
  }
}

function showHistogram({ score }) {
  const counts = rows.histogram(BINS, chosen), most = Math.max(1, ...counts);
  $("histogram").replaceChildren(...Array.from(counts, (count, bin) => {
    const bar = element("i", { title: `${(bin / BINS).toFixed(2)} to ${((bin + 1) / BINS).toFixed(2)}: ${number(count)}` });
    bar.style.height = count ? `${Math.max(3, (count / most) * 100)}%` : "0";
    bar.classList.toggle("in", score.holds((bin + 0.5) / BINS));
    return bar;
  }));
}

function showClasses() {
  const typed = $("class-text").value.trim().toLowerCase();
  const byCount = (a, b) => rows.classCounts[b] - rows.classCounts[a] || a - b;
  const named = (index) => !chosen.has(index) && about.classes[index].toLowerCase().includes(typed);
  const found = [...about.classes.keys()].filter(named).sort(byCount);
  const lines = [...[...chosen].sort(byCount), ...found.slice(0, MOST_CLASSES)].map((index) => {
    const box = element("input", { type: "checkbox", checked: chosen.has(index) });
    box.addEventListener("change", () => {
      if (box.checked) chosen.add(index);
      else chosen.delete(index);
      changeFilter();
    });
    const count = element("i", { textContent: number(rows.classCounts[index]) });
    return element("label", {}, box, swatch(index), element("bdi", { textContent: about.classes[index] }), count);
  });
  if (found.length > MOST_CLASSES) {
    lines.push(element("p", { className: "note", textContent: `+ ${number(found.length - MOST_CLASSES)} more: type to find them` }));
  }
  $("class-list").replaceChildren(...lines);
}

// ---------------------------------------------------------------------------------------------------------- grid

const pageCount = () => Math.min(PAGE_CARDS, order.length - page * PAGE_CARDS);

function layOut() {
  const width = (laidOutWidth = grid.clientWidth);
  columns = Math.max(1, Math.floor((width + GAP) / (CARD_WIDTH + GAP)));
  cardWidth = (width - GAP * (columns - 1)) / columns;
  cardHeight = Math.round(cardWidth / 2) + TEXT_HEIGHT;
  const lines = Math.ceil(pageCount() / columns);
  grid.style.height = `${Math.max(0, lines * (cardHeight + GAP) - GAP)}px`;
  for (const card of cards.values()) card.remove();
  cards.clear();
  const first = page * PAGE_CARDS;
  $("pages").hidden = order.length <= PAGE_CARDS;
  $("pages").children[1].textContent = `${number(first + 1)} to ${number(first + pageCount())} of ${number(order.length)}`;
  $("page-before").disabled = page === 0;
  $("page-after").disabled = first + pageCount() >= order.length;
  drawCards();
}

const firstLine = () => Math.max(0, Math.floor(-grid.getBoundingClientRect().top / (cardHeight + GAP)));

// Create the cards near the viewport and remove the others.
function drawCards() {
  const line = firstLine(), lines = Math.ceil(window.innerHeight / (cardHeight + GAP));
  const start = page * PAGE_CARDS + Math.max(0, line - 1) * columns;
  const end = Math.min(page * PAGE_CARDS + pageCount(), page * PAGE_CARDS + (line + lines + 2) * columns);
  for (const [place, card] of cards) {
    if (place >= start && place < end) continue;
    card.remove();
    cards.delete(place);
  }
  for (let place = end - 1; place >= start; place--) { // backwards, so that DOM and Tab order match
    if (cards.has(place)) continue;
    const card = makeCard(order[place]), onPage = place - page * PAGE_CARDS;
    const left = (onPage % columns) * (cardWidth + GAP), top = Math.floor(onPage / columns) * (cardHeight + GAP);
    card.style.cssText = `width:${cardWidth}px;height:${cardHeight}px;transform:translate(${left}px,${top}px)`;
    cards.set(place, card);
    grid.insertBefore(card, cards.get(place + 1) ?? null);
  }
}

function makeCard(row) {
  const path = rows.paths[row], media = element("span", { className: "media" });
  const card = element("button", { type: "button", className: "tile", title: visible(path) }, media);
  card.addEventListener("click", () => openLarge(row));
  if (rows.rejected[row]) {
    card.classList.add("rejected");
    media.append(element("span", { className: "sentence", textContent: rows.errors.get(row) }));
    card.append(element("span", { className: "line" }, element("span", { className: "path" }, ...pathElements(path))),
      element("span", { className: "note", textContent: "rejected" }));
    return card;
  }
  const image = element("img", { alt: "", decoding: "async", src: fileUrl("thumbs", path, ".webp") });
  image.addEventListener("error", () => {
    if (indexed && !image.classList.contains("plain")) Object.assign(image, { className: "plain", src: fileUrl("masks", path, ".png") });
    else media.replaceChildren(element("span", { className: "note", textContent: "no thumbnail" }));
  });
  media.append(image);
  const regions = rows.regions(row), strip = element("span", { className: "stages" }), key = element("span", { className: "key" });
  for (const { index, share } of regions) {
    const part = element("i");
    part.style.cssText = `flex:${share} 0 0;background:${about.colours[index]}`;
    strip.append(part);
  }
  const covered = regions.reduce((sum, { share }) => sum + share, 0);
  if (covered < 0.999) strip.append(Object.assign(element("i", { className: "uncovered" }), { style: `flex:${1 - covered} 0 0` }));
  regions.sort((a, b) => chosen.has(b.index) - chosen.has(a.index)); // stable: chosen classes first, larger regions first
  for (const { index, share } of regions.slice(0, 4)) {
    const item = element("span", { className: "item" }, swatch(index), element("bdi", { textContent: about.classes[index] }));
    item.append(element("i", { textContent: shareText(share) }));
    key.append(item);
  }
  if (!regions.length) key.append(element("i", { textContent: "nothing found" }));
  card.append(element("span", { className: "line" }, element("span", { className: "path" }, ...pathElements(path)),
    element("span", { className: "score", textContent: rows.mean(row).toFixed(2), title: "score" })), strip, key);
  return card;
}

// Scroll until a card is visible, and focus it.
function showPlace(place) {
  const target = Math.floor(place / PAGE_CARDS);
  if (target !== page) showPage(target - page);
  const top = grid.getBoundingClientRect().top + Math.floor((place % PAGE_CARDS) / columns) * (cardHeight + GAP);
  const least = document.querySelector(".bar").offsetHeight;
  if (top < least) window.scrollBy(0, top - least);
  else if (top + cardHeight > window.innerHeight) window.scrollBy(0, top + cardHeight + GAP - window.innerHeight);
  drawCards();
  cards.get(place)?.focus({ preventScroll: true });
}

function showPage(step) {
  page += step;
  layOut();
  document.querySelector(".results").scrollIntoView();
}

// ---------------------------------------------------------------------------------------------------------- events

let typing = 0;
form.addEventListener("input", (event) => {
  if (event.target.id === "class-text") showClasses();
  else if (!event.target.closest("#class-list")) {
    clearTimeout(typing);
    typing = setTimeout(changeFilter, event.target.type === "search" || event.target.type === "number" ? 150 : 0);
  }
});
grid.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  const place = [...cards].find(([, card]) => card === event.target)?.[0];
  if (by === undefined || place === undefined) return;
  event.preventDefault();
  showPlace(Math.min(order.length - 1, Math.max(0, place + by)));
});
form.addEventListener("submit", (event) => event.preventDefault());
$("clear").addEventListener("click", () => {
  const kept = form.elements.order.value;
  form.reset();
  form.elements.order.value = kept;
  chosen.clear();
  showClasses();
  changeFilter();
});
$("page-before").addEventListener("click", () => showPage(-1));
$("page-after").addEventListener("click", () => showPage(1));
window.addEventListener("scroll", () => requestAnimationFrame(drawCards), { passive: true });
window.addEventListener("resize", () => requestAnimationFrame(drawCards));
window.addEventListener("hashchange", () => {
  readAddress();
  showClasses();
  applyFilter();
  openIfWanted();
});
new ResizeObserver(() => {
  if (grid.clientWidth === laidOutWidth) return drawCards();
  const place = page * PAGE_CARDS + firstLine() * columns, scrolled = grid.getBoundingClientRect().top < 0;
  layOut();
  if (scrolled) window.scrollBy(0, grid.getBoundingClientRect().top + Math.floor((place % PAGE_CARDS) / columns) * (cardHeight + GAP));
}).observe(grid.parentElement);

// ---------------------------------------------------------------------------------------------------------- start

function loadScript(source) {
  return new Promise((resolve, reject) => document.head.append(element("script", { src: source, onload: resolve, onerror: reject })));
}

async function load() {
  let due = 1;
  for (let chunk = 0; chunk < about.chunks; chunk++) {
    const source = `${about.folder}/rows-${String(chunk).padStart(4, "0")}.js`;
    try {
      await loadScript(source);
    } catch {
      $("problem").textContent = `${source} cannot be loaded: keep the folder ${about.folder} beside this page.`;
      $("problem").hidden = false;
      return;
    }
    // Update the page each time the number of loaded rows has doubled, so that the total cost of updates stays small.
    if (rows.count < due && chunk + 1 < about.chunks) continue;
    due = 2 * rows.count;
    showClasses();
    applyFilter({ keepPlace: true });
    if (openWanted) openIfWanted();
  }
}

document.querySelector(".filters").open = window.matchMedia("(min-width: 861px)").matches;
readAddress();
showClasses();
applyFilter();
load();
