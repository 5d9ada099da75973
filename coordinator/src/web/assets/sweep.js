// One sweep: what stands above, its trials, figures and document, as they change.

import { announce, dollars, el, fill, namespace, number, progress, quality, question, state, tabs, throttled, time, waits, OVER } from './show.js';
import { follow, get, post } from './server.js';
import { Table } from './table.js';
import { Comparison, TrialPanel } from './trial.js';
import { Curves, Importance, Parallel, Tradeoff } from './charts.js';
import { Timeline } from './timeline.js';

/** Curves that are shown while none is chosen. */
const BEST = 5;
const NEWEST = 3;

// What a change of a trial does not say is as it was.
const KEPT = ['value', 'peak_memory_bytes', 'tokens_per_second'];

// Rows of what is sent as columns. Times come in tenths of a second from when the sweep was submitted, agents and their devices as numbers
// of lanes.
function rowsOf({ rows, columns, parameters }, began, lanes) {
  const at = (lane) => ({ agent: lanes[lane][0], device: lanes[lane][1] ?? undefined });
  const moment = (tenths) => began + tenths * 100;
  const between = (started, took) => ({ from: moment(started), to: took === null ? undefined : moment(started + took) });
  return Array.from({ length: rows }, (_, i) => {
    const row = { parameters: {} };
    for (const [name, values] of Object.entries(columns)) if (values[i] !== null) row[name] = values[i];
    for (const [name, values] of Object.entries(parameters)) if (values[i] !== null) row.parameters[name] = values[i];
    if (row.lane !== undefined) Object.assign(row, at(row.lane));
    if (row.stretches) row.stretches = row.stretches.map(([lane, started, took]) => ({ ...at(lane), ...between(started, took) }));
    if (row.started !== undefined) row.started_at = moment(row.started);
    if (row.took !== undefined) row.finished_at = moment(row.started + row.took);
    return row;
  });
}

export class SweepView {
  constructor(main, id, known) {
    Object.assign(this, { id, known, sweep: null, trials: new Map(), parameters: new Set(), chosen: new Set(), tab: 'trials', panel: null });
    document.title = `${id} · LoraFleet`;
    this.abort = new AbortController();
    this.title = el('h1', {}, id);
    this.state = el('span');
    this.actions = el('div', { class: 'buttons' });
    this.facts = el('dl', { class: 'summary' });
    this.note = el('p', { class: 'wrong', role: 'status', hidden: true });
    this.waits = el('p', { class: 'note', role: 'status', hidden: true });
    this.simulated = el('p', { class: 'note', hidden: true }, 'Simulated: nothing was trained. Memory and time are what models predict, losses follow a formula.');
    const open = (n) => this.open(n);
    this.table = new Table({ trials: this.trials, chosen: this.chosen, open, changed: () => this.chosenChanged() });
    this.curves = new Curves({ sweep: id, metrics: () => known.server?.metrics });
    this.comparison = new Comparison({ sweep: id, remove: (n) => { this.chosen.delete(n); this.chosenChanged(); }, clear: () => { this.chosen.clear(); this.chosenChanged(); } });
    this.figures = [new Tradeoff({ open }), new Parallel()];
    this.importance = new Importance();
    this.timeline = new Timeline({ open });
    this.document = el('pre', { class: 'document', tabindex: '0' });
    const names = [['trials', 'Trials'], ['figures', 'Trade-offs'], ['timeline', 'Timeline'], ['document', 'Sweep file']];
    this.tabs = tabs('Views of the sweep', names, (name) => this.show(name));
    this.tabPanel = el('div', { id: 'panel', role: 'tabpanel', class: 'tab-panel' });
    this.layout = el('div', { class: 'layout' }, this.tabPanel);
    fill(main,
      el('div', { class: 'head' }, this.title, this.state, this.actions), this.facts, this.note, this.simulated, this.waits, this.tabs.bar, this.layout);
    this.redraw = throttled(() => this.draw(), 250);
    this.redrawFigures = throttled(() => this.drawFigures(), 1500);
    this.reopen = throttled(() => this.reopenIfRunning(), 1000);
    this.tabs.select('trials');
    this.follow();
  }

  end() {
    this.abort.abort();
    this.panel?.end();
    [this.table, this.curves, this.timeline, ...this.figures].forEach((part) => part.end());
  }

  // The lists of sweeps and agents changed: this one may run again, or be gone, or wait for something else.
  update() {
    this.reopen();
    this.head();
  }

  reopenIfRunning() {
    const listed = this.known.sweeps.get(this.id);
    if (this.followed || this.abort.signal.aborted || !listed || OVER.includes(listed.state)) return;
    this.follow();
  }

