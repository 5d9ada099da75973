// Figures: curves and trade-offs are uPlot's; parallel coordinates and importance are drawn here.

import { bytes, color, dollars, duration, el, fill, nth, number, quality, simulated, throttled, trained } from './show.js';
import { get } from './server.js';

const HEIGHT = 300;
/** Curves at a time: more nobody tells apart. */
const CURVES = 16;

function axis(label, more = {}) {
  return { label, stroke: color('ink-2'), grid: { stroke: color('line'), width: 1 }, ticks: { stroke: color('line'), width: 1 }, labelSize: 22, font: '12px system-ui', labelFont: '12px system-ui', ...more };
}

/** Keeps a figure as wide as its place. */
export function fitted(place, resize) {
  const observer = new ResizeObserver(throttled(() => place.clientWidth > 0 && resize(place.clientWidth), 50));
  observer.observe(place);
  return () => observer.disconnect();
}

/** Curves of chosen trials, which grow while they train. */
export class Curves {
  constructor({ sweep, metrics }) {
    Object.assign(this, { sweep, metrics, numbers: [], curves: new Map(), metric: null });
    this.choice = el('select', { id: 'metric', onchange: () => { this.metric = this.choice.value; this.rebuild(); } });
    this.log = el('input', { type: 'checkbox', id: 'log-scale', onchange: () => this.rebuild() });
    this.note = el('p', { class: 'quiet count' });
    this.mark = simulated();
    this.place = el('div', { class: 'figure', role: 'img', 'aria-label': 'nothing to show yet' });
    this.element = el('section', { class: 'card', 'aria-label': 'Curves' },
      el('div', { class: 'bar' }, el('h2', {}, 'Curves'), this.mark, el('label', { for: 'metric' }, 'Metric'), this.choice,
        this.log, el('label', { for: 'log-scale' }, 'logarithmic'), this.note), this.place);
    this.draw = throttled(() => this.paint(), 100);
    this.unfit = fitted(this.place, (width) => this.plot?.setSize({ width, height: HEIGHT }));
  }

  end() {
    this.ended = true;
    this.unfit();
    this.plot?.destroy();
  }

  /** Shows these trials. */
  show(numbers, note) {
    const wanted = numbers.slice(0, CURVES);
    this.note.textContent = numbers.length > CURVES ? `the first ${CURVES} of ${numbers.length} that are chosen` : note;
    if (wanted.join() === this.numbers.join()) return;
    this.numbers = wanted;
    for (const n of this.curves.keys()) if (!wanted.includes(n)) this.curves.delete(n);
    wanted.filter((n) => !this.curves.has(n)).forEach((n) => this.load(n));
    this.rebuild();
  }

  async load(n) {
    const before = this.curves.get(n);
    const curve = { step: before?.step ?? [], values: before?.values ?? {}, later: [] };
    this.curves.set(n, curve);
    const read = await get(`sweeps/${this.sweep}/trials/${n}/metrics`).catch(() => null);
    if (this.ended || this.curves.get(n) !== curve) return;
    const { later } = curve;
    Object.assign(curve, read ?? {}, { later: null });
    later.forEach((point) => this.add(curve, point));
    this.offer();
    this.draw();
  }

  /** A running trial's newest numbers. */
  point(point) {
    const curve = this.curves.get(point.n);
    if (!curve) return;
    if (curve.later) curve.later.push(point);
    else if (curve.attempt !== undefined && curve.attempt !== point.attempt) this.load(point.n);
    else this.add(curve, point);
    curve.attempt = point.attempt;
    this.draw();
  }

  add(curve, { step, values }) {
    if (step <= (curve.step.at(-1) ?? -1)) return;
    const at = curve.step.push(step) - 1;
    for (const name of new Set([...Object.keys(curve.values), ...Object.keys(values)])) {
      const column = curve.values[name] ??= new Array(at).fill(null);
      column.push(values[name] ?? null);
    }
  }

