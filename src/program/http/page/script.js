// The page that shows /status.json, which it requests every two seconds while it is visible.

const INTERVAL = 2000;
const TIMEOUT = 5000;
// Rows of a table that are shown at first.
const ROWS = 10;
// The relay's addresses that are shown at first.
const ADDRESSES = 2;
// When a certificate is about to expire, in seconds.
const EXPIRES_SOON = 14 * 86400;

const find = (selector, inside = document) => inside.querySelector(selector);

// ---- Texts

const number = new Intl.NumberFormat("en");
const count = (n) => number.format(n);

// `12 of 1,024`; a limit of zero is none.
const of = (n, most) => (most ? `${count(n)} of ${count(most)}` : count(n));

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
  if (!minutes) return `${seconds} s`;
  if (days) return units(days, "d", hours % 24, "h");
  return hours ? units(hours, "h", minutes % 60, "min") : units(minutes, "min", minutes < 10 ? seconds % 60 : 0, "s");
}

const units = (n, unit, rest, smaller) => (rest ? `${n} ${unit} ${rest} ${smaller}` : `${n} ${unit}`);

const ago = (seconds) => (seconds < 2 ? "now" : `${time(seconds)} ago`);

// Without the middle: the start is the same for many peers.
const short = (peer) => (peer.length > 16 ? `${peer.slice(0, 4)}…${peer.slice(-8)}` : peer);

// `/ip4/192.0.2.1/tcp/4001/ws` as `192.0.2.1:4001 ws`; addresses without an IP address unchanged.
function socket(address) {
  const [, kind, host, , port, ...rest] = (address ?? "").split("/");
  if (!["ip4", "ip6"].includes(kind)) return address ?? "";
  const bare = kind === "ip6" ? `[${host}]` : host;
  return port ? [`${bare}:${port}`, ...rest].join(" ") : host;
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
  button.setAttribute("aria-label", `Copy ${short(id)}`);
  button.addEventListener("click", () => copyOnClick(button, id));
  return button;
}

// The whole text of an address, and a button that copies it, or else selects it.
function address(text) {
  const [code, button] = [element("code", text), element("button", "Copy", { type: "button", className: "copy" })];
  button.setAttribute("aria-label", `Copy ${text}`);
  button.addEventListener("click", () => copyOnClick(button, text, code));
  return element("li", [button, code]);
}

// Shows the relay's addresses: a few of them until the button below is clicked.
function showAddresses(where) {
  const all = status.reachable_at;
  const most = where.dataset.all ? Infinity : ADDRESSES;
  const key = JSON.stringify([all, most]);
  if (where.dataset.key === key) return;
  where.dataset.key = key;
  const more = element("button", `Show all ${count(all.length)} addresses`, { type: "button" });
  more.hidden = all.length <= most;
  more.addEventListener("click", () => {
    where.dataset.all = true;
    showAddresses(where);
  });
  where.replaceChildren(element("ol", all.slice(0, most).map(address)), more);
}

// Copies `text`; where the browser does not allow that, selects it in `code`. Shows for a moment what was done, and tells
// screen readers.
async function copyOnClick(button, text, code) {
  const done = await copy(text);
  if (!done && code) getSelection().selectAllChildren(code);
  const result = done ? "Copied" : code ? "Selected" : "Not copied";
  const show = (result, label) => {
    button.classList.toggle("copied", result === "Copied");
    setText(find("#copy-result"), result);
    if (code) setText(button, label);
  };
  show(result, result);
  setTimeout(show, 1500, "", "Copy");
}

// Whether `text` is in the clipboard now. Browsers offer it to pages that came over TLS, or from the same machine.
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const focused = document.activeElement;
    const area = element("textarea", text, { readOnly: true });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return done;
  }
}

// ---- Tables