  async follow() {
    this.followed = true;
    await follow(`sweeps/${this.id}/events`, {
      refused: (error) => this.say(error.status === 404 ? `There is no sweep ${this.id}.` : error.message),
      sweep: (sweep) => {
        const ended = this.sweep && !OVER.includes(this.sweep.state) && OVER.includes(sweep.state);
        this.sweep = sweep;
        if (ended) announce(`The sweep is ${sweep.state}`);
        this.curves.prefer(sweep.metric);
        this.head();
        this.redraw();
      },
      picture: () => { this.lanes = []; },
      lanes: (lanes) => { this.lanes.push(...lanes); },
      trials: (columns) => {
        const rows = rowsOf(columns, this.sweep.created_at, this.lanes);
        rows.forEach((row) => this.take(row));
        if (rows.length > 0 && this.trials.size === rows.length) this.first();
        this.redraw();
      },
      points: (points) => {
        points.forEach((point) => this.point(point));
        this.redraw();
      },
      importance: (news) => this.importance.tell(news),
    }, this.abort.signal);
    this.followed = false;
  }

  // The first rows are there: nobody waits for the rest of them to see these.
  first() {
    this.table.describe(this.sweep, [...this.parameters]);
    this.table.arrange();
  }

  take(row) {
    const before = this.trials.get(row.n);
    const over = OVER.includes(row.state);
    for (const key of KEPT) if (before && row[key] === undefined) row[key] = before[key];
    Object.keys(row.parameters).forEach((name) => this.parameters.add(name));
    this.trials.set(row.n, row);
    if (row.simulated && this.simulated.hidden) {
      this.simulated.hidden = false;
      [this.curves, this.timeline, ...this.figures].forEach(({ mark }) => { mark.hidden = false; });
    }
    if (before && over && !OVER.includes(before.state)) this.curves.over(row.n);
    if (this.panel?.n === row.n) this.panel.update(row);
  }

  point(point) {
    const trial = this.trials.get(point.n);
    this.curves.point(point);
    if (!trial || trial.attempt !== point.attempt) return;
    trial.step = Math.max(trial.step, point.step);
    const { values } = point;
    trial.value = values[this.sweep?.metric] ?? trial.value;
    for (const key of KEPT) trial[key] = values[key] ?? trial[key];
    if (this.panel?.n === point.n) this.panel.update(trial);
  }

  say(text) {
    this.note.hidden = !text;
    this.note.textContent = text ?? '';
  }

  head() {
    const { sweep } = this;
    if (!sweep) return;
    fill(this.state, state(sweep.state));
    const fact = (name, ...value) => el('div', {}, el('dt', {}, name), el('dd', {}, value));
    const best = sweep.best_trial && el('button', { type: 'button', class: 'open', onclick: () => this.open(sweep.best_trial) }, `trial ${sweep.best_trial}`);
    fill(this.facts,
      fact('Trials over', progress(sweep)),
      fact(`Best ${sweep.metric ?? ''}`, quality(sweep.best_value), best && [' by ', best]),
      fact('Cost', sweep.max_cost_usd ? `${dollars(sweep.cost_usd)} of ${dollars(sweep.max_cost_usd)}` : dollars(sweep.cost_usd)),
      fact('Search', `${sweep.algorithm ?? '–'}, ${sweep.goal ?? 'minimize'}`),
      fact('Model', sweep.model ?? '–'),
      namespace(sweep) && fact('Namespace', sweep.namespace),
      fact('Submitted', time(sweep.created_at)));
    // The list is looked at each second, and what is waited for changes with other sweeps too.
    const waited = waits(this.known.sweeps.get(this.id) ?? sweep, this.known);
    this.waits.hidden = !waited;
    const text = `Queued trials wait: ${waited}.`;
    if (waited && this.waits.textContent !== text) this.waits.textContent = text;
    this.say(sweep.failure ? `It failed: ${sweep.failure}` : sweep.ended_early ? `Its budget ended it: ${sweep.ended_early}` : null);
    const offered = `${sweep.state} ${this.known.server?.may_change}`;
    if (offered === this.offered) return;
    this.offered = offered;
    const button = (text, act, kind) => el('button', { type: 'button', class: kind, onclick: act }, text);
    const over = OVER.includes(sweep.state);
    fill(this.actions, this.known.server?.may_change && [
      sweep.state === 'running' && button('Pause', () => this.ask('pause')),
      sweep.state === 'paused' && button('Resume', () => this.ask('resume'), 'primary'),
      sweep.state !== 'cancelled' && button('Extend', () => this.extend()),
      !over && button('Stop', () => this.ask('cancel'), 'danger'),
    ]);
  }

  ask(what) {
    const words = {
      pause: ['Pause', 'It proposes nothing, and trials that train are checkpointed and wait.'],
      resume: ['Resume', 'Its trials go on from their checkpoints.'],
      cancel: ['Stop', 'It and its trials end as cancelled. Those that train upload their adapters first. It cannot be resumed.'],
    }[what];
    question({
      title: `${words[0]} ${this.id}?`,
      text: words[1],
      yes: `${words[0]} sweep`,
      danger: what === 'cancel',
      act: async () => {
        await post(`sweeps/${this.id}/${what}`);
        this.reopen();
      },
    });
  }

