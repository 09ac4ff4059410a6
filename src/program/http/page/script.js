// The page that shows /status.json, which it requests every two seconds while it is visible.

const INTERVAL = 2000;
const TIMEOUT = 5000;
// Rows of a table that are shown at first.
const ROWS = 10;

const find = (selector, inside = document) => inside.querySelector(selector);

// ---- Texts

const number = new Intl.NumberFormat("en");
const count = (n) => number.format(n);

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (n >= 1024 && unit < units.length - 1) {
    n /= 1024;
    unit += 1;
  }
  return `${unit === 0 || n >= 100 ? Math.round(n) : n.toFixed(1)} ${units[unit]}`;
}

// In two units at most: `2 h 5 min`.
function time(seconds) {
  const [minutes, hours, days] = [60, 3600, 86400].map((unit) => Math.floor(seconds / unit));
  const parts = days ? [days, "d", hours % 24, "h"] : hours ? [hours, "h", minutes % 60, "min"] : [minutes, "min", 0];
  if (!minutes) return `${seconds} s`;
  return parts.slice(0, parts[2] ? 4 : 2).join(" ");
}

const ago = (seconds) => (seconds < 2 ? "now" : `${time(seconds)} ago`);

// Without the middle: the start is the same for many peers.
const short = (peer) => (peer.length > 16 ? `${peer.slice(0, 4)}…${peer.slice(-8)}` : peer);

// `/ip4/192.0.2.1/tcp/4001` as `192.0.2.1:4001`; other addresses unchanged.
function place(address) {
  const [, kind, host, , port, ...rest] = (address ?? "").split("/");
  if (rest.length > 0 || !["ip4", "ip6"].includes(kind)) return address ?? "";
  const bare = kind === "ip6" ? `[${host}]` : host;
  return port ? `${bare}:${port}` : host;
}

// ---- Elements

function element(name, content, properties = {}) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...[content ?? []].flat());
  return made;
}

// Changes only what differs, so that a selection of text stays.
function setText(where, text) {
  if (where.textContent !== text) where.textContent = text;
}

function peer(id) {
  const button = element("button", short(id), { type: "button", className: "peer", title: id });
  button.setAttribute("aria-label", `Copy ${id}`);
  button.addEventListener("click", async () => {
    await copy(id);
    button.classList.add("copied");
    setTimeout(() => button.classList.remove("copied"), 1500);
  });
  return button;
}

// Browsers offer the clipboard to pages that came over TLS, or from the same machine.
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea", text, { readOnly: true });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

// ---- Tables

// A column has a title, the class of its cells, and their content: `text`, which may change, or `build`, an
// element that does not. With `by`, a click on the title sorts by that number.
class Table {
  constructor(section, columns) {
    this.section = section;
    this.columns = columns;
    this.rows = new Map();
    this.most = ROWS;
    const titles = columns.map(({ title, kind, by }) => {
      const of = by ? element("button", title, { type: "button" }) : title;
      const head = element("th", of, { className: kind ?? "", scope: "col" });
      if (by) of.addEventListener("click", () => this.sort(by, head));
      return head;
    });
    find("thead", section).append(element("tr", titles));
    find(".more", section).addEventListener("click", () => {
      this.most = Infinity;
      this.show(this.last);
    });
  }

  // Descending; a second click makes it ascending.
  sort(by, head) {
    const turned = head.ariaSort === "descending";
    for (const other of head.parentElement.cells) other.ariaSort = null;
    head.ariaSort = turned ? "ascending" : "descending";
    this.order = (a, b) => (turned ? by(a) - by(b) : by(b) - by(a));
    this.show(this.last);
  }

