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

/** Calls back when the server wants a token, or another one. */
export function onTokenWanted(callback) {
  wanted = callback;
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const known = token.get();
  if (known) headers.authorization = `Bearer ${known}`;
  const answer = await fetch(`/api/${path}`, { ...options, headers, cache: 'no-store' });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  if (answer.status === 401) wanted(Boolean(known));
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

/**
 * Follows a stream of events until it says that it is over, or `signal` ends it. `on[event]` is called with the data of
 * each event; `on.link` with whether there is a connection. A stream that breaks is opened again.
 */
export async function follow(path, on, signal) {
  for (let tries = 0; !signal.aborted; tries += 1) {
    try {
      const answer = await ask(path, { signal });
      on.link?.(true);
      if (await read(answer.body, on, () => { tries = 0; })) return;
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused && error.status !== 503 && error.status !== 429) {
        on.refused?.(error);
        return;
      }
    }
    if (signal.aborted) return;
    on.link?.(false);
    await pause(PAUSES[Math.min(tries, PAUSES.length - 1)], signal);
  }
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