  async extend() {
    const { spec } = await get(`sweeps/${this.id}`);
    const request = crypto.randomUUID();
    question({
      title: `Extend ${this.id}?`,
      text: 'It gets more trials or more budget, and runs again if it was over.',
      fields: [
        { name: 'trials', label: 'Trials in all', inputmode: 'numeric', value: spec.search?.max_trials },
        { name: 'cost', label: 'Dollars in all', inputmode: 'decimal', value: spec.budget?.max_cost_usd, hint: 'Empty: as many as it takes.' },
        { name: 'clock', label: 'Time in all', value: spec.budget?.max_wall_clock, hint: 'Such as 6h or 1h30m. Empty: as long as it takes.' },
      ],
      yes: 'Extend sweep',
      act: async ({ trials, cost, clock }) => {
        const changed = structuredClone(spec);
        const put = (part, key, value) => {
          if (value === '' && !changed[part]) return;
          changed[part] ??= {};
          if (value === '') delete changed[part][key];
          else changed[part][key] = value;
        };
        put('search', 'max_trials', trials === '' ? '' : Number(trials));
        put('budget', 'max_cost_usd', cost === '' ? '' : Number(cost));
        // Seconds are a number; with a unit it is a text.
        put('budget', 'max_wall_clock', clock === '' || Number.isNaN(Number(clock)) ? clock : Number(clock));
        if (changed.budget && Object.keys(changed.budget).length === 0) delete changed.budget;
        await post(`sweeps/${this.id}/extend`, { request_id: request, spec: changed });
        this.reopen();
      },
    });
  }

  show(name) {
    this.tab = name;
    this.tabPanel.setAttribute('aria-labelledby', `tab-${name}`);
    const parts = {
      trials: [this.curves.element, this.table.element, this.comparison.element],
      figures: [...this.figures, this.importance].map(({ element }) => element),
      timeline: [this.timeline.element],
      document: [el('section', { class: 'card', 'aria-label': 'Sweep file' }, this.document)],
    };
    fill(this.tabPanel, parts[name]);
    if (name === 'document') this.readDocument();
    this.draw();
    this.drawFigures();
  }

  async readDocument() {
    this.document.textContent = await get(`sweeps/${this.id}`).then(({ spec }) => JSON.stringify(spec, null, 2), (error) => error.message);
  }

  draw() {
    if (this.abort.signal.aborted) return;
    this.head();
    this.table.describe(this.sweep, [...this.parameters]);
    if (this.tab === 'trials') {
      this.table.refreshSoon();
      this.comparison.update(this.chosen, this.trials);
      this.chooseCurves();
    }
    this.redrawFigures();
  }

  drawFigures() {
    if (this.abort.signal.aborted) return;
    const trials = () => [...this.trials.values()];
    // A further run of a trial is no further choice of the search.
    const searched = () => trials().filter((trial) => !trial.replicate_of);
    if (this.tab === 'figures') this.figures.forEach((figure) => figure.update(searched(), this.sweep, this.chosen));
    if (this.tab === 'timeline') this.timeline.update(trials());
  }

  chosenChanged() {
    announce(`${number(this.chosen.size)} trials chosen`);
    this.table.tell();
    this.table.draw();
    this.comparison.update(this.chosen, this.trials);
    this.chooseCurves();
  }

  chooseCurves() {
    if (this.chosen.size > 0) {
      this.curves.show([...this.chosen].sort((a, b) => a - b), 'the chosen trials');
      return;
    }
    const sign = this.sweep?.goal === 'maximize' ? -1 : 1;
    const all = [...this.trials.values()];
    const best = all.filter((t) => Number.isFinite(t.value) && !t.replicate_of).sort((a, b) => sign * (a.value - b.value) || a.n - b.n).slice(0, BEST);
    const newest = all.filter((t) => t.state === 'running' && !best.includes(t)).sort((a, b) => b.n - a.n).slice(0, NEWEST);
    this.curves.show([...best, ...newest].map(({ n }) => n).sort((a, b) => a - b), 'the best trials and the newest that train; choose others in the table');
  }

  open(n) {
    const from = document.activeElement;
    this.close();
    const row = this.trials.get(n);
    if (!row) return;
    this.panel = new TrialPanel({ sweep: this.id, n, row, mayChange: this.known.server?.may_change, closed: () => {
      this.close();
      // The table may have been drawn again since.
      (from?.isConnected ? from : this.table.body.querySelector(`[data-of="${from?.dataset.of}"]`))?.focus();
    } });
    this.layout.append(this.panel.element);
    this.layout.classList.add('open');
    this.panel.focus();
  }

  close() {
    this.panel?.end();
    this.panel?.element.remove();
    this.panel = null;
    this.layout.classList.remove('open');
  }
}
