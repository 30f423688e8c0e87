"use strict";
// The rows of the gallery, stored in columns, with filtering and sorting. Nothing here accesses the DOM.

const SHARE_UNITS = 10000, SCORE_UNITS = 1000; // integers for an area fraction of 1 and a score of 1, as in gallery.py
const MEAN_UNITS = 10000; // integer for a mean score of 1; finer than SCORE_UNITS

class Rows {
  // Typed arrays of the final size, so that a million rows take tens of megabytes and are filtered in milliseconds.
  constructor(rows, regions, classes) {
    this.count = 0; // number of rows loaded so far
    this.rejectedCount = 0;
    this.paths = [];
    this.widths = new Uint32Array(rows);
    this.heights = new Uint32Array(rows);
    this.rejected = new Uint8Array(rows);
    this.errors = new Map(); // index of a rejected row -> reason
    this.starts = new Uint32Array(rows + 1); // row i has the regions starts[i] to starts[i + 1] - 1
    this.classes = new Uint16Array(regions);
    this.shares = new Uint16Array(regions); // area fractions in SHARE_UNITS; the largest region of a row first
    this.scores = new Uint16Array(regions); // in SCORE_UNITS
    this.means = new Uint16Array(rows); // score of the image: mean over the area of its regions, in MEAN_UNITS
    this.classCounts = new Uint32Array(classes); // number of images that contain the class
    this.inOrder = true; // true if the rows were loaded in the order of their paths
  }

  add({ paths, sizes, counts, regions, errors }) {
    let at = 0, error = 0;
    for (let i = 0; i < paths.length; i++) {
      const row = this.count++;
      this.inOrder &&= row === 0 || paths[i] >= this.paths[row - 1];
      this.paths.push(paths[i]);
      this.widths[row] = sizes[2 * i];
      this.heights[row] = sizes[2 * i + 1];
      let region = this.starts[row], weight = 0, sum = 0;
      if (counts[i] < 0) {
        this.rejected[row] = 1;
        this.rejectedCount++;
        this.errors.set(row, errors[error++]);
      }
      for (let k = 0; k < counts[i]; k++, region++, at += 3) {
        this.classes[region] = regions[at];
        this.shares[region] = regions[at + 1];
        this.scores[region] = regions[at + 2];
        this.classCounts[regions[at]]++;
        weight += regions[at + 1];
        sum += regions[at + 1] * regions[at + 2];
      }
      this.starts[row + 1] = region;
      // An image without any region gets the score 0, so that it is among the first when the lowest scores come first.
      this.means[row] = weight ? Math.round(sum / weight / SCORE_UNITS * MEAN_UNITS) : 0;
    }
  }

  mean(row) { return this.means[row] / MEAN_UNITS; }

  regions(row) {
    const found = [];
    for (let i = this.starts[row]; i < this.starts[row + 1]; i++) {
      found.push({ index: this.classes[i], share: this.shares[i] / SHARE_UNITS, score: this.scores[i] / SCORE_UNITS });
    }
    return found;
  }

  // Return the rows that pass the filter, in the requested order. If classes are chosen, the bounds apply to each of their
  // regions; otherwise to the area fraction of the largest class and to the score of the image.
  select({ text, status, classes, all, share, score, order }) {
    const path = text && new RegExp(text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"), "iu");
    const chosen = new Uint8Array(this.classCounts.length);
    for (const index of classes) chosen[index] = 1;
    const wanted = all ? classes.size : 1;
    const bounded = share.bounded || score.bounded;
    const keys = new Float64Array(this.count);
    let found = 0;
    for (let row = 0; row < this.count; row++) {
      if (status && (status === "rejected") !== (this.rejected[row] === 1)) continue;
      let area = this.starts[row] < this.starts[row + 1] ? this.shares[this.starts[row]] : 0;
      if (classes.size) {
        let hits = 0;
        area = 0;
        for (let i = this.starts[row]; i < this.starts[row + 1]; i++) {
          if (!chosen[this.classes[i]]) continue;
          if (!share.holds(this.shares[i] / SHARE_UNITS) || !score.holds(this.scores[i] / SCORE_UNITS)) continue;
          hits++;
          area += this.shares[i];
        }
        if (hits < wanted) continue;
      } else if (bounded) {
        if (this.rejected[row] || !share.holds(area / SHARE_UNITS) || !score.holds(this.mean(row))) continue;
      }
      if (path && !path.test(this.paths[row])) continue;
      keys[found++] = this.rank(row, order, area) * 2 ** 32 + row;
    }
    return this.ordered(keys.subarray(0, found), order);
  }

  // Return the sort key of a row, an integer below 2 ** 21; rejected images get the highest.
  rank(row, order, area) {
    if (order === "name") return 0;
    if (this.rejected[row]) return 2 ** 20;
    if (order === "area") return 2 ** 20 - 1 - Math.min(area, SHARE_UNITS);
    return order === "best" ? MEAN_UNITS - this.means[row] : this.means[row];
  }

  ordered(keys, order) {
    keys.sort(); // typed arrays sort numerically without a comparison function, which would be ten times as slow
    const rows = new Uint32Array(keys.length);
    for (let i = 0; i < keys.length; i++) rows[i] = keys[i] % 2 ** 32;
    if (order === "name" && !this.inOrder) {
      rows.sort((a, b) => (this.paths[a] < this.paths[b] ? -1 : this.paths[a] > this.paths[b] ? 1 : a - b));
    }
    return rows;
  }

  // Return the histogram of scores in `bins` bins: scores of the regions of `classes`, or of the images if `classes` is empty.
  histogram(bins, classes) {
    const counts = new Uint32Array(bins);
    const put = (value) => counts[Math.min(bins - 1, Math.floor(value * bins))]++;
    for (let row = 0; row < this.count; row++) {
      if (this.rejected[row]) continue;
      if (!classes.size) put(this.mean(row));
      else {
        for (let i = this.starts[row]; i < this.starts[row + 1]; i++) {
          if (classes.has(this.classes[i])) put(this.scores[i] / SCORE_UNITS);
        }
      }
    }
    return counts;
  }
}

// Lower and upper bound from two text fields; an empty field is no bound. `scale` is the number in the field that means 1.
class Bounds {
  constructor(min, max, scale) {
    this.min = min === "" ? -Infinity : Number(min) / scale;
    this.max = max === "" ? Infinity : Number(max) / scale;
    this.bounded = min !== "" || max !== "";
  }

  holds(value) { return value >= this.min && value <= this.max; }
}