  /** A trial ended: what was told as it ran leaves steps out. */
  over(n) {
    if (this.curves.has(n)) this.load(n);
  }

  /** The metric that is shown unless another is chosen. */
  prefer(metric) {
    this.metric ??= metric;
    this.offer();
  }

  offer() {
    const names = new Set([this.metric, ...[...this.curves.values()].flatMap((curve) => Object.keys(curve.values))].filter(Boolean));
    if (this.choice.options.length === names.size) return;
    fill(this.choice, [...names].sort().map((name) => el('option', { value: name, selected: name === this.metric }, name)));
  }

  rebuild() {
    this.plot?.destroy();
    this.plot = null;
    this.draw();
  }

  paint() {
    if (this.ended || !this.metric) return;
    const some = this.numbers.filter((n) => this.curves.get(n)?.values[this.metric]?.some((value) => value !== null));
    const shown = some.join();
    this.place.setAttribute('aria-label', some.length ? `${this.metric} over steps of trials ${some.join(', ')}; the table has their last values` : `no ${this.metric} yet`);
    if (some.length === 0) {
      this.plot?.destroy();
      this.plot = null;
      fill(this.place, el('p', { class: 'quiet' }, `No ${this.metric} yet.`));
      return;
    }
    const data = uPlot.join(some.map((n) => [this.curves.get(n).step, this.curves.get(n).values[this.metric]]));
    if (this.plot && this.shown === shown) {
      this.plot.setData(data);
      return;
    }
    this.shown = shown;
    this.plot?.destroy();
    const unit = this.metrics()?.[this.metric]?.unit;
    const log = this.log.checked;
    const options = {
      width: this.place.clientWidth,
      height: HEIGHT,
      cursor: { focus: { prox: 24 } },
      focus: { alpha: 0.3 },
      scales: { x: { time: false }, y: log ? { distr: 3 } : {} },
      axes: [axis('step'), axis(unit && unit !== '1' ? `${this.metric} (${unit})` : this.metric, { size: 64 })],
      series: [{ label: 'step' }, ...some.map((n, i) => ({ label: `trial ${n}`, stroke: nth(i), width: 1.75, dash: i >= 8 ? [6, 4] : undefined, spanGaps: true, points: { show: data[0].length < 2 }, value: (_, value) => quality(value) }))],
    };
    this.place.replaceChildren();
    this.plot = new uPlot(options, data, this.place);
  }
}

const COSTS = {
  cost_usd: ['Cost in US dollars', dollars],
  peak_memory_bytes: ['Peak memory in GB', bytes, 1e-9],
  seconds: ['Time in seconds', (value) => duration(value * 1000)],
};

// What a trial took that came to its end, as the report has it: of memory nothing of one that shared its device, of time nothing
// in which it waited.
function taken(trial, key) {
  if (trial.state !== 'completed' || (key === 'peak_memory_bytes' && trial.packed)) return undefined;
  return key === 'seconds' ? trained(trial) / 1000 : trial[key];
}

/** Quality against what it takes, with the completed trials that nothing beats in both. */
export class Tradeoff {
  constructor({ open }) {
    this.open = open;
    this.trials = [];
    this.choice = el('select', { id: 'against', onchange: () => { this.given = true; this.paint(); } }, Object.entries(COSTS).map(([key, [text]]) => el('option', { value: key }, text)));
    this.place = el('div', { class: 'figure', role: 'img', 'aria-label': 'nothing to show yet' });
    this.front = el('p', { class: 'quiet' });
    this.mark = simulated();
    this.element = el('section', { class: 'card', 'aria-label': 'Trade-off' },
      el('div', { class: 'bar' }, el('h2', {}, 'Quality against what it takes'), this.mark, el('label', { for: 'against' }, 'Against'), this.choice), this.place, this.front);
    this.unfit = fitted(this.place, (width) => this.plot?.setSize({ width, height: HEIGHT + 40 }));
  }

  end() {
    this.unfit();
    this.plot?.destroy();
  }