  // `rows` are pairs of a key and the object that the row shows.
  show(rows) {
    this.last = rows;
    const sorted = this.order ? rows.toSorted(([, a], [, b]) => this.order(a, b)) : rows;
    const shown = sorted.slice(0, this.most);
    const keys = new Set(shown.map(([key]) => key));
    for (const [key, row] of this.rows) {
      if (!keys.has(key)) {
        row.remove();
        this.rows.delete(key);
      }
    }
    const body = find("tbody", this.section);
    shown.forEach(([key, of], index) => {
      const row = this.rows.get(key) ?? this.add(key, of);
      this.columns.forEach(({ text, kind }, at) => {
        if (text) setText(row.cells[at], text(of));
        if (typeof kind === "function") row.cells[at].className = kind(of);
      });
      if (body.children[index] !== row) body.insertBefore(row, body.children[index] ?? null);
    });
    find("table", this.section).hidden = rows.length === 0;
    find(".none", this.section).hidden = rows.length > 0;
    const more = find(".more", this.section);
    more.hidden = rows.length <= shown.length;
    setText(more, `Show all ${count(rows.length)}`);
  }

  add(key, of) {
    const cells = this.columns.map(({ title, kind, build, label }) => {
      const cell = element("td", build?.(of));
      if (typeof kind === "string") cell.className = kind;
      if (label) cell.dataset.label = title;
      return cell;
    });
    const row = element("tr", cells);
    this.rows.set(key, row);
    return row;
  }
}

const sum = ({ to_target, to_source }) => to_target + to_source;

const holders = new Table(find("#holders"), [
  { title: "Peer", build: (holder) => peer(holder.peer) },
  { title: "", kind: (holder) => `state ${holder.state}`, text: ({ state }) => (state === "grace" ? "in grace" : state) },
  { title: "From", kind: "full", text: (holder) => place(holder.address) },
  { title: "Ends in", kind: "number", label: true, by: (holder) => holder.ends_in, text: (holder) => time(holder.ends_in) },
  { title: "Last heard", kind: "number", label: true, by: ({ silent_for }) => silent_for ?? -1, text: ({ silent_for }) => (silent_for === null ? "" : ago(silent_for)) },
  { title: "Circuits", kind: "number", label: true, by: (holder) => holder.circuits, text: ({ circuits }) => (circuits ? count(circuits) : "") },
]);

const circuits = new Table(find("#circuits"), [
  { title: "From", build: (circuit) => peer(circuit.source) },
  { title: "To", kind: "to", build: (circuit) => peer(circuit.target) },
  { title: "Open for", kind: "number", label: true, by: (circuit) => circuit.open_for, text: (circuit) => time(circuit.open_for) },
  { title: "To target", kind: "number", label: true, by: ({ carried }) => carried.to_target, text: ({ carried }) => bytes(carried.to_target) },
  { title: "To source", kind: "number", label: true, by: ({ carried }) => carried.to_source, text: ({ carried }) => bytes(carried.to_source) },
  { title: "Now", kind: "number", label: true, by: (circuit) => sum(circuit.rate), text: (circuit) => `${bytes(sum(circuit.rate))}/s` },
]);

const latest = new Table(find("#latest"), [
  { title: "When", text: (refusal) => ago(refusal.ago) },
  { title: "What", text: (refusal) => refusal.what },
  { title: "Why", kind: "full", text: (refusal) => refusal.why },
  { title: "Peer", build: (refusal) => peer(refusal.peer) },
  { title: "From", text: (refusal) => place(refusal.address) },
]);

function tallies(section, list) {
  const total = list.reduce((total, { count }) => total + count, 0);
  const most = Math.max(...list.map(({ count }) => count));
  list.sort((a, b) => b.count - a.count);
  setText(find(".count", section), total ? count(total) : "");
  find(".none", section).hidden = total > 0;
  const lines = list.map((tally) => {
    const what = tally.what === "slot" ? [] : element("small", `${tally.what}: `);
    const bar = element("span", [], { className: "bar" });
    bar.style.setProperty("--share", `${(100 * tally.count) / most}%`);
    const numbers = element("span", [count(tally.count), element("small", `, ${ago(tally.ago)}`)]);
    return element("li", [element("span", [what, tally.why].flat()), numbers, bar]);
  });
  find(".tallies", section).replaceChildren(...lines);
}

