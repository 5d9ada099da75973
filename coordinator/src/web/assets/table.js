// The table of trials: sorted, filtered, and only as many rows in the document as can be seen, so that ten thousand trials
// are as quick as ten.

import { bytes, dollars, duration, el, fill, number, quality, state, throttled, trained, STATES } from './show.js';

const ROW = 34;
const SPARE = 12;

const OPERATORS = {
  '<=': (a, b) => a <= b,
  '>=': (a, b) => a >= b,
  '!=': (a, b) => a !== b,
  '=': (a, b) => a === b,
  '<': (a, b) => a < b,
  '>': (a, b) => a > b,
};

/** The columns of a sweep's trials. `of` is what is compared, `show` what is seen. */
export function columns(sweep, parameters) {
  const text = (value) => (Array.isArray(value) ? value.join(', ') : value);
  return [
    { key: 'n', title: '#', of: (t) => t.n, numeric: true },
    { key: 'state', title: 'State', of: (t) => t.state, show: (t) => state(t.state, t.simulated ? `${t.state} (simulated)` : t.state) },
    { key: 'step', title: 'Step', of: (t) => t.step, show: (t) => steps(t), numeric: true },
    { key: 'value', title: sweep?.metric ?? 'value', of: (t) => t.value, show: (t) => quality(t.value), numeric: true },
    ...parameters.map((name) => ({
      key: name, title: name, of: (t) => text(t.parameters[name]), show: (t) => number(t.parameters[name]), numeric: true,
    })),
    { key: 'cost', title: 'Cost', of: (t) => t.cost_usd, show: (t) => dollars(t.cost_usd), numeric: true },
    { key: 'memory', title: 'Peak memory', of: (t) => t.peak_memory_bytes, show: (t) => bytes(t.peak_memory_bytes), numeric: true },
    { key: 'speed', title: 'Tokens/s', of: (t) => t.tokens_per_second, show: (t) => number(t.tokens_per_second && Math.round(t.tokens_per_second)), numeric: true },
    { key: 'time', title: 'Time', of: trained, show: (t) => duration(trained(t)), numeric: true },
    { key: 'agent', title: 'Agent', of: (t) => [t.agent, t.device].filter(Boolean).join(' · ') || undefined },
  ];
}

function steps(trial) {
  return trial.total_steps ? `${number(trial.step)} / ${number(trial.total_steps)}` : number(trial.step);
}

