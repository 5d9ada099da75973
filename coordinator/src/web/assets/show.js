// Elements, numbers as people read them, and questions before something is changed.

/** An element: `el('p', { class: 'quiet' }, 'text', child)`. What begins with `on` is listened to. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name in element && typeof value !== 'string') element[name] = value;
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

/** Puts other children into an element. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

const NONE = '–';

/** A number in the shortest form that people read. */
export function number(value) {
  if (value === undefined || value === null) return NONE;
  if (typeof value !== 'number') return Array.isArray(value) ? value.join(', ') : String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString('en');
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace('e+', 'e');
  return String(Number(value.toPrecision(4)));
}

/** A loss, and other values that trials are compared by. */
export function quality(value) {
  if (value === undefined || value === null) return NONE;
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4 ? value.toFixed(4) : number(value);
}

/** Bytes in GB of 10⁹, as everywhere in LoraFleet. */
export function bytes(value) {
  if (!value) return NONE;
  for (const [unit, size] of [['TB', 1e12], ['GB', 1e9], ['MB', 1e6], ['kB', 1e3]]) {
    if (value >= size) return `${Number((value / size).toPrecision(3))} ${unit}`;
  }
  return `${value} B`;
}

export function dollars(value) {
  if (value === undefined || value === null) return NONE;
  if (value !== 0 && value < 0.01) return `$${Number(value.toPrecision(2))}`;
  return `$${value.toLocaleString('en', { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`;
}

/** What an hour of a device costs, and where that price comes from. */
export function price(device) {
  if (!(device?.price_per_hour > 0)) return NONE;
  const from = device.price_from;
  const named = from ? `that of ${from.machine} (${from.provider}, ${from.region})${from.accelerators > 1 ? `, a part in ${from.accelerators}` : ''}${from.spot ? ', spot' : ''}, ${from.date}, ${from.source}` : 'as whoever started its agent said';
  return `${dollars(device.price_per_hour)} an hour, ${named}`;
}