// ---- Slots over time

const plot = find("#plot");
let span = "hour";
let status;

function curve() {
  const { every, points } = status.history[span];
  const { live, grace, free } = status.slots;
  // The last sample may be old: the current numbers follow it.
  return { every, points: [...points, [live, grace, free]] };
}

// The next round number.
function round(n) {
  const power = 10 ** Math.floor(Math.log10(n));
  return [1, 2, 4, 5, 10].map((step) => step * power).find((step) => step >= n);
}

function draw() {
  const { every, points } = curve();
  const total = status.slots.total;
  const taken = points.map(([live, grace]) => live + grace);
  // The scale ends at all slots if many are taken, else a little above the maximum.
  const most = Math.max(...taken);
  const top = most * 4 > total ? Math.max(total, most) : Math.min(total, round(Math.max(most * 1.25, 4)));
  const x = (index) => 240 - (points.length - 1 - index);
  const y = (n) => 100 - (n / top) * 98;
  const line = (values) => values.map((n, index) => `${index ? "L" : "M"}${x(index)} ${y(n).toFixed(2)}`).join("");
  const area = (values) => `${line(values)}L240 100L${x(0)} 100Z`;
  const live = points.map(([live]) => live);
  const set = (selector, path) => find(selector, plot).setAttribute("d", path);
  set(".live.area", area(live));
  set(".live.line", line(live));
  set(".grace.area", `${line(taken)}${live.map((n, i) => `L${x(i)} ${y(n).toFixed(2)}`).reverse().join("")}Z`);
  set(".grace.line", points.some(([, grace]) => grace) ? line(taken) : "");
  const levels = [top, Math.round(top / 2)].filter((n, index, all) => n && all.indexOf(n) === index);
  find("#levels").replaceChildren(...levels.map((n) => {
    const label = n === total ? `all ${count(n)} slots` : count(n);
    const level = element("li", element("span", label));
    level.style.setProperty("--at", `${(n / top) * 98}%`);
    return level;
  }));
  const times = [1, 0.75, 0.5, 0.25].map((share) => `${time(every * 240 * share)} ago`);
  find("#times").replaceChildren(...[...times, "now"].map((text) => element("li", text)));
  const hint = find("#hint");
  hint.hidden = points.length > 3;
  setText(hint, "No data yet");
  plot.setAttribute(
    "aria-label",
    `Slots over the last ${span}: ${live.at(-1)} live and ${points.at(-1)[1]} in grace now, ${most} taken at most, of ${total}`,
  );
}

function point(event) {
  const { every, points } = curve();
  const { left, width } = plot.getBoundingClientRect();
  const share = Math.min(Math.max((event.clientX - left) / width, 0), 1);
  const back = Math.min(Math.round((1 - share) * 240), points.length - 1);
  const [live, grace, free] = points.at(-1 - back);
  const cursor = find("#cursor");
  cursor.hidden = false;
  cursor.style.setProperty("--at", `${100 - (back / 240) * 100}%`);
  cursor.classList.toggle("left", back < 120);
  const when = back ? `${time(back * every)} ago` : "now";
  cursor.replaceChildren(element("span", `${when}: ${count(live)} live, ${count(grace)} in grace, ${count(free)} free`));
}

plot.addEventListener("pointermove", point);
plot.addEventListener("pointerdown", point);
plot.addEventListener("pointerleave", () => (find("#cursor").hidden = true));