/** What a filter's text lets through: words, and comparisons such as `lora_rank=8` and `value<2.5`. */
export function filterOf(text, all) {
  const tests = text.trim().split(/\s+/).filter(Boolean).map((word) => {
    const parts = /^([\w/.#]+?)(<=|>=|!=|=|<|>)(.+)$/.exec(word);
    const column = parts && all.find(({ key, title }) => key === parts[1] || title === parts[1]);
    if (column) {
      const wanted = Number.isNaN(Number(parts[3])) ? parts[3] : Number(parts[3]);
      return (trial) => {
        const value = column.of(trial);
        return value !== undefined && value !== null && OPERATORS[parts[2]](typeof wanted === 'string' ? String(value) : value, wanted);
      };
    }
    const part = word.toLowerCase();
    return (trial) => all.some((one) => String(one.of(trial) ?? '').toLowerCase().includes(part)) || trial.failure?.toLowerCase().includes(part);
  });
  return (trial) => tests.every((test) => test(trial));
}

export class Table {
  /** `chosen` is the set of numbers that are compared; `open` shows a trial, `changed` is called when others are chosen. */
  constructor({ trials, chosen, open, changed }) {
    Object.assign(this, { trials, chosen, open, changed, rows: [], columns: [], parameters: '' });
    this.sort = { key: 'value', down: false, given: false };
    this.search = el('input', { type: 'search', id: 'filter', placeholder: 'lora_rank=8 value<2.5 running', autocomplete: 'off', spellcheck: 'false',
      oninput: throttled(() => this.refresh()) });
    this.stateChoice = el('select', { id: 'state', onchange: () => this.refresh() },
      el('option', { value: '' }, 'every state'), STATES.map((name) => el('option', { value: name }, name)));
    this.count = el('p', { class: 'quiet count', role: 'status' });
    this.head = el('tr', { 'aria-rowindex': '1' });
    this.body = el('tbody');
    this.table = el('table', { class: 'trials' }, el('caption', { class: 'unseen' }, 'Trials'), el('thead', {}, this.head), this.body);
    this.scroller = el('div', { class: 'scrolls table', tabindex: '0', role: 'region', 'aria-label': 'Rows of trials' }, this.table);
    this.draw = throttled(() => this.paint());
    this.scroller.addEventListener('scroll', this.draw, { passive: true });
    this.resized = new ResizeObserver(this.draw);
    this.resized.observe(this.scroller);
    this.refresh = throttled(() => this.arrange());
    this.refreshSoon = throttled(() => this.arrange(), 500);
    this.element = el('section', { class: 'card', 'aria-label': 'Trials' },
      el('div', { class: 'bar' },
        el('label', { for: 'filter' }, 'Filter'), this.search,
        el('label', { for: 'state' }, 'State'), this.stateChoice,
        this.count),
      this.scroller);
  }

  end() {
    this.resized.disconnect();
  }

  /** Another sweep's document, or parameters that were not seen before. */
  describe(sweep, parameters) {
    const key = `${sweep?.metric} ${sweep?.goal} ${parameters}`;
    if (key === this.parameters) return;
    this.parameters = key;
    this.columns = columns(sweep, parameters);
    if (!this.sort.given) this.sort = { key: 'value', down: sweep?.goal === 'maximize', given: false };
    this.headings();
  }

  headings() {
    const heading = ({ key, title, numeric }) => {
      const here = this.sort.key === key;
      const order = here ? (this.sort.down ? 'descending' : 'ascending') : 'none';
      return el('th', { scope: 'col', class: numeric && 'number', 'aria-sort': order },
        el('button', { type: 'button', onclick: () => this.sortBy(key) }, title, el('span', { 'aria-hidden': 'true', class: 'arrow' }, here ? (this.sort.down ? '▼' : '▲') : '')));
    };
    fill(this.head, el('th', { scope: 'col' }, el('span', { class: 'unseen' }, 'Compare')), this.columns.map(heading));
  }

  sortBy(key) {
    const down = this.sort.key === key && !this.sort.down;
    this.sort = { key, down, given: true };
    this.headings();
    this.head.querySelector(`th:nth-child(${this.columns.findIndex((column) => column.key === key) + 2}) button`)?.focus();
    this.arrange();
  }

  arrange() {
    const passes = filterOf(this.search.value, this.columns);
    const only = this.stateChoice.value;
    const rows = [];
    for (const trial of this.trials.values()) {
      if ((!only || trial.state === only) && passes(trial)) rows.push(trial);
    }
    const { of } = this.columns.find(({ key }) => key === this.sort.key) ?? this.columns[0] ?? { of: (t) => t.n };
    const sign = this.sort.down ? -1 : 1;
    rows.sort((a, b) => order(of(a), of(b), sign) || a.n - b.n);
    this.rows = rows;
    this.tell();
    this.paint();
  }

  tell() {
    const [shown, all] = [this.rows.length, this.trials.size].map((n) => n.toLocaleString('en'));
    const chosen = this.chosen.size > 1 ? `; ${this.chosen.size} are compared below` : '';
    const text = `${shown === all ? all : `${shown} of ${all}`} trials${chosen}`;
    if (this.count.textContent !== text) this.count.textContent = text;
  }

  paint() {
    const top = Math.max(0, Math.floor(this.scroller.scrollTop / ROW) - SPARE);
    const seen = Math.ceil(this.scroller.clientHeight / ROW) + 2 * SPARE;
    const end = Math.min(this.rows.length, top + seen);
    const focused = this.body.contains(document.activeElement) && document.activeElement.dataset.of;
    const space = (rows) => {
      if (rows <= 0) return null;
      const cell = el('td', { class: 'space', colSpan: this.columns.length + 1 });
      cell.style.height = `${rows * ROW}px`;
      return el('tr', { 'aria-hidden': 'true' }, cell);
    };
    this.table.setAttribute('aria-rowcount', this.rows.length + 1);
    fill(this.body, space(top), this.rows.slice(top, end).map((trial, i) => this.row(trial, top + i)), space(this.rows.length - end));
    if (focused) this.body.querySelector(`[data-of="${focused}"]`)?.focus({ preventScroll: true });
  }

  row(trial, at) {
    const chosen = this.chosen.has(trial.n);
    const box = el('input', { type: 'checkbox', checked: chosen, 'data-of': `box-${trial.n}`, 'aria-label': `compare trial ${trial.n}`, onchange: () => {
      if (box.checked) this.chosen.add(trial.n);
      else this.chosen.delete(trial.n);
      this.changed();
    } });
    const again = trial.replicate_of ? ` (${trial.replicate_of} again)` : '';
    const cell = (column) => {
      const shown = column.show ? column.show(trial) : number(column.of(trial));
      return column.key === 'n'
        ? el('td', { class: 'number' }, el('button', { type: 'button', class: 'open', 'data-of': `open-${trial.n}`, 'aria-label': `trial ${trial.n}${again}`, onclick: () => this.open(trial.n) }, `${trial.n}${again}`))
        : el('td', { class: column.numeric && 'number', title: column.key === 'state' ? trial.failure : null }, shown);
    };
    return el('tr', { class: chosen ? 'chosen' : null, 'aria-rowindex': String(at + 2) }, el('td', { class: 'box' }, box), this.columns.map(cell));
  }
}

// What is not there comes last, whichever way it is sorted.
function order(a, b, sign) {
  const [noA, noB] = [a === undefined || a === null, b === undefined || b === null];
  if (noA || noB) return noA - noB;
  if (typeof a === 'number' && typeof b === 'number') return sign * (a - b);
  return sign * String(a).localeCompare(String(b), 'en', { numeric: true });
}
