// The page: which view is shown, the lists of sweeps and agents, and the token.

import { el, fill, announce, dollars, namespace, progress, quality, question, state, throttled, time, waits } from './show.js';
import { follow, get, onAge, onTokenWanted, token } from './server.js';
import { SweepView } from './sweep.js';
import { agentsView } from './agents.js';

const main = document.getElementById('main');
const link = document.getElementById('link');

/** What is known of the server, its sweeps and its agents. */
export const known = { server: null, sweeps: new Map(), agents: new Map(), listed: false };

let view = null;
let overview = null;

function route() {
  const path = location.hash.replace(/^#/, '') || '/';
  const sweep = /^\/sweeps\/([^/]+)$/.exec(path)?.[1];
  view?.end?.();
  for (const entry of document.querySelectorAll('nav [data-page]')) {
    const here = path === '/agents' ? 'agents' : 'sweeps';
    if (entry.dataset.page === here) entry.setAttribute('aria-current', 'page');
    else entry.removeAttribute('aria-current');
  }
  if (sweep) view = new SweepView(main, sweep, known);
  else if (path === '/agents') view = agentsView(main, known);
  else view = sweepsView();
  view.update();
}

const update = throttled(() => view?.update('overview'), 100);

function sweepsView() {
  document.title = 'Sweeps · LoraFleet';
  const body = el('tbody');
  const headings = ['Sweep', 'State', 'Trials', 'Best', 'Cost', 'Submitted'];
  const table = el('table', { class: 'list' },
    el('caption', { class: 'unseen' }, 'Sweeps, the newest first'),
    el('thead', {}, el('tr', {}, headings.map((text) => el('th', { scope: 'col', class: ['Best', 'Cost'].includes(text) && 'number' }, text)))), body);
  const empty = el('p', { class: 'quiet' });
  fill(main, el('h1', {}, 'Sweeps'), el('div', { class: 'card scrolls', tabindex: '0', role: 'region', 'aria-label': 'Sweeps' }, table, empty));
  return {
    update() {
      const sweeps = [...known.sweeps.values()].sort((a, b) => b.created_at - a.created_at);
      table.hidden = sweeps.length === 0;
      empty.hidden = sweeps.length > 0;
      empty.textContent = known.listed ? 'No sweeps yet. Submit one with: lorafleet submit sweep.yaml' : 'Loading.';
      const beside = (text) => text && el('div', { class: 'quiet beside' }, text);
      fill(body, sweeps.map((sweep) => el('tr', {},
        el('th', { scope: 'row' }, el('a', { href: `#/sweeps/${sweep.id}` }, sweep.id), beside(namespace(sweep))),
        el('td', {}, state(sweep.state), beside(waits(sweep, known))),
        el('td', {}, progress(sweep)),
        el('td', { class: 'number' }, quality(sweep.best_value)),
        el('td', { class: 'number' }, dollars(sweep.cost_usd)),
        el('td', {}, time(sweep.created_at)))));
    },
  };
}

// The first news of a stream are all that there is: of what is gone since the last one nobody would tell.
function take(map, { changed, gone, whole }) {
  if (whole) map.clear();
  gone.forEach((id) => map.delete(id));
  changed.forEach((item) => map.set(item.id, item));
}

async function start() {
  overview?.abort();
  overview = new AbortController();
  const { signal } = overview;
  try {
    known.server = await get('server', signal);
  } catch (error) {
    if (error.status === 401 || signal.aborted) return;
    linked(false, error.message);
  }
  about();
  follow('events', {
    link: linked,
    refused: (error) => linked(false, error.message),
    sweeps(news) {
      take(known.sweeps, news);
      update();
    },
    agents(news) {
      take(known.agents, news);
      // They come after the sweeps.
      known.listed = true;
      update();
    },
  }, signal);
}

function linked(there, why) {
  link.className = there ? 'link there' : 'link';
  const text = there ? 'live' : why ?? 'no connection; trying again';
  if (link.textContent !== text) link.textContent = text;
}

function about() {
  const { server } = known;
  if (!server) return;
  const who = server.user ? `${server.user}${server.may_change ? '' : ', who may only read'}` : '';
  fill(document.getElementById('user'), who, server.user && el('button', { type: 'button', class: 'small', onclick: () => {
    token.forget();
    location.reload();
  } }, 'Sign out'));
  const trouble = document.getElementById('trouble');
  trouble.hidden = !server.trouble;
  trouble.textContent = server.trouble ? `The server cannot write: ${server.trouble}` : '';
}

// A leader that lost etcd's majority tells what it knew. Its streams end when somebody leads again, and are asked for anew.
onAge((seconds) => {
  const old = document.getElementById('old');
  old.hidden = seconds === null;
  if (old.hidden) return;
  const at = new Date(Date.now() - seconds * 1000).toLocaleTimeString();
  old.textContent = `What is shown is of ${at}: etcd has no majority, or the coordinator does not reach it. Trials train on; nothing can be changed meanwhile.`;
});

let asking = false;
onTokenWanted(() => {
  if (asking) return;
  asking = true;
  linked(false, 'a token is wanted');
  const dialog = question({
    title: 'Who are you?',
    fields: [{ name: 'token', label: 'Token', type: 'password', hint: 'Who runs the server makes one: lorafleet token create. It is kept until this tab is closed.' }],
    yes: 'Go on',
    async act({ token: given }) {
      token.set(given);
      try {
        await get('server');
      } catch (error) {
        token.forget();
        throw error.status === 401 ? new Error('That token is none that this server knows.') : error;
      }
      await start();
      route();
    },
  });
  dialog.addEventListener('close', () => { asking = false; });
});

matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => route());
addEventListener('hashchange', () => {
  if (document.activeElement?.classList.contains('skip')) return;
  route();
  main.focus({ preventScroll: true });
  scrollTo(0, 0);
  announce(document.title);
});
document.querySelector('.skip').addEventListener('click', (event) => {
  event.preventDefault();
  main.focus();
});
route();
start();