  update(trials, sweep, chosen) {
    Object.assign(this, { trials, sweep, chosen });
    // A machine of one's own costs nothing.
    const known = Object.keys(COSTS).find((key) => trials.some((t) => taken(t, key) > 0));
    if (!this.given && known) this.choice.value = known;
    this.paint();
  }

  paint() {
    const key = this.choice.value;
    const [label, format, scale = 1] = COSTS[key];
    const smaller = this.sweep?.goal !== 'maximize';
    const takes = (t) => taken(t, key);
    const points = this.trials.filter((t) => Number.isFinite(t.value) && takes(t) > 0).map((t) => ({ t, x: takes(t) * scale, y: t.value })).sort((a, b) => a.x - b.x || (smaller ? a.y - b.y : b.y - a.y));
    this.plot?.destroy();
    this.plot = null;
    if (points.length === 0) {
      fill(this.place, el('p', { class: 'quiet' }, key === 'peak_memory_bytes' ? 'No trial that completed alone on its device has both yet.' : 'No completed trial has both yet.'));
      this.front.textContent = '';
      return;
    }
    let best = smaller ? Infinity : -Infinity;
    const front = points.map(({ y }) => {
      const better = smaller ? y < best : y > best;
      if (better) best = y;
      return better ? y : null;
    });
    const unbeaten = points.filter((_, i) => front[i] !== null);
    fill(this.front, 'Nothing is better and takes less than: ', unbeaten.slice(0, 12).map(({ t, x, y }) => [
      el('button', { type: 'button', class: 'open', onclick: () => this.open(t.n) }, `trial ${t.n}`), ` (${quality(y)}, ${format(x / scale)}) `]));
    this.place.setAttribute('aria-label', `${this.sweep?.metric} against ${label} of ${points.length} completed trials; the text below names those that nothing beats in both`);
    const dots = (size) => ({ show: true, size, space: 0 });
    const series = [
      { label },
      { label: 'completed', stroke: color('ink-3'), paths: () => null, points: { ...dots(5), fill: color('ink-3') } },
      { label: 'chosen', stroke: color('series-1'), paths: () => null, points: { ...dots(9), fill: color('series-1') } },
      { label: 'not beaten', stroke: color('series-0'), width: 1.5, paths: uPlot.paths.stepped({ align: 1 }), spanGaps: true, points: { ...dots(8), fill: color('series-0') } },
    ];
    series.slice(1).forEach((one) => { one.value = (_, value) => quality(value); });
    series[0].value = (_, value) => (value === null ? '–' : format(value / scale));
    const data = [points.map(({ x }) => x), points.map(({ y }) => y), points.map(({ t, y }) => (this.chosen.has(t.n) ? y : null)), front];
    this.place.replaceChildren();
    this.plot = new uPlot({
      width: this.place.clientWidth, height: HEIGHT + 40,
      scales: { x: { time: false } },
      axes: [axis(label), axis(this.sweep?.metric ?? 'value', { size: 64 })],
      series,
      cursor: { drag: { x: true, y: true }, bind: {} },
    }, data, this.place);
    this.plot.over.addEventListener('click', (event) => {
      const [left, top] = [event.offsetX, event.offsetY];
      const distance = ({ x, y }) => Math.hypot(this.plot.valToPos(x, 'x') - left, this.plot.valToPos(y, 'y') - top);
      const near = points.reduce((a, b) => (distance(b) < distance(a) ? b : a));
      if (distance(near) < 14) this.open(near.t.n);
    });
  }
}

/** A canvas as sharp as the screen, and its pen in pixels of the page. */
export function pen(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext('2d');
  context.scale(ratio, ratio);
  context.font = '12px system-ui';
  return context;
}

function mixed(from, to, part) {
  const [a, b] = [from, to].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  return `rgb(${a.map((c, i) => Math.round(c + (b[i] - c) * part)).join(' ')})`;
}

/** Axes at a time, that of the value aside: more cannot be read beside each other. */
const AXES = 9;

