// One trial in full with its log as it grows, and several side by side with what differs marked.

import { bytes, clock, dollars, duration, el, fill, number, price, quality, question, state, time, OVER } from './show.js';
import { follow, get, post } from './server.js';

/** Shows a trial in a panel; `closed` is called when it is closed. */
export class TrialPanel {
  constructor({ sweep, n, row, mayChange, closed }) {
    Object.assign(this, { sweep, n, mayChange });
    this.abort = new AbortController();
    this.facts = el('div', { class: 'facts' }, el('p', { class: 'quiet' }, 'Loading.'));
    this.actions = el('div', { class: 'buttons' });
    this.log = el('ol', { class: 'log', tabindex: '0', 'aria-label': 'Log' });
    this.heading = el('h2', { tabindex: '-1' }, `Trial ${n} `);
    this.element = el('aside', { class: 'card panel', 'aria-label': `Trial ${n}`, onkeydown: (event) => {
      if (event.key === 'Escape') closed();
    } },
      el('div', { class: 'bar' }, this.heading, el('button', { type: 'button', class: 'small', onclick: closed }, 'Close')),
      this.actions, this.facts, el('h3', {}, 'Log'), this.log);
    this.update(row);
    this.follow();
  }

  focus() {
    this.heading.focus();
  }

  end() {
    this.abort.abort();
  }

  /** The trial's row changed. */
  update(row) {
    if (!row || row.state === this.state && row.attempt === this.attempt && row.step === this.step) return;
    const over = OVER.includes(row.state);
    const whole = row.state !== this.state || row.attempt !== this.attempt;
    Object.assign(this, { state: row.state, attempt: row.attempt, step: row.step });
    fill(this.heading, `Trial ${this.n} `, state(row.state));
    if (this.mayChange && whole) {
      const retry = over && row.state !== 'completed';
      fill(this.actions,
        !over && el('button', { type: 'button', class: 'danger', onclick: () => this.ask('stop') }, 'Stop trial'),
        retry && el('button', { type: 'button', onclick: () => this.ask('retry') }, 'Try again'));
    }
    if (whole) this.load();
    else if (this.record) this.show({ ...this.record, step: row.step, value: row.value, cost_usd: row.cost_usd ?? this.record.cost_usd });
  }

  ask(what) {
    const stop = what === 'stop';
    question({
      title: stop ? `Stop trial ${this.n}?` : `Try trial ${this.n} again?`,
      text: stop ? 'It ends as cancelled, and keeps the adapter that it has.' : 'It goes back into the queue and goes on from its last checkpoint.',
      yes: stop ? 'Stop trial' : 'Try again',
      danger: stop,
      act: () => post(`sweeps/${this.sweep}/trials/${this.n}/${what}`),
    });
  }

  async load() {
    try {
      this.record = await get(`sweeps/${this.sweep}/trials/${this.n}`, this.abort.signal);
      this.show(this.record);
    } catch (error) {
      if (!this.abort.signal.aborted) fill(this.facts, el('p', { class: 'wrong' }, error.message));
    }
  }

  show(trial) {
    const sum = trial.summary ?? {};
    const peak = sum.pack_peak_memory_bytes ? `${bytes(sum.peak_memory_bytes)} (attributed; the pack ${bytes(sum.pack_peak_memory_bytes)})` : bytes(sum.peak_memory_bytes);
    const speed = sum.tokens_per_second && `${number(Math.round(sum.tokens_per_second))} tokens/s, ${sum.throughput}`;
    const where = (attempt) => {
      const placed = trial.placements.find((one) => one.attempt === attempt);
      return placed ? ` on ${placed.agent} · ${placed.device}` : '';
    };
    const facts = [
      ['Step', trial.total_steps ? `${number(trial.step)} of ${number(trial.total_steps)}` : number(trial.step)],
      ['Value', quality(trial.value)],
      ['Held-out loss', sum.base_eval_loss ? `${quality(trial.eval_loss)} (base ${quality(sum.base_eval_loss)})` : quality(trial.eval_loss)],
      ['Cost', dollars(trial.cost_usd)],
      ['Price', price(trial.device)],
      ['Peak memory', peak],
      ['Predicted', bytes(sum.predicted_peak_memory_bytes)],
      ['Speed', speed || '–'],
      ['Adapter', trial.adapter ? bytes(sum.adapter_bytes) : 'none'],
      ['Trains on', [trial.agent, trial.device_id, trial.device?.accelerator].filter(Boolean).join(' · ') || '–'],
      ['Attempts', trial.attempts.map(([attempt, step]) => `${attempt} from step ${step}${where(attempt)}`).join(', ') || '–'],
      ['Started', time(trial.started_at)],
      ['Took', trial.finished_at && trial.started_at ? duration(trial.finished_at - trial.started_at) : '–'],
    ];
    const config = Object.entries(trial.config).filter(([, value]) => value !== null);
    const sample = (title, text) => text && [el('h4', {}, title), el('pre', {}, text)];
    const open = (id) => this.facts.querySelector(`#${id}`)?.open;
    const [configOpen, samplesOpen] = [open('configuration'), open('samples') ?? true];
    fill(this.facts,
      trial.simulated && el('p', { class: 'note' }, 'Simulated: a device that only behaves as if it trained made these numbers.'),
      trial.failure && el('p', { class: 'wrong' }, `${trial.failure.class}: ${trial.failure.message}`),
      el('dl', {}, facts.map(([name, value]) => el('div', {}, el('dt', {}, name), el('dd', {}, value)))),
      el('h3', {}, 'Chosen by the search'),
      el('dl', {}, Object.entries(trial.parameters).map(([name, value]) => el('div', {}, el('dt', {}, name), el('dd', {}, number(value))))),
      sum.sample_prompt && el('details', { open: samplesOpen, id: 'samples' }, el('summary', {}, 'Samples'),
        sample('Prompt', sum.sample_prompt), sample('Base', sum.sample_before), (sum.samples ?? []).map(({ step, text }) => sample(`After step ${number(step)}`, text)),
        sample('With the adapter', sum.sample_after)),
      el('details', { open: configOpen, id: 'configuration' }, el('summary', {}, 'Every parameter in force'),
        el('dl', {}, config.map(([name, value]) => el('div', {}, el('dt', {}, name), el('dd', {}, typeof value === 'object' && !Array.isArray(value) ? JSON.stringify(value) : number(value)))))));
  }

