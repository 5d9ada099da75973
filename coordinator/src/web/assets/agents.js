// The agents: machines with their devices, what they hold, and how much memory there is.

import { bytes, el, fill, price, time } from './show.js';

export function agentsView(main, known) {
  document.title = 'Agents · LoraFleet';
  const cards = el('div', { class: 'cards' });
  const count = el('p', { class: 'quiet' });
  fill(main, el('h1', {}, 'Agents'), count, cards);
  return {
    update() {
      const agents = [...known.agents.values()].sort((a, b) => (a.id < b.id ? -1 : 1));
      const devices = agents.flatMap((agent) => (agent.connected ? agent.devices : []));
      const held = agents.reduce((sum, agent) => sum + agent.trials.length, 0);
      count.textContent = agents.length === 0
        ? 'No agent has connected. Start one with: gpu-agent --coordinator ADDRESS'
        : `${counted(agents.length, 'agent')}, ${counted(devices.length, 'device')} connected, ${counted(held, 'trial')} held`;
      fill(cards, agents.map(card));
    },
  };
}

function counted(n, what) {
  return `${n.toLocaleString('en')} ${what}${n === 1 ? '' : 's'}`;
}

function standing(agent) {
  if (agent.drained) return ['drained', agent.connected ? 'drained' : 'drained, away'];
  if (agent.connected) return ['running', 'connected'];
  return agent.registered ? ['queued', 'registered, no session'] : ['failed', `away since ${time(agent.last_seen)}`];
}

function card(agent) {
  const [mark, text] = standing(agent);
  const labels = Object.entries(agent.labels).map(([name, value]) => [el('span', { class: 'label' }, `${name} ${value}`), ' ']);
  const trials = agent.trials.map((id) => {
    const [sweep, number] = id.split('/');
    return el('a', { href: `#/sweeps/${sweep}`, title: id }, `${sweep} #${number} `);
  });
  return el('article', { class: 'card agent' },
    el('h2', {}, agent.hostname || agent.id),
    el('p', {}, el('span', { class: `state ${mark}` }, text), ' ', labels),
    el('p', { class: 'quiet id' }, `${agent.id} · version ${agent.version || '?'}`),
    el('ul', { class: 'devices' }, agent.devices.map((device) => el('li', {},
      el('b', {}, device.id), ` ${device.accelerator} · ${bytes(device.memory_bytes)} · packs of ${device.max_pack_size}`,
      device.price_per_hour > 0 && ` · ${price(device)}`,
      device.simulated_speed > 0 && ` · simulated, ${device.simulated_speed} × as fast`,
      device.resident_base && el('div', { class: 'quiet base' }, `holds ${device.resident_base}`)))),
    el('p', {}, agent.trials.length ? ['Trains ', trials] : el('span', { class: 'quiet' }, 'No trials.')));
}