/** Every trial as a line through its parameters and its value. */
export class Parallel {
  constructor() {
    this.canvas = el('canvas', { role: 'img', 'aria-label': 'nothing to show yet' });
    this.place = el('div', { class: 'figure' }, this.canvas);
    this.mark = simulated();
    this.dropped = el('p', { class: 'quiet', hidden: true });
    this.element = el('section', { class: 'card', 'aria-label': 'Parallel coordinates' },
      el('div', { class: 'bar' }, el('h2', {}, 'Parallel coordinates'), this.mark), this.place, this.dropped,
      el('p', { class: 'quiet' }, 'A line is a trial: strong where it is good, grey where it is not. Chosen trials have the colours of their curves.'));
    this.unfit = fitted(this.place, () => this.paint());
  }

  end() {
    this.unfit();
  }

  update(trials, sweep, chosen) {
    Object.assign(this, { trials: trials.filter((t) => Number.isFinite(t.value)), sweep, chosen });
    this.paint();
  }

  paint() {
    if (!this.trials || this.place.clientWidth === 0) return;
    const all = [...new Set(this.trials.slice(0, 500).flatMap((t) => Object.keys(t.parameters)))];
    const names = all.slice(0, AXES);
    this.dropped.hidden = all.length <= AXES;
    this.dropped.textContent = `The first ${AXES} of ${all.length} parameters; not shown: ${all.slice(AXES).join(', ')}.`;
    const width = this.place.clientWidth;
    const [height, top, bottom] = [320, 34, 20];
    const context = pen(this.canvas, width, height);
    const axes = [...names.map((name) => scale(name, (t) => t.parameters[name], this.trials)), scale(this.sweep?.metric ?? 'value', (t) => t.value, this.trials)];
    this.canvas.setAttribute('aria-label', `${this.trials.length} trials over ${names.join(', ')} and ${this.sweep?.metric}; the table has the same numbers`);
    // As wide as what stands beside the outer axes.
    const beside = ({ marks }) => 12 + Math.min(width / 4, Math.max(0, ...marks.map(([text]) => context.measureText(text).width)));
    const [left, right] = [beside(axes[0]), beside(axes.at(-1))];
    const x = (i) => left + (i * (width - left - right)) / Math.max(axes.length - 1, 1);
    const y = (part) => height - bottom - part * (height - top - bottom);
    const smaller = this.sweep?.goal !== 'maximize';
    const ranked = [...this.trials].sort((a, b) => (smaller ? b.value - a.value : a.value - b.value));
    const line = (t) => {
      context.beginPath();
      axes.forEach(({ part }, i) => {
        const at = part(t);
        if (at !== null) context.lineTo(x(i), y(at));
      });
      context.stroke();
    };
    const [good, poor] = [color('series-0'), color('faint')];
    context.globalAlpha = Math.max(0.12, Math.min(0.9, 60 / this.trials.length));
    ranked.forEach((t, i) => {
      context.strokeStyle = mixed(poor, good, (i / Math.max(ranked.length - 1, 1)) ** 2);
      context.lineWidth = 1.2;
      line(t);
    });
    context.globalAlpha = 1;
    [...this.chosen].sort((a, b) => a - b).forEach((n, i) => {
      const t = this.trials.find((one) => one.n === n);
      context.strokeStyle = nth(i);
      context.lineWidth = 2.5;
      if (t) line(t);
    });
    axes.forEach(({ name, marks }, i) => {
      context.strokeStyle = color('ink-3');
      context.lineWidth = 1;
      context.beginPath();
      context.moveTo(x(i), top);
      context.lineTo(x(i), height - bottom);
      context.stroke();
      context.fillStyle = color('ink');
      context.textAlign = i === 0 ? 'left' : i === axes.length - 1 ? 'right' : 'center';
      context.fillText(name, i === 0 ? 4 : i === axes.length - 1 ? width - 4 : x(i), 16);
      context.textAlign = i === axes.length - 1 ? 'left' : 'right';
      // A rim, so that it can be read on the lines.
      context.strokeStyle = color('card');
      context.lineWidth = 4;
      context.lineJoin = 'round';
      for (const [text, part] of marks) {
        const at = [x(i) + (i === axes.length - 1 ? 6 : -6), y(part) + 4];
        context.strokeText(text, ...at);
        context.fillText(text, ...at);
      }
    });
  }
}