  follow() {
    follow(`sweeps/${this.sweep}/trials/${this.n}/log`, {
      // A stream that was opened again begins at the beginning.
      link: (there) => there && this.log.replaceChildren(),
      refused: (error) => fill(this.log, el('li', { class: 'wrong' }, error.message)),
      entry: (entry) => {
        const atEnd = this.log.scrollTop + this.log.clientHeight >= this.log.scrollHeight - 8;
        this.log.append(el('li', {}, el('time', {}, clock(entry.time)), ' ', el('b', {}, entry.event.replaceAll('_', ' ')), ` at step ${entry.step} `, el('span', {}, entry.message)));
        if (atEnd) this.log.scrollTop = this.log.scrollHeight;
      },
    }, this.abort.signal);
  }
}

/** Chosen trials side by side; what differs between them is marked. */
export class Comparison {
  constructor({ sweep, remove, clear }) {
    Object.assign(this, { sweep, remove, records: new Map() });
    this.only = el('input', { type: 'checkbox', id: 'only', onchange: () => this.show() });
    this.table = el('table', { class: 'compare' });
    this.element = el('section', { class: 'card', 'aria-label': 'Comparison', hidden: true },
      el('div', { class: 'bar' }, el('h2', {}, 'Comparison'), this.only, el('label', { for: 'only' }, 'only what differs'),
        el('button', { type: 'button', class: 'small', onclick: clear }, 'Choose none')),
      el('div', { class: 'scrolls', tabindex: '0', role: 'region', 'aria-label': 'Compared trials' }, this.table));
  }

  update(chosen, trials) {
    this.trials = trials;
    this.numbers = [...chosen].sort((a, b) => a - b);
    this.element.hidden = this.numbers.length < 2;
    if (this.element.hidden) return;
    for (const n of this.numbers) {
      const standing = `${trials.get(n)?.attempt} ${trials.get(n)?.state}`;
      if (this.records.get(n)?.standing === standing) continue;
      const entry = { standing, record: this.records.get(n)?.record };
      this.records.set(n, entry);
      get(`sweeps/${this.sweep}/trials/${n}`).then((record) => { entry.record = record; this.show(); }, () => {});
    }
    this.show();
  }

  show() {
    if (this.element.hidden) return;
    const focused = document.activeElement?.getAttribute('aria-label');
    const shown = this.numbers.map((n) => ({ n, row: this.trials.get(n), record: this.records.get(n)?.record })).filter(({ row, record }) => row && record);
    const keys = [...new Set(shown.flatMap(({ record }) => Object.keys(record.config)))];
    const outcome = [
      ['state', ({ row }) => row.state],
      ['value', ({ row }) => quality(row.value)],
      ['step', ({ row }) => number(row.step)],
      ['cost', ({ row }) => dollars(row.cost_usd)],
      ['peak memory', ({ row }) => bytes(row.peak_memory_bytes)],
      ['tokens/s', ({ row }) => number(row.tokens_per_second && Math.round(row.tokens_per_second))],
    ].map(([name, of]) => ({ name, values: shown.map(of), outcome: true }));
    const parameters = keys.map((name) => ({ name, values: shown.map(({ record }) => {
      const value = record.config[name];
      return value !== null && typeof value === 'object' && !Array.isArray(value) ? JSON.stringify(value) : number(value);
    }) }));
    const differs = ({ values }) => new Set(values).size > 1;
    parameters.sort((a, b) => differs(b) - differs(a));
    const lines = [...outcome, ...parameters.filter((line) => !this.only.checked || differs(line))];
    fill(this.table,
      el('caption', { class: 'unseen' }, 'Compared trials'),
      el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, 'Parameter'), shown.map(({ n }) => el('th', { scope: 'col' }, `Trial ${n} `,
        el('button', { type: 'button', class: 'small', 'aria-label': `leave out trial ${n}`, onclick: () => this.remove(n) }, '×'))))),
      el('tbody', {}, lines.map((line) => {
        const marked = differs(line) && !line.outcome;
        return el('tr', { class: marked ? 'differs' : null },
          el('th', { scope: 'row' }, line.name, marked && el('span', { class: 'unseen' }, ' (differs)')),
          line.values.map((value) => el('td', { class: 'number' }, value)));
      })));
    if (focused && document.activeElement === document.body) this.table.querySelector(`[aria-label="${focused}"]`)?.focus();
  }
}