// A column has a title, the class of its cells, and their content: `text`, which may change, or `build`, an
// element that does not; `small` is a second line. With `by`, a click on the title sorts by that number.
class Table {
  constructor(section, columns) {
    this.section = section;
    this.columns = columns;
    this.rows = new Map();
    this.most = ROWS;
    const titles = columns.map(({ title, kind, by }) => {
      const label = by ? element("button", title, { type: "button" }) : title;
      const head = element("th", label, { className: kind ?? "", scope: "col" });
      if (by) label.addEventListener("click", () => this.sort(by, head));
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
    const isAscending = head.ariaSort === "descending";
    for (const other of head.parentElement.cells) other.ariaSort = null;
    head.ariaSort = isAscending ? "ascending" : "descending";
    this.order = (a, b) => (isAscending ? by(a) - by(b) : by(b) - by(a));
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
    shown.forEach(([key, item], index) => {
      const row = this.rows.get(key) ?? this.add(key, item);
      this.columns.forEach(({ text, small, kind }, at) => {
        const [main, line] = small ? row.cells[at].children : [row.cells[at]];
        if (text) setText(main, text(item));
        if (small) setText(line, small(item));
        if (typeof kind === "function") row.cells[at].className = kind(item);
      });
      if (body.children[index] !== row) body.insertBefore(row, body.children[index] ?? null);
    });
    find("table", this.section).hidden = rows.length === 0;
    find(".none", this.section).hidden = rows.length > 0;
    const more = find(".more", this.section);
    more.hidden = rows.length <= shown.length;
    setText(more, `Show all ${count(rows.length)}`);
  }

  add(key, item) {
    const cells = this.columns.map(({ title, kind, build, small, label }) => {
      const main = build?.(item);
      const cell = element("td", small ? [main ?? element("span"), element("small")] : main);
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
const remaining = (n) => (n === undefined ? "" : `${bytes(n)} left`);

const holders = new Table(find("#holders"), [
  { title: "Peer", build: (holder) => peer(holder.peer) },
  { title: "State", kind: (holder) => `state ${holder.state}`, text: ({ state }) => (state === "grace" ? "in grace" : state) },
  { title: "Address", kind: "full", text: (holder) => socket(holder.address) },
  { title: "Ends in", kind: "number", label: true, by: (holder) => holder.ends_in, text: (holder) => time(holder.ends_in) },
  { title: "Silent for", kind: "number", label: true, by: ({ silent_for }) => silent_for ?? -1, text: ({ silent_for }) => (silent_for === null ? "" : time(silent_for)) },
  { title: "Circuits", kind: "number", label: true, by: (holder) => holder.circuits, text: ({ circuits }) => (circuits ? count(circuits) : "") },
]);

const circuits = new Table(find("#circuits"), [
  { title: "Source", build: (circuit) => peer(circuit.source), small: (circuit) => socket(circuit.source_address) },
  { title: "Target", kind: "to", build: (circuit) => peer(circuit.target), small: (circuit) => socket(circuit.target_address) },
  { title: "Open for", kind: "number", label: true, by: (circuit) => circuit.open_for, text: (circuit) => time(circuit.open_for) },
  { title: "Time left", kind: "number", label: true, by: ({ ends_in }) => ends_in ?? Infinity, text: ({ ends_in }) => (ends_in === null ? "no limit" : time(ends_in)) },
  { title: "To target", kind: "number", label: true, by: ({ carried }) => carried.to_target, text: ({ carried }) => bytes(carried.to_target), small: ({ left }) => remaining(left?.to_target) },
  { title: "To source", kind: "number", label: true, by: ({ carried }) => carried.to_source, text: ({ carried }) => bytes(carried.to_source), small: ({ left }) => remaining(left?.to_source) },
  { title: "Now", kind: "number", label: true, by: (circuit) => sum(circuit.rate), text: (circuit) => `${bytes(sum(circuit.rate))}/s` },
]);

const latest = new Table(find("#latest"), [
  { title: "When", text: (refusal) => ago(refusal.ago) },
  { title: "Request", text: (refusal) => refusal.what },
  { title: "Reason", kind: "full", text: (refusal) => refusal.why },
  { title: "Peer", build: (refusal) => peer(refusal.peer) },
  { title: "Address", text: (refusal) => socket(refusal.address) },
]);

function showTallies(section, list) {
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

// The points of the shown curve with their ages, and the time that they span: the uptime until the curve is full.
function curve() {
  const { every, points } = status.history[span];
  const { live, grace, free } = status.slots;
  // A sample is taken at each multiple of `every` since the start. The current numbers follow the last one.
  const past = points.map((point, index) => ({ point, age: (status.up_for % every) + every * (points.length - 1 - index) }));
  const most = every * 240;
  const total = Math.max(Math.min(status.up_for, most), 1);
  return { points: [...past, { point: [live, grace, free], age: 0 }], total, isFull: total === most };
}

// The next round number.
function round(n) {
  const power = 10 ** Math.floor(Math.log10(n));
  return [1, 2, 4, 5, 10].map((step) => step * power).find((step) => step >= n);
}

function draw() {
  const { points, total, isFull } = curve();
  const slots = status.slots.total;
  const live = points.map(({ point: [live] }) => live);
  const taken = points.map(({ point: [live, grace] }) => live + grace);
  // The scale ends at all slots if many are taken, else a little above the maximum.
  const most = Math.max(...taken);
  const top = (most * 4 > slots ? Math.max(slots, most) : Math.min(slots, round(Math.max(most * 1.25, 4)))) || 1;
  const x = (index) => (240 * (1 - points[index].age / total)).toFixed(2);
  const y = (n) => (100 - (n / top) * 98).toFixed(2);
  const line = (values) => values.map((n, index) => `${index ? "L" : "M"}${x(index)} ${y(n)}`).join("");
  const set = (selector, path) => find(selector, plot).setAttribute("d", path);
  set(".live.area", `${line(live)}L240 100L${x(0)} 100Z`);
  set(".live.line", line(live));
  set(".grace.area", `${line(taken)}${live.map((n, i) => `L${x(i)} ${y(n)}`).reverse().join("")}Z`);
  set(".grace.line", points.some(({ point: [, grace] }) => grace) ? line(taken) : "");

  // The labels of both axes are beside the plot, so that they hide none of it.
  const levels = [top, top / 2, 0].filter((n, index, all) => Number.isInteger(n) && all.indexOf(n) === index);
  find("#levels").replaceChildren(...levels.map((n) => {
    const level = element("li", element("span", count(n)));
    level.style.setProperty("--at", `${(n / top) * 98}%`);
    return level;
  }));
  find("#slots").style.setProperty("--digits", Math.max(...levels.map((n) => count(n).length)));
  const shares = isFull ? [1, 0.75, 0.5, 0.25, 0] : total < 4 ? [1, 0] : [1, 0.5, 0];
  find("#times ol").replaceChildren(...shares.map((share) => {
    const label = element("li", share ? `${time(Math.round(total * share))} ago` : "now");
    label.style.setProperty("--at", `${100 * (1 - share)}%`);
    return label;
  }));
  const covered = isFull ? `over the last ${span}` : `since the start ${time(total)} ago`;
  plot.setAttribute(
    "aria-label",
    `Slots ${covered}: ${live.at(-1)} live and ${status.slots.grace} in grace now, ${most} taken at most, of ${slots}`,
  );
}

// Shows the numbers of the time under the pointer in place of the time axis.
function showPoint(event) {
  const { points, total } = curve();
  const { left, width } = plot.getBoundingClientRect();
  const age = (1 - Math.min(Math.max((event.clientX - left) / width, 0), 1)) * total;
  const nearest = points.reduce((best, other) => (Math.abs(other.age - age) < Math.abs(best.age - age) ? other : best));
  const [live, grace, free] = nearest.point;
  find("#cursor").style.setProperty("--at", `${100 * (1 - nearest.age / total)}%`);
  setText(find("#times p"), `${ago(nearest.age)}: ${count(live)} live, ${count(grace)} in grace, ${count(free)} free`);
  showCursor(true);
}

function showCursor(isShown) {
  find("#cursor").hidden = find("#times p").hidden = !isShown;
  find("#times ol").hidden = isShown;
}

plot.addEventListener("pointermove", showPoint);
plot.addEventListener("pointerdown", showPoint);
plot.addEventListener("pointerleave", () => showCursor(false));

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

// The limits that are reached, with what that means.
function reachedLimits() {
  const { slots, circuits, connections, limits } = status;
  const all = [
    [slots.live + slots.grace, "max-reservations", "slots are taken", "a newcomer gets one only in place of a peer that is gone"],
    [circuits.count, "max-circuits", "circuits are in use", "a new one ends another, or is refused"],
    [connections, "max-connections", "connections are open", "a new one replaces an idle one, or is closed"],
  ];
  return all.filter(([n, limit]) => limits[limit] && n >= limits[limit]).map(([, limit, what, effect]) => ({
    limit,
    text: `All ${count(limits[limit])} ${what}: ${effect}. Raise --${limit} to have more.`,
  }));
}

// The figures: title, value, detail, and the class of the value.
function showFigures(full) {
  const { circuits, connections, rate: now, relayed, questions, limits, memory, certificate_ends_in: expiry } = status;
  const amber = (limit) => (full.some((other) => other.limit === limit) ? "amber" : "");
  const each = (limit) => (limits[limit] ? `${count(limits[limit])} per peer` : "");
  const ways = ({ to_target, to_source }, unit) => `→ ${bytes(to_target)}${unit}\u2002← ${bytes(to_source)}${unit}`;
  // Rounded up, as in the log.
  const estimate = `${count(Math.ceil(memory.estimate / 2 ** 20))} MiB`;
  const all = [
    ["Circuits", of(circuits.count, limits["max-circuits"]), each("max-circuits-per-peer"), amber("max-circuits")],
    ["Connections", of(connections, limits["max-connections"]), each("max-connections-per-peer"), amber("max-connections")],
    ["Memory", memory.resident === null ? estimate : `${bytes(memory.resident)} of ${estimate}`, "estimated maximum under the limits"],
    ["Throughput", `${bytes(sum(now))}/s`, ways(now, "/s")],
    ["Relayed", bytes(sum(relayed)), ways(relayed, "")],
    ["Probes", count(questions.asked), `${count(questions.unanswered)} unanswered`],
  ];
  if (expiry !== null) {
    const left = expiry === 0 ? "expired" : expiry < 2 * 86400 ? time(expiry) : `${count(Math.floor(expiry / 86400))} days`;
    const kind = expiry === 0 ? "bad" : expiry < EXPIRES_SOON ? "amber" : "";
    all.push(["Certificate", left, expiry ? "until it expires" : "clients refuse it", kind]);
  }
  const list = find("#figures");
  while (list.children.length > all.length) list.lastChild.remove();
  all.forEach(([title, figure, detail, kind = ""], index) => {
    if (!list.children[index]) list.append(element("div", [element("dt"), element("dd", [element("span"), element("small")])]));
    const [head, { children: [main, small] }] = list.children[index].children;
    setText(head, title);
    setText(main, figure);
    setText(small, detail);
    main.className = kind;
  });
}

// A limit as its flag takes it, but rounded.
function limit(setting, value) {
  if (value === 0) return "no limit";
  if (["reservation-ttl", "circuit-duration"].includes(setting)) return time(value);
  if (setting === "bandwidth") return `${bytes(value)}/s`;
  return ["max-buffered", "circuit-bytes"].includes(setting) ? bytes(value) : count(value);
}

function showLimits() {
  const list = find("#limits dl");
  Object.entries(status.limits).forEach(([setting, value], index) => {
    if (!list.children[index]) list.append(element("div", [element("dt", element("code", `--${setting}`)), element("dd")]));
    setText(find("dd", list.children[index]), limit(setting, value));
  });
}

function showCount(section, list, found) {
  const some = list.count > list.listed.length ? `, ${count(list.listed.length)} listed` : "";
  const matching = found === undefined ? "" : `, ${count(found)} found`;
  setText(find(".count", section), list.count ? `${count(list.count)}${some}${matching}` : "");
}

function showHolders() {
  const wanted = find("#holders input").value.trim();
  const all = status.holders.listed;
  const found = all.filter(({ peer, address }) => peer.includes(wanted) || socket(address).includes(wanted));
  // Peers in grace first, then by peer id, so that rows keep their places.
  const order = (a, b) => a.state.localeCompare(b.state) || (a.peer < b.peer ? -1 : 1);
  holders.show(found.sort(order).map((holder) => [holder.peer, holder]));
  const empty = all.length ? "No peer matches." : "No peer holds a slot.";
  const invited = !all.length && status.reachable_at.length > 0;
  setText(find("#holders .none p"), invited ? `${empty} Clients reserve one at:` : empty);
  find("#holders .addresses").hidden = !invited;
  showAddresses(find("#holders .addresses"));
  showCount(find("#holders"), status.holders, wanted ? found.length : undefined);
}

find("#holders input").addEventListener("input", () => status && showHolders());

// The name or IP address of the first announced address.
const name = () => status?.announced[0]?.split("/")[2] ?? "relaylet";

function showAbout() {
  const parts = find("#about");
  if (!parts.children.length) parts.append(peer(status.peer), element("span"));
  setText(parts.children[1], `up for ${time(status.up_for)}`);
  setText(find("h1"), name());
  showAddresses(find("#addresses"));
  setText(find("#version"), `relaylet ${status.version}`);
}

function show(full) {
  find("main").hidden = false;
  showAbout();
  setText(find("#reached"), full.map(({ text }) => text).join(" "));
  find("#reached").hidden = full.length === 0;
  const { live, grace, free, total } = status.slots;
  [live, grace, free].forEach((n, index) => setText(find("dd span", find("#counts").children[index]), count(n)));
  setText(find("#counts small"), `of ${count(total)}`);
  draw();
  showFigures(full);
  showHolders();
  const byCarried = (a, b) => sum(b.carried) - sum(a.carried);
  circuits.show(status.circuits.listed.sort(byCarried).map((circuit) => [circuit.id, circuit]));
  showCount(find("#circuits"), status.circuits);
  showTallies(find("#refused"), status.refused);
  showTallies(find("#freed"), status.freed);
  latest.show(status.latest_refusals.map((refusal) => [refusal.number, refusal]));
  showLimits();
}

function showState(kind, text) {
  const pill = find("#state");
  pill.className = kind;
  document.body.classList.toggle("silent", kind === "silent");
  setText(pill, text);
  const own = name() === "relaylet" ? "relaylet" : `${name()} · relaylet`;
  document.title = kind ? `${text}: ${own}` : own;
}

let answeredAt = Date.now();

async function refresh() {
  try {
    const signal = AbortSignal.timeout(TIMEOUT);
    const answer = await fetch("status.json", { cache: "no-store", signal });
    if (!answer.ok) throw new Error(answer.statusText);
    status = await answer.json();
    answeredAt = Date.now();
  } catch {
    showState("silent", `no answer for ${time(Math.round((Date.now() - answeredAt) / 1000))}`);
    return;
  }
  const full = reachedLimits();
  const kind = status.not_serving ? "draining" : full.length ? "full" : "";
  showState(kind, status.not_serving || kind || "serving");
  show(full);
}

// Ends the wait for the next refresh.
let wake;
document.addEventListener("visibilitychange", () => wake?.());

async function run() {
  for (;;) {
    if (!document.hidden) await refresh();
    await new Promise((resolve) => {
      wake = resolve;
      setTimeout(resolve, INTERVAL);
    });
  }
}

run();
