// The devices' timeline.

import { bytes, clock, color, duration, el, quality, simulated, state, OVER } from './show.js';
import { fitted, pen } from './charts.js';

const BAR = 11;

/** What each device did when: a bar is a trial, bars above each other are a pack, the strip below is memory. */
export class Timeline {
  constructor({ open }) {
    this.open = open;
    this.canvas = el('canvas', { role: 'img', 'aria-label': 'nothing to show yet', onmousemove: (event) => this.point(event), onclick: (event) => {
      const hit = this.at(event);
      if (hit) this.open(hit.t.n);
    } });
    this.place = el('div', { class: 'figure tall', tabindex: '0', role: 'region', 'aria-label': 'Timeline of devices' }, this.canvas);
    this.said = el('p', { class: 'quiet' }, 'Point at a bar to read it; the table has device and time of every trial.');
    this.mark = simulated();
    this.element = el('section', { class: 'card', 'aria-label': 'Timeline' }, el('div', { class: 'bar' }, el('h2', {}, 'Timeline of devices'), this.mark,
      el('span', { class: 'count legend' }, [['running', 'running'], ['queued', 'went on later'], ...OVER.map((name) => [name, name])].map(([name, text]) => state(name, text)))), this.place, this.said);
    this.unfit = fitted(this.place, () => this.paint());
  }

  end() {
    this.unfit();
  }

  update(trials) {
    this.bars = trials.flatMap(barsOf).sort((a, b) => a.from - b.from);
    this.paint();
  }

  paint() {
    if (!this.bars || this.place.clientWidth === 0) return;
    const now = Date.now();
    const end = (bar) => bar.to ?? now;
    const lanes = lanesOf(this.bars, end);
    const [from, to] = [Math.min(this.bars[0]?.from ?? now, now), this.bars.reduce((last, bar) => Math.max(last, end(bar)), 0)];
    const width = this.place.clientWidth - 2;
    const side = Math.min(190, width / 4);
    const heights = lanes.map((lane) => Math.max(lane.free.length * (BAR + 2), 26) + 24);
    const height = heights.reduce((sum, one) => sum + one, 26);
    const context = pen(this.canvas, width, height);
    const x = (at) => side + ((at - from) / Math.max(to - from, 1)) * (width - side - 8);
    this.canvas.setAttribute('aria-label', `${new Set(this.bars.map(({ t }) => t.n)).size} trials on ${lanes.length} devices from ${clock(from)} to ${clock(to)}`);
    let top = 20;
    context.fillStyle = color('ink-2');
    for (let i = 0; i <= 4; i += 1) {
      const at = from + ((to - from) * i) / 4;
      context.textAlign = i === 4 ? 'right' : i === 0 ? 'left' : 'center';
      context.fillText(clock(at), x(at), 12);
    }
    lanes.forEach((lane, i) => {
      context.strokeStyle = color('line');
      context.strokeRect(side, top, width - side - 8, heights[i] - 8);
      context.textAlign = 'left';
      context.fillStyle = color('ink');
      context.fillText(shortened(context, lane.name, side - 10), 2, top + 12);
      context.fillStyle = color('ink-2');
      context.fillText(shortened(context, `${lane.accelerator ?? ''} ${bytes(lane.memory)}`, side - 10), 2, top + 27);
      for (const bar of lane.bars) {
        Object.assign(bar, { x: x(bar.from), y: top + 2 + bar.row * (BAR + 2), w: Math.max(x(end(bar)) - x(bar.from), 2) });
        context.fillStyle = color(`state-${bar.state}`);
        context.fillRect(bar.x, bar.y, bar.w, BAR);
      }
      this.memory(context, lane, { x, end, base: top + heights[i] - 8, most: 14 });
      top += heights[i];
    });
  }

  // The sum of the peaks of those that train at a time, as a part of the device's memory.
  memory(context, lane, { x, end, base, most }) {
    if (!lane.memory) return;
    const steps = lane.bars.flatMap((bar) => [[bar.from, bar.t.peak_memory_bytes ?? 0], [end(bar), -(bar.t.peak_memory_bytes ?? 0)]]).sort((a, b) => a[0] - b[0]);
    context.fillStyle = color('memory');
    let [sum, before] = [0, null];
    for (const [at, change] of steps) {
      if (before !== null && sum > 0) {
        const high = Math.max(1, Math.min(1, sum / lane.memory) * most);
        context.fillRect(x(before), base - high, Math.max(x(at) - x(before), 1), high);
      }
      sum += change;
      before = at;
    }
  }

  at({ offsetX, offsetY }) {
    return this.bars?.findLast(({ x, y, w }) => offsetX >= x && offsetX <= x + w && offsetY >= y && offsetY <= y + BAR);
  }

  point(event) {
    const hit = this.at(event);
    this.canvas.style.cursor = hit ? 'pointer' : '';
    if (!hit) return;
    const { t, from, to } = hit;
    const what = hit.state === 'queued' ? 'went on later' : hit.state;
    this.said.textContent = `Trial ${t.n} on ${hit.lane}, ${what}: ${clock(from)} to ${to ? clock(to) : 'now'}, ${duration((to ?? Date.now()) - from)}, peak ${bytes(t.peak_memory_bytes)}, value ${quality(t.value)}`;
  }
}

// When and where a trial trained. Only its last stretch has come to the trial's own end.
function barsOf(t) {
  const whole = t.started_at && t.agent && { agent: t.agent, device: t.device, from: t.started_at, to: t.finished_at };
  const stretches = t.stretches ?? [whole].filter(Boolean);
  return stretches.map((stretch, i) => {
    const last = i === stretches.length - 1;
    const gone = stretch.to && !(last && OVER.includes(t.state));
    return { t, last, from: stretch.from, to: stretch.to, lane: [stretch.agent, stretch.device].filter(Boolean).join(' · '), state: gone ? 'queued' : t.state };
  });
}

// The devices by name, each with its bars in rows, so that none covers another.
function lanesOf(bars, end) {
  const lanes = new Map();
  for (const bar of bars) {
    const lane = lanes.get(bar.lane) ?? { name: bar.lane, free: [], bars: [] };
    lanes.set(bar.lane, lane);
    if (bar.last) {
      lane.accelerator ??= bar.t.accelerator;
      lane.memory ??= bar.t.device_memory_bytes;
    }
    const free = lane.free.findIndex((until) => until <= bar.from);
    bar.row = free < 0 ? lane.free.length : free;
    lane.free[bar.row] = end(bar);
    lane.bars.push(bar);
  }
  return [...lanes.values()].sort((a, b) => a.name.localeCompare(b.name, 'en', { numeric: true }));
}

function shortened(context, text, room) {
  if (context.measureText(text).width <= room) return text;
  let end = text.length;
  while (end > 1 && context.measureText(`${text.slice(0, end)}…`).width > room) end -= 1;
  return `${text.slice(0, end)}…`;
}