// The least and the largest of numbers, and whether they are spread over a logarithmic line rather than a straight one.
function spread(values) {
  let [low, high] = [Infinity, -Infinity];
  values.forEach((value) => { low = Math.min(low, value); high = Math.max(high, value); });
  if (!(low > 0 && high / low >= 10)) return { low, high, log: false };
  const median = [...values].sort((a, b) => a - b)[values.length >> 1];
  const aside = (part) => Math.abs(part - 0.5);
  const log = aside(Math.log(median / low) / Math.log(high / low)) < aside((median - low) / (high - low));
  return { low, high, log };
}

// Where values lie on an axis from 0 to 1, and what stands beside it.
function scale(name, of, trials) {
  const values = trials.map(of).filter((value) => value !== undefined && value !== null);
  if (values.length && values.every((value) => typeof value === 'number')) {
    const { low, high, log } = spread(values);
    const at = (value) => (log ? Math.log(value) : value);
    const part = (value) => (high > low ? (at(value) - at(low)) / (at(high) - at(low)) : 0.5);
    // Values that were tried alone: all of a few, else the outermost and the one in the middle of the axis.
    const tried = [...new Set(values)].sort((a, b) => a - b);
    const aside = (value) => Math.abs(part(value) - 0.5);
    // What would stand on another is left out, but for the ends.
    const near = (a, b) => a !== b && Math.abs(part(a) - part(b)) < 0.06;
    const apart = (value, i, all) => value === low || value === high || !(near(value, high) || all.slice(0, i).some((before) => near(before, value)));
    const middle = tried.reduce((a, b) => (aside(b) < aside(a) ? b : a));
    const marks = (tried.length <= 5 ? tried : [...new Set([low, middle, high])]).filter(apart);
    return { name, part: (t) => (typeof of(t) === 'number' ? part(of(t)) : null), marks: marks.map((value) => [number(value), part(value)]) };
  }
  const text = (value) => (Array.isArray(value) ? value.join(', ') : String(value));
  const distinct = [...new Set(values.map(text))].sort();
  const part = (value) => (distinct.length > 1 ? distinct.indexOf(text(value)) / (distinct.length - 1) : 0.5);
  return { name, part: (t) => (of(t) === undefined ? null : part(of(t))), marks: distinct.slice(0, 12).map((value) => [value.slice(0, 14), part(value)]) };
}

/** Which parameters decide whether a trial is among the best, as the server computes it. */
export class Importance {
  constructor() {
    this.list = el('ol', { class: 'importance' });
    this.element = el('section', { class: 'card', 'aria-label': 'Importance' },
      el('div', { class: 'bar' }, el('h2', {}, 'Importance of parameters')), this.list,
      el('p', { class: 'quiet' }, 'PED-ANOVA: how far the best tenth of the completed trials differs from all of them in each parameter, as parts of the whole.'));
  }

  /** How many trials it is computed from, and `[name, part]`, the largest first. */
  tell({ trials, parts }) {
    if (parts.length === 0) {
      fill(this.list, el('li', { class: 'quiet' }, trials < 10 ? 'Known from ten completed trials on.' : 'No two parameters that all trials drew alike tell the best of them from the others.'));
      return;
    }
    fill(this.list, parts.map(([name, part]) => el('li', {}, el('span', {}, name),
      el('meter', { min: '0', max: '1', value: String(part), 'aria-label': `importance of ${name}` }), el('span', { class: 'number' }, `${Math.round(part * 100)} %`))));
  }
}
