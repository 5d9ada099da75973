// How much each parameter matters for being among the best: PED-ANOVA (Watanabe, Bansal and Hutter, 2023). For each
// parameter it compares how the best tenth of the trials lies over its values with how all trials lie; both are smoothed
// by Scott's rule, and one more trial that could lie anywhere keeps every value possible.

const CELLS = 50;
const BEST = 0.1;
const TINY = 1e-12;
/** Numbers of at most so many values are choices, as `[4, 8, 16]` in a sweep file is. */
const CHOICES = 10;

/** Each parameter's share of the whole, the largest first: `[name, share]`. `trials` are `{ parameters, value }`. */
export function importance(trials, smallerIsBetter) {
  const known = trials.filter(({ value }) => Number.isFinite(value));
  if (known.length < 10) return [];
  const sorted = [...known].sort((a, b) => (smallerIsBetter ? a.value - b.value : b.value - a.value));
  const best = sorted.slice(0, Math.max(2, Math.ceil(BEST * sorted.length)));
  const names = [...new Set(known.flatMap(({ parameters }) => Object.keys(parameters)))];
  const raw = names.map((name) => [name, divergence(name, best, known)]);
  const sum = raw.reduce((total, [, value]) => total + value, 0);
  return raw.map(([name, value]) => [name, sum > 0 ? value / sum : 0]).sort((a, b) => b[1] - a[1]);
}

// Pearson's divergence of the best trials' values from all trials'.
function divergence(name, best, all) {
  const values = (trials) => trials.map(({ parameters }) => parameters[name]).filter((value) => value !== undefined);
  const distinct = [...new Set(values(all).map(String))];
  if (distinct.length < 2 || values(best).length === 0) return 0;
  const cells = distinct.length > CHOICES && values(all).every((value) => typeof value === 'number') ? onALine(values(all)) : null;
  const density = (trials) => (cells
    ? smoothed(counted(values(trials).map(cells.of), cells.count))
    : shares(counted(values(trials).map((value) => distinct.indexOf(String(value))), distinct.length)));
  const [a, b] = [density(best), density(all)];
  return b.reduce((total, p, i) => total + (p + TINY) * ((a[i] + TINY) / (p + TINY) - 1) ** 2, 0);
}

/** The least and the largest of numbers, and whether they are spread over a logarithmic line rather than a straight one. */
export function spread(values) {
  let [low, high] = [Infinity, -Infinity];
  values.forEach((value) => { low = Math.min(low, value); high = Math.max(high, value); });
  if (!(low > 0 && high / low >= 10)) return { low, high, log: false };
  const median = [...values].sort((a, b) => a - b)[values.length >> 1];
  const aside = (part) => Math.abs(part - 0.5);
  const log = aside(Math.log(median / low) / Math.log(high / low)) < aside((median - low) / (high - low));
  return { low, high, log };
}

// Where numbers lie on a line.
function onALine(values) {
  const { low, high, log } = spread(values);
  const at = (value) => (log ? Math.log(value) : value);
  const whole = !log && values.every(Number.isInteger);
  const count = whole ? Math.min(CELLS, high - low + 1) : CELLS;
  return { count, of: (value) => Math.round(((at(value) - at(low)) / (at(high) - at(low))) * (count - 1)) };
}

function counted(places, count) {
  const counts = new Array(count).fill(0);
  places.forEach((cell) => { counts[cell] += 1; });
  return counts;
}

// Of choices: a trial counts for its own, and a little for the others.
function shares(counts) {
  const all = counts.reduce((sum, n) => sum + n, 0);
  const little = 1 / (counts.filter((n) => n > 0).length + 1);
  const whole = 1 + counts.length * little;
  return counts.map((n) => ((n + all * little) / whole + 1 / counts.length) / (all + 1));
}

// Of numbers: a bell over each cell, as wide as Scott's rule has it, and one over all of them.
function smoothed(counts) {
  const all = counts.reduce((sum, n) => sum + n, 0);
  const mean = counts.reduce((sum, n, cell) => sum + n * cell, 0) / all;
  const deviation = Math.sqrt(counts.reduce((sum, n, cell) => sum + n * (cell - mean) ** 2, 0) / Math.max(all - 1, 1));
  const width = Math.max(1.059 * Math.min((quantile(counts, 0.75, all) - quantile(counts, 0.25, all)) / 1.34, deviation) * all ** -0.2, 0.5 / 1.64);
  const density = bell((counts.length - 1) / 2, counts.length, counts.length);
  counts.forEach((n, cell) => {
    if (n > 0) bell(cell, width, counts.length).forEach((p, i) => { density[i] += n * p; });
  });
  return density.map((p) => p / (all + 1));
}

function quantile(counts, part, all) {
  let sum = 0;
  return Math.max(counts.findIndex((n) => (sum += n) > part * all), 0);
}

// A normal distribution's probability of each cell, cut off at both ends of the line.
function bell(mean, width, count) {
  const below = (edge) => normal((edge - mean) / width);
  const [low, high] = [below(-0.5), below(count - 0.5)];
  return Array.from({ length: count }, (_, i) => (below(i + 0.5) - below(i - 0.5)) / (high - low));
}

// The standard normal distribution function, to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
function normal(x) {
  const z = Math.abs(x) / Math.SQRT2;
  const t = 1 / (1 + 0.3275911 * z);
  const tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))) * Math.exp(-z * z);
  return x < 0 ? tail / 2 : 1 - tail / 2;
}
