// What the page asks of the server: answers in JSON, and streams of events. A token, where one is wanted, is kept for as
// long as the tab is open.

const KEPT = 'lorafleet-token';
const PAUSES = [500, 1000, 2000, 5000];

/** An answer that is a refusal. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const token = {
  get: () => sessionStorage.getItem(KEPT),
  set: (value) => sessionStorage.setItem(KEPT, value),
  forget: () => sessionStorage.removeItem(KEPT),
};

let wanted = () => {};

/** Calls back when the server wants a token. */
export function onTokenWanted(callback) {
  wanted = callback;
}

let aged = () => {};

/** Calls back with each answer: how many seconds ago what it tells was known to be current, or null if it is now. */
export function onAge(callback) {
  aged = callback;
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const known = token.get();
  if (known) headers.authorization = `Bearer ${known}`;
  const answer = await fetch(`/api/${path}`, { ...options, headers, cache: 'no-store' });
  if (answer.ok) {
    const seconds = answer.headers.get('lorafleet-stale-seconds');
    aged(seconds === null ? null : Number(seconds));
    return answer;
  }
  const said = await answer.json().catch(() => ({}));
  if (answer.status === 401) wanted();
  throw new Refused(answer.status, said.error ?? `the server answered ${answer.status}`);
}

/** Reads something. */
export async function get(path, signal) {
  return (await ask(path, { signal })).json();
}

/** Changes something. */
export async function post(path, body = {}) {
  const headers = { 'content-type': 'application/json' };
  return (await ask(path, { method: 'POST', headers, body: JSON.stringify(body) })).json();
}

// A browser has six connections to a server for all tabs together: one that nobody looks at gives its own back.
const REST = 5000;
const open = new Set();
const resting = new Set();
let rest = 0;
document.addEventListener('visibilitychange', () => {
  clearTimeout(rest);
  if (document.hidden) rest = setTimeout(() => open.forEach((stream) => stream.abort()), REST);
  else resting.forEach((wake) => wake());
});

/**
 * Follows a stream of events until it says that it is over, or `signal` ends it. `on[event]` is called with the data of
 * each event; `on.link` with whether there is a connection. A stream that breaks is opened again.
 */
export async function follow(path, on, signal) {
  for (let tries = 0; !signal.aborted; tries += 1) {
    const stream = new AbortController();
    const end = () => stream.abort();
    signal.addEventListener('abort', end);
    open.add(stream);
    try {
      const answer = await ask(path, { signal: stream.signal });
      on.link?.(true);
      if (await read(answer.body, on, () => { tries = 0; })) return;
    } catch (error) {
      if (error instanceof Refused && error.status !== 503 && error.status !== 429) {
        on.refused?.(error);
        return;
      }
    } finally {
      open.delete(stream);
      signal.removeEventListener('abort', end);
    }
    if (signal.aborted) return;
    if (document.hidden) await seen(signal);
    else {
      on.link?.(false);
      await pause(PAUSES[Math.min(tries, PAUSES.length - 1)], signal);
    }
  }
}

// Until the tab is looked at again, or `signal` ends it.
function seen(signal) {
  return new Promise((done) => {
    const wake = () => { resting.delete(wake); done(); };
    resting.add(wake);
    signal.addEventListener('abort', wake, { once: true });
  });
}

function pause(milliseconds, signal) {
  return new Promise((done) => {
    const timer = setTimeout(done, milliseconds);
    signal.addEventListener('abort', () => { clearTimeout(timer); done(); }, { once: true });
  });
}

// Whether the stream said that it is over.
async function read(body, on, alive) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return false;
    alive();
    const events = (rest + value).split('\n\n');
    rest = events.pop();
    for (const text of events) {
      const event = /^event: (.*)$/m.exec(text)?.[1];
      const data = /^data: (.*)$/m.exec(text)?.[1];
      if (!event) continue;
      on[event]?.(JSON.parse(data));
      if (event === 'over') return true;
    }
  }
}
