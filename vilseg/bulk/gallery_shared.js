// Metadata of the gallery, and helper functions of the other scripts.

const $ = (id) => document.getElementById(id);
const about = JSON.parse(document.getElementById("about").textContent);
const rows = new Rows(about.rows, about.regions, about.classes.length);
const addRows = (chunk) => rows.add(chunk); // called by the data files

const indexed = about.classes.length <= 254; // false for more classes: their label maps are 16-bit grey PNGs without a palette

const number = (value) => value.toLocaleString("en");
const pictures = (count) => `${number(count)} picture${count === 1 ? "" : "s"}`;
const shareText = (share) => (share < 0.005 ? "<1 %" : `${Math.round(share * 100)} %`);
const fileUrl = (folder, path, suffix) => `${folder}/${path.split("/").map(encodeURIComponent).join("/")}${suffix}`;
// Replace control characters, line breaks included, by Unicode's symbols for them.
const visible = (text) => text.replace(/[\x00-\x1f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)));

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function swatch(index) {
  const made = element("b");
  made.style.background = about.colours[index];
  return made;
}

function pathElements(path) {
  const cut = path.lastIndexOf("/") + 1;
  return [
    element("bdi", { className: "folder", textContent: visible(path.slice(0, cut)) }),
    element("bdi", { className: "name", textContent: visible(path.slice(cut)) }),
  ];
}