for (const button of document.querySelectorAll("#span button")) {
  button.addEventListener("click", () => {
    span = button.dataset.span;
    for (const other of document.querySelectorAll("#span button")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    draw();
  });
}

// ---- The whole page

function figures() {
  const { circuits, connections, rate: now, relayed, questions } = status;
  const all = [
    ["Circuits", count(circuits.count), ""],
    ["Relaying", `${bytes(sum(now))}/s`, `→ ${bytes(now.to_target)}/s\u2002← ${bytes(now.to_source)}/s`],
    ["Relayed", bytes(sum(relayed)), `→ ${bytes(relayed.to_target)}\u2002← ${bytes(relayed.to_source)}`],
    ["Connections", count(connections), ""],
    ["Heartbeat probes", count(questions.asked), `${count(questions.unanswered)} unanswered`],
  ];
  const list = find("#figures");
  all.forEach(([title, figure, detail], index) => {
    if (!list.children[index]) {
      list.append(element("div", [element("dt", title), element("dd", [element("span"), element("small")])]));
    }
    const [main, small] = find("dd", list.children[index]).children;
    setText(main, figure);
    setText(small, detail);
  });
}

function listed(section, list, found) {
  const some = list.count > list.listed.length ? `, ${count(list.listed.length)} listed` : "";
  const matching = found === undefined ? "" : `, ${count(found)} found`;
  setText(find(".count", section), list.count ? `${count(list.count)}${some}${matching}` : "");
}

function showHolders() {
  const wanted = find("#holders input").value.trim();
  const all = status.holders.listed;
  const found = all.filter(({ peer, address }) => peer.includes(wanted) || place(address).includes(wanted));
  // Peers in grace first, then by peer id, so that rows keep their places.
  const order = (a, b) => a.state.localeCompare(b.state) || (a.peer < b.peer ? -1 : 1);
  holders.show(found.sort(order).map((holder) => [holder.peer, holder]));
  setText(find("#holders .none"), wanted && all.length ? "No peer matches." : "No peer holds a slot.");
  listed(find("#holders"), status.holders, wanted ? found.length : undefined);
}

find("#holders input").addEventListener("input", () => status && showHolders());

function about() {
  const parts = find("#about");
  if (!parts.children.length) {
    parts.append(peer(status.peer), element("span"), element("span"));
  }
  setText(parts.children[1], `up for ${time(status.up_for)}`);
  setText(parts.children[2], status.announced.length ? `announced at ${status.announced.join(", ")}` : "");
  setText(find("#version"), `relaylet ${status.version}`);
}

function show() {
  find("main").hidden = false;
  about();
  const { live, grace, free } = status.slots;
  [live, grace, free].forEach((n, index) => setText(find("dd", find("#counts").children[index]), count(n)));
  draw();
  figures();
  showHolders();
  const byCarried = (a, b) => sum(b.carried) - sum(a.carried);
  circuits.show(status.circuits.listed.sort(byCarried).map((circuit) => [circuit.id, circuit]));
  listed(find("#circuits"), status.circuits);
  tallies(find("#refused"), status.refused);
  tallies(find("#freed"), status.freed);
  latest.show(status.latest_refusals.map((refusal) => [refusal.number, refusal]));
}

function state(kind, text) {
  const pill = find("#state");
  pill.className = kind;
  document.body.classList.toggle("silent", kind === "silent");
  setText(pill, text);
  document.title = kind ? `relaylet: ${text}` : "relaylet";
}

let heard = Date.now();

async function refresh() {
  try {
    const signal = AbortSignal.timeout(TIMEOUT);
    const answer = await fetch("status.json", { cache: "no-store", signal });
    if (!answer.ok) throw new Error(answer.statusText);
    status = await answer.json();
    heard = Date.now();
  } catch {
    state("silent", `no answer for ${time(Math.round((Date.now() - heard) / 1000))}`);
    return;
  }
  state(status.draining ? "draining" : "", status.draining ? "draining" : "serving");
  show();
}

async function run() {
  for (;;) {
    if (!document.hidden) await refresh();
    await new Promise((resolve) => {
      setTimeout(resolve, INTERVAL);
      document.addEventListener("visibilitychange", resolve, { once: true });
    });
  }
}

run();