export function duration(milliseconds) {
  if (milliseconds === undefined || milliseconds === null || !(milliseconds >= 0)) return NONE;
  const seconds = Math.round(milliseconds / 1000);
  const [days, hours, minutes] = [Math.floor(seconds / 86400), Math.floor(seconds / 3600) % 24, Math.floor(seconds / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  if (minutes) return `${minutes} min ${seconds % 60} s`;
  return `${seconds} s`;
}

export function time(milliseconds) {
  return milliseconds ? new Date(milliseconds).toLocaleString('en-GB', { dateStyle: 'medium', timeStyle: 'medium' }) : NONE;
}

export function clock(milliseconds) {
  return new Date(milliseconds).toLocaleTimeString('en-GB');
}

/** A state as a word, or another text, with a mark beside it. */
export function state(name, text = name) {
  return el('span', { class: `state ${name}` }, text);
}

/** Milliseconds in which a trial trained: not those in which it waited between two attempts. */
export function trained(trial) {
  if (!trial.started_at) return undefined;
  const stretches = trial.stretches ?? [{ from: trial.started_at, to: trial.finished_at }];
  return stretches.reduce((sum, { from, to }) => sum + (to ?? Date.now()) - from, 0);
}

/** Stands beside a figure's name once it shows a simulated trial. */
export function simulated() {
  return el('span', { class: 'simulated', hidden: true }, 'simulated');
}

export const OVER = ['completed', 'stopped', 'diverged', 'failed', 'cancelled'];
export const STATES = ['queued', 'assigned', 'running', ...OVER];

/** A colour of the page, as its style sheet has it now. */
export function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** The colour of the n-th of several things. */
export function nth(n) {
  return color(`series-${n % 8}`);
}

/** Says something to who cannot see that it changed. */
export function announce(text) {
  document.getElementById('announced').textContent = text;
}

/** Calls at most once a frame, and not more often than every `least` milliseconds. */
export function throttled(work, least = 0) {
  let planned = false;
  let last = -Infinity;
  const run = () => {
    planned = false;
    last = performance.now();
    work();
  };
  return () => {
    if (planned) return;
    planned = true;
    const wait = last + least - performance.now();
    if (wait > 0) setTimeout(() => requestAnimationFrame(run), wait);
    else requestAnimationFrame(run);
  };
}

/**
 * Asks before something is changed, and does it. `fields` are inputs whose values `act` gets; what `act` throws is shown,
 * and the question stays.
 */
export function question({ title, text, fields = [], yes, danger = false, act }) {
  const inputs = fields.map((field) => el('input', { id: `q-${field.name}`, type: field.type ?? 'text', inputmode: field.inputmode,
    autocomplete: 'off', value: String(field.value ?? ''), 'aria-describedby': field.hint ? `q-${field.name}-hint` : null }));
  const wrong = el('p', { class: 'wrong', role: 'alert' });
  const confirm = el('button', { type: 'button', class: danger ? 'danger' : 'primary' }, yes);
  const dialog = el('dialog', { 'aria-labelledby': 'q-title', onclose: () => dialog.remove() },
    el('h2', { id: 'q-title' }, title),
    text && el('p', {}, text),
    fields.map((field, i) => el('div', { class: 'field' },
      el('label', { for: `q-${field.name}` }, field.label), inputs[i],
      field.hint && el('p', { class: 'hint', id: `q-${field.name}-hint` }, field.hint))),
    wrong,
    el('div', { class: 'buttons' },
      el('button', { type: 'button', onclick: () => dialog.close() }, 'Leave it'), confirm));
  const go = async () => {
    confirm.disabled = true;
    wrong.textContent = '';
    try {
      await act(Object.fromEntries(fields.map((field, i) => [field.name, inputs[i].value.trim()])));
      dialog.close();
    } catch (error) {
      wrong.textContent = error.message;
    }
    confirm.disabled = false;
  };
  confirm.addEventListener('click', go);
  inputs.forEach((input) => input.addEventListener('keydown', (event) => { if (event.key === 'Enter') go(); }));
  document.body.append(dialog);
  dialog.showModal();
  (inputs[0] ?? confirm).focus();
  return dialog;
}

/** Tabs: buttons of which one is chosen. Arrow keys go from one to the next. */
export function tabs(label, names, choose) {
  const buttons = names.map(([id, text]) => el('button', { type: 'button', role: 'tab', id: `tab-${id}`, 'aria-controls': 'panel',
    onclick: () => select(id) }, text));
  const bar = el('div', { class: 'tabs', role: 'tablist', 'aria-label': label }, buttons);
  const select = (id, quietly) => {
    names.forEach(([name], i) => {
      buttons[i].setAttribute('aria-selected', name === id);
      buttons[i].tabIndex = name === id ? 0 : -1;
    });
    if (!quietly) choose(id);
  };
  bar.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = buttons[(buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length];
    next.focus();
    next.click();
  });
  return { bar, select };
}

/** Why a sweep's queued trials get no device, whatever becomes free; nothing if they merely wait for their turn. */
export function waits(sweep, known) {
  if (sweep.state !== 'running' || !sweep.counts.queued || !known.listed) return null;
  if (sweep.waits_for) return sweep.waits_for;
  const open = [...known.agents.values()].filter((agent) => agent.connected && !agent.drained);
  if (open.length === 0) return 'no agent is connected that takes trials';
  const wanted = sweep.accelerators ?? [];
  const suits = ({ accelerator }) => wanted.some((name) => name.toLowerCase() === accelerator.toLowerCase());
  if (wanted.length === 0 || open.some((agent) => agent.devices.some(suits))) return null;
  return `no agent that is connected has ${wanted.join(' or ')}`;
}

/** The namespace of a sweep, where it is worth a word. */
export function namespace(sweep) {
  return sweep.namespace && sweep.namespace !== 'default' ? sweep.namespace : null;
}

/** How many of a sweep's trials are over, of how many. */
export function progress(sweep) {
  const count = (states) => states.reduce((sum, name) => sum + (sweep.counts[name] ?? 0), 0);
  const proposed = Object.values(sweep.counts).reduce((sum, n) => sum + n, 0);
  const over = count(OVER);
  const all = Math.max(sweep.max_trials ?? 0, proposed);
  return el('span', { class: 'progress' },
    el('progress', { max: Math.max(all, 1), value: over, 'aria-label': `${over} of ${all} trials are over` }),
    `${over.toLocaleString('en')} / ${all.toLocaleString('en')}`);
}
