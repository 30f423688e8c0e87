// The large view of one image: the image with its overlaid regions, and a table of its classes.

const large = $("large");
let openRow = -1, openWanted = ""; // index of the row that is shown, or -1; path to show as soon as its row is loaded, or ""

function openLarge(row) {
  openRow = row;
  openWanted = "";
  const path = rows.paths[row], rejected = rows.rejected[row] === 1;
  $("large-path").replaceChildren(...pathElements(path));
  const size = rows.widths[row] ? `${number(rows.widths[row])} × ${number(rows.heights[row])} px` : "";
  $("large-about").textContent = [size, rejected ? "rejected" : `score ${rows.mean(row).toFixed(3)}`].filter(Boolean).join(" · ");
  $("large-error").textContent = rejected ? rows.errors.get(row) : "";
  document.querySelector(".viewer").hidden = rejected;
  if (!rejected) showPicture(row, path);
  showLegend(row);
  showPosition();
  if (!large.open) large.showModal();
  large.scrollTop = 0;
  writeAddress();
}

function showPicture(row, path) {
  $("stage").className = indexed ? "waiting" : "";
  $("stage").style.setProperty("--ratio", rows.widths[row] / rows.heights[row]);
  // Small images are enlarged without smoothing, which would look blurred.
  $("stage").classList.toggle("crisp", Math.max(rows.widths[row], rows.heights[row]) <= 128);
  $("photo").src = $("tinted").src = fileUrl("thumbs", path, ".webp");
  for (const layer of ["mask", "drain"]) $(layer).removeAttribute("src");
  if (indexed) $("mask").src = $("drain").src = fileUrl("masks", path, ".png");
  spotlight(-1);
}

function showLegend(row) {
  const lines = rows.regions(row).map(({ index, share, score }) => {
    const name = element("button", { type: "button" }, swatch(index), element("bdi", { textContent: about.classes[index] }));
    const meter = element("span", { className: "meter" }, element("i"));
    meter.firstChild.style.cssText = `width:${score * 100}%`;
    const cell = (text) => element("td", { className: "number", textContent: text });
    const line = element("tr", {}, element("td", {}, name), cell(shareText(share)), element("td", {}, meter), cell(score.toFixed(2)));
    line.addEventListener("pointerenter", () => spotlight(index));
    line.addEventListener("pointerleave", () => spotlight(-1));
    name.addEventListener("focus", () => spotlight(index));
    name.addEventListener("blur", () => spotlight(-1));
    return line;
  });
  const head = ["class", "share", "score", ""].map((text, i) => element("th", { textContent: text, className: i === 1 ? "number" : "" }));
  $("legend").replaceChildren(...(lines.length ? [element("tr", {}, ...head), ...lines] : []));
}

// Show the mask of one class alone, or of all classes (-1). Scripts may not read pixels of local files, but SVG filters may:
// each channel is mapped by a table that is 1 at the value of the class's colour, and a pixel is shown if all three are 1.
function spotlight(index) {
  if (index >= 0) {
    const colour = about.colours[index];
    ["R", "G", "B"].forEach((channel, i) => {
      const table = new Array(256).fill(0);
      table[parseInt(colour.slice(1 + 2 * i, 3 + 2 * i), 16)] = 1;
      document.querySelector(`#one feFunc${channel}`).setAttribute("tableValues", table.join(" "));
    });
  }
  $("stage").style.setProperty("--shown", `url(#${index < 0 ? "some" : "one"})`);
}

function showPosition() {
  const place = order.indexOf(openRow);
  $("position").textContent = place < 0 ? "not in the filter" : `${number(place + 1)} of ${number(order.length)}`;
  $("before").disabled = place <= 0;
  $("after").disabled = place + 1 >= order.length;
}

function step(by) {
  const place = order.indexOf(openRow) + by;
  if (place >= 0 && place < order.length) openLarge(order[place]);
}

function openIfWanted() {
  const row = openWanted ? rows.paths.indexOf(openWanted) : -1;
  if (row >= 0) openLarge(row);
  else if (large.open && !openWanted) large.close();
}

function closeLarge() {
  const place = order.indexOf(openRow);
  openRow = -1;
  writeAddress();
  if (place >= 0) showPlace(place);
}

$("before").addEventListener("click", () => step(-1));
$("after").addEventListener("click", () => step(1));
$("close").addEventListener("click", () => large.close());
large.addEventListener("close", closeLarge);
large.addEventListener("click", (event) => event.target === large && large.close());
large.addEventListener("keydown", (event) => {
  if (event.target.type === "range" || (event.key !== "ArrowLeft" && event.key !== "ArrowRight")) return;
  event.preventDefault();
  step(event.key === "ArrowLeft" ? -1 : 1);
});
$("mask").addEventListener("load", () => ($("stage").classList.add("masked"), $("stage").classList.remove("waiting")));
$("mask").addEventListener("error", () => $("stage").classList.remove("waiting"));
$("fade").addEventListener("input", (event) => $("stage").style.setProperty("--opacity", event.target.value / 100));
for (const image of [$("photo"), $("tinted")]) {
  image.addEventListener("load", () => image.classList.remove("gone"));
  image.addEventListener("error", () => image.classList.add("gone"));
}
