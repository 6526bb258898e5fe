"use strict";

// The page is a view of /api/v1/watch: a snapshot first, then whatever changes. All text gets into the document as
// text (textContent), never as markup: names come from machines that anybody may have plugged in.

const MOST_ROWS = 1000; // of hosts in the document; the filter finds the others
const DENSE = 30; // from how many hosts on they get less room each, and a frame to scroll in

const LOOKS = { // of a host's state: colour class, sign
  healthy: ["good", "✔"], booted: ["good", "✔"], unhealthy: ["bad", "✖"], failed: ["bad", "✖"], lost: ["bad", "?"], "rolled-back": ["bad", "↶"], booting: ["busy", "▲"],
  staging: ["busy", "▼"], rebooting: ["busy", "↻"], waiting: ["wait", "…"], absent: ["none", "○"], unclaimed: ["new", "+"],
};
const ORDER = ["healthy", "booted", "unhealthy", "failed", "rolled-back", "lost", "waiting", "booting", "staging", "rebooting", "absent", "unclaimed"];
const PHASES = { done: ["good", "✔"], running: ["busy", "▲"], queued: ["wait", "…"], failed: ["bad", "✖"] };

const STAGE_LOOK = { // of a boot's stage: whose time it took to get there
  "dhcp-offer": "s1", "tftp": "s1", "script": "s1", "kernel": "s2", "agent-up": "s2", "wait": "s3", "cache": "s3", "fetch": "s4",
  "mount": "s3", "switch-root": "s3", "service": "s5", "disk": "s2", "booted": "s6", "healthy": "s6", "stage": "s4", "reboot": "s3", "stay": "s6", "failed": "fail",
};
const LEGEND = [["s1", "firmware and boot loader"], ["s2", "kernel"], ["s3", "agent"], ["s4", "fetching images"], ["s5", "operating system"], ["s6", "checks"]];

const state = { status: null, hosts: new Map(), images: new Map(), events: [], offset: 0, filter: "", only: "", loaded: false };
const host = location.pathname.startsWith("/hosts/") ? decodeURIComponent(location.pathname.slice("/hosts/".length)) : "";
const byId = (id) => document.getElementById(id);

// --- building blocks -------------------------------------------------------------------------------------------------

// el makes an element. What is no element among its children becomes text.
function el(tag, attrs, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attrs || {})) {
    if (v === null || v === undefined || v === false) continue;
    if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else e.setAttribute(k, v === true ? "" : v);
  }
  for (const c of children.flat(Infinity)) {
    if (c !== null && c !== undefined && c !== "") e.append(c instanceof Node ? c : plain(c));
  }
  return e;
}

// plain shows control characters, and those that turn the direction of writing, for what they are.
const plain = (s) => String(s).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");

// morph makes `old` look like `fresh` with as few changes as there are: focus, selection, scrolling and what the person
// opened stay as they are.
function morph(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName || key(old) !== key(fresh)) {
    old.replaceWith(fresh);
    return;
  }
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  morphAttributes(old, fresh);
  if (old.tagName === "INPUT") return;
  morphChildren(old, fresh);
}

function morphAttributes(old, fresh) {
  for (const a of [...old.attributes]) {
    if (!fresh.hasAttribute(a.name) && a.name !== "open" && a.name !== "style") old.removeAttribute(a.name);
  }
  for (const a of fresh.attributes) {
    if (a.name !== "open" && a.name !== "style" && old.getAttribute(a.name) !== a.value) old.setAttribute(a.name, a.value);
  }
  if (fresh.style.cssText !== old.style.cssText) old.style.cssText = fresh.style.cssText;
}

function morphChildren(old, fresh) {
  const keyed = new Map();
  for (const c of old.childNodes) if (key(c)) keyed.set(key(c), c);
  let at = old.firstChild;
  for (const f of [...fresh.childNodes]) {
    const same = key(f) && keyed.get(key(f));
    if (same && same !== at) old.insertBefore(same, at);
    else if (!same && (!at || key(at))) { old.insertBefore(f, at); continue; }
    const target = same || at;
    at = target.nextSibling;
    morph(target, f);
  }
  while (at) { const next = at.nextSibling; at.remove(); at = next; }
}

const key = (n) => (n.dataset ? n.dataset.key || "" : "");

function render(parent, ...children) {
  const fresh = parent.cloneNode(false);
  fresh.append(...children.filter(Boolean));
  morphChildren(parent, fresh);
}

const now = () => Date.now() + state.offset;
const since = (t) => (t ? (now() - Date.parse(t)) / 1000 : NaN);

function duration(s) {
  if (!(s >= 0)) return "";
  if (s < 0.95) return Math.round(s * 1000) + " ms";
  if (s < 99.95) return s.toFixed(1) + " s";
  if (s < 3600) return Math.floor(s / 60) + " min " + (s < 600 ? Math.floor(s % 60) + " s" : "");
  if (s < 86400) return Math.floor(s / 3600) + " h " + Math.floor((s % 3600) / 60) + " min";
  return Math.floor(s / 86400) + " d " + Math.floor((s % 86400) / 3600) + " h";
}

function coarse(s) {
  if (!(s >= 0)) s = 0;
  if (s < 60) return Math.floor(s) + " s";
  if (s < 3600) return Math.floor(s / 60) + " min";
  if (s < 172800) return Math.floor(s / 3600) + " h";
  return Math.floor(s / 86400) + " days";
}

// ago shows how long ago t was, and goes on counting.
function ago(t, words) {
  if (!t) return el("span", { class: "dim" }, "–");
  return el("time", { datetime: t, title: new Date(t).toLocaleString(), "data-ago": words || "ago" }, agoText(t, words || "ago"));
}
const agoText = (t, words) => coarse(since(t)) + (words === "for" ? "" : " ago");

setInterval(() => {
  for (const t of document.querySelectorAll("time[data-ago]")) {
    const text = agoText(t.getAttribute("datetime"), t.dataset.ago);
    if (t.textContent !== text) t.textContent = text;
  }
}, 1000);

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  for (; n >= 999.5 && i < units.length - 1; i++) n /= 1024;
  return (i === 0 || n >= 99.95 ? Math.round(n) : n.toPrecision(3).replace(/\.?0+$/, "")) + " " + units[i];
}

const short = (digest) => (digest || "").replace("sha256:", "").slice(0, 12);
const mono = (text, title) => el("code", { title: title || null }, text);

function pill(word, looks) {
  const [look, sign] = looks[word] || ["none", "•"];
  return el("span", { class: "pill " + look, "data-state": word }, el("i", { "aria-hidden": "true" }, sign), word);
}

function card(title, extra, ...body) {
  return el("section", { class: "card", "data-key": title }, el("div", { class: "head" }, el("h2", null, title), extra), body);
}

function heading(title, n) {
  return el("h2", null, title, " ", el("span", { class: "dim num" }, n));
}

const commitText = (c) => [mono(c.hash.slice(0, 10), c.hash), " ", c.subject];

function copyButton(text) {
  return el("button", { class: "copy", type: "button", "data-copy": text }, "Copy");
}

document.addEventListener("click", async (ev) => {
  const b = ev.target.closest("button[data-copy]");
  if (!b) return;
  const done = await copy(b.dataset.copy).catch(() => false);
  b.textContent = done ? "Copied" : "Select and copy by hand";
  setTimeout(() => { b.textContent = "Copy"; }, 2000);
});

// copy works on plain HTTP, too, where browsers have no clipboard object.
async function copy(text) {
  if (navigator.clipboard) { await navigator.clipboard.writeText(text); return true; }
  const area = el("textarea", { readonly: true });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

// --- the fleet -------------------------------------------------------------------------------------------------------

function showSource() {
  const st = state.status;
  const parts = [el("span", { class: "mono" }, st.repo || "no repo", st.branch ? el("span", { class: "dim" }, " @ " + st.branch) : "")];
  if (st.applied) {
    parts.push(el("span", null, el("span", { class: "dim" }, "in force "), commitText(st.applied), " ",
      el("span", { class: "dim small" }, "by " + st.applied.author + ", since ", ago(st.appliedAt, "for"))));
  } else {
    parts.push(el("span", { class: "wait" }, "no commit is in force yet"));
  }
  render(byId("source"), ...parts);
}

function showTrouble() {
  const st = state.status;
  const cards = [];
  if (st.fetchError) {
    cards.push(el("section", { class: "card alarm", "data-key": "fetch" }, el("div", { class: "head" }, el("h2", null, "The repo cannot be followed")),
      el("div", { class: "body" }, el("code", null, st.fetchError), el("p", { class: "dim small" }, "It last answered ", ago(st.fetched), ". The fleet stays as it is."))));
  }
  if (st.problems && st.problems.length) {
    const c = st.attempted || st.applied;
    cards.push(el("section", { class: "card alarm", id: "problems", "data-key": "problems" },
      el("div", { class: "head" }, el("h2", null, "Commit ", c ? commitText(c) : "", " is not in force: " + st.problems.length + (st.problems.length === 1 ? " problem" : " problems")),
        c ? el("span", { class: "small" }, "by " + c.author + ", ", ago(c.time)) : null),
      el("div", { class: "body" }, el("ul", { class: "problems" }, st.problems.map((p) =>
        el("li", null, p.file ? el("span", { class: "at" }, [p.file, p.line, p.column].filter(Boolean).join(":")) : null, p.message))),
      el("p", { class: "dim small" }, "The fleet stays as the commit in force says."))));
  }
  return cards;
}

function showTiles() {
  const st = state.status, n = st.hosts.byState || {};
  const tile = (name, count, look, label) => el("button", {
    class: "tile " + look, type: "button", "data-key": "tile " + name, "data-only": name, "aria-pressed": String(state.only === name),
  }, el("b", null, count), el("span", null, label));
  const bad = (st.problems && st.problems.length) || st.fetchError || ORDER.some((s) => n[s] && LOOKS[s][0] === "bad") || st.builds.failed;
  const look = st.converged ? "good" : bad ? "bad" : "busy";
  const verdict = el("div", { class: "verdict " + look, id: "verdict", "data-key": "verdict" },
    el("b", null, st.converged ? "✔ Converged" : bad ? "✖ Not converged" : "▲ Converging"),
    st.hosts.total ? el("span", { class: "small" + (st.hosts.serving === st.hosts.total ? " good" : ""), id: "serving" }, servingText(st.hosts)) : null,
    st.converged ? el("span", { class: "small" }, "Every host runs what the newest commit says.")
      : el("ul", null, (st.waiting || []).map((w) => el("li", null, w))));
  return el("div", { class: "summary", "data-key": "tiles" }, verdict, el("div", { class: "tiles" }, tile("", st.hosts.total + (st.hosts.unclaimed || 0), "all", "all"),
    ORDER.filter((s) => n[s]).map((s) => tile(s, n[s], LOOKS[s][0], s))));
}

// servingText says how many hosts do their work, whatever they shall run next.
function servingText(n) {
  const old = n.serving - n.healthy;
  return n.serving + " of " + n.total + " healthy" + (old > 0 ? ", " + old + " not yet at " + (old === 1 ? "its" : "their") + " release" : "");
}

document.addEventListener("click", (ev) => {
  const t = ev.target.closest("button[data-only]");
  if (!t) return;
  state.only = state.only === t.dataset.only ? "" : t.dataset.only;
  draw();
});
document.addEventListener("input", (ev) => {
  if (ev.target.id !== "filter") return;
  state.filter = ev.target.value.trim().toLowerCase();
  draw();
});

function wanted(h) {
  if (state.only && h.state !== state.only) return false;
  if (!state.filter) return true;
  const text = [h.name, h.mac, h.address, h.role, h.runningRole, h.state, h.detail, h.running, h.target, ...Object.entries(h.labels || {}).map((kv) => kv.join("="))].join(" ").toLowerCase();
  return state.filter.split(/\s+/).every((w) => text.includes(w));
}

const hostKey = (h) => h.name || h.mac;
const collate = new Intl.Collator("en", { numeric: true }).compare;

function showHosts() {
  const declared = [...state.hosts.values()].filter((h) => h.name).sort((a, b) => collate(a.name, b.name));
  const rows = declared.filter(wanted);
  const search = el("input", { type: "search", id: "filter", placeholder: "Filter: name, role, state, label…", "aria-label": "Filter hosts" });
  const shown = rows.length === declared.length ? declared.length : rows.length + " of " + declared.length;
  const body = !declared.length ? el("p", { class: "empty" }, "The fleet declares no host yet.")
    : !rows.length ? el("p", { class: "empty" }, "No declared host matches.")
      : el("div", { class: "scroll" + (rows.length > DENSE ? " dense" : "") }, el("table", { class: "cards", id: "hosts" },
        el("thead", null, el("tr", null, ["Host", "Role", "State", "Generation", "Release", "Uptime", "Last seen"].map((t) => el("th", null, t)))),
        el("tbody", null, rows.slice(0, MOST_ROWS).map(hostRow))));
  return el("section", { class: "card", "data-key": "Hosts" }, el("div", { class: "head" }, heading("Hosts", shown), search), body,
    rows.length > MOST_ROWS ? el("p", { class: "note" }, "and " + (rows.length - MOST_ROWS) + " more: use the filter") : null);
}

function hostRow(h) {
  const bad = ["unhealthy", "failed", "rolled-back", "lost"].includes(h.state);
  const up = h.booted && h.running && h.state !== "lost" ? ago(h.booted, "for") : "";
  return el("tr", { "data-key": "host " + h.name, "data-host": h.name },
    el("td", { class: "name" }, el("a", { href: "/hosts/" + encodeURIComponent(h.name) }, h.name), el("span", { class: "small dim mono" }, h.address || h.mac || "")),
    el("td", { "data-label": "role" }, roleOf(h)),
    el("td", { class: "wide" }, stateOf(h), servesOld(h) ? el("span", { class: "small good" }, " healthy, not yet at its release") : null, h.detail ? el("span", { class: "detail" + (bad ? " bad" : "") }, h.detail) : null,
      h.state !== "lost" && h.fetch && h.fetch.total > 0 && h.running !== h.target ? meter(h.fetch.done / h.fetch.total) : null),
    el("td", { class: "num nowrap" + (h.generation ? "" : " blank"), "data-label": "generation" }, fromTo(h.runningGeneration, h.generation)),
    el("td", { class: "nowrap" + (h.target || h.running ? "" : " blank"), "data-label": "release" }, releaseOf(h)),
    el("td", { class: "num nowrap" + (up ? "" : " blank"), "data-label": "uptime" }, up),
    el("td", { class: "num nowrap", "data-label": "last seen" }, h.lastSeen ? ago(h.lastSeen) : el("span", { class: "dim" }, "never")));
}

const servesOld = (h) => h.healthy && h.running && h.name && !["healthy", "booted", "lost"].includes(h.state) && h.stage !== "reboot";
const stateOf = (h) => pill(h.state, LOOKS);
const roleOf = (h) => (h.runningRole && h.runningRole !== h.role ? [h.runningRole, arrow(), h.role] : h.role || h.runningRole || "");
const arrow = () => el("span", { class: "arrow", title: "shall become" }, "→");

function fromTo(running, target) {
  if (!target) return running || "";
  return running && running !== target ? [String(running), arrow(), String(target)] : String(target);
}

function releaseOf(h) {
  if (h.running && h.target && h.running !== h.target) return [mono(short(h.running), h.running), arrow(), mono(short(h.target), h.target)];
  if (h.running) return mono(short(h.running), h.running);
  return h.target ? [arrow(), mono(short(h.target), h.target)] : "";
}

function meter(part) {
  const fill = el("span");
  fill.style.width = Math.min(100, 100 * part).toFixed(1) + "%";
  return el("span", { class: "meter", role: "img", "aria-label": Math.floor(100 * part) + " percent" }, fill);
}

function showUnclaimed() {
  const all = [...state.hosts.values()].filter((h) => !h.name && wanted(h)).sort((a, b) => collate(a.mac, b.mac));
  if (!all.length) return null;
  return card("Unclaimed machines", el("span", { class: "dim small" }, "Paste an entry into the fleet's repo, choose its role, and push."),
    el("div", { class: "machines", id: "unclaimed" }, all.map((h) => el("div", { class: "machine", "data-key": "machine " + h.mac, "data-mac": h.mac },
      el("div", { class: "row" }, el("span", null, el("a", { href: "/hosts/" + encodeURIComponent(h.mac), class: "mono" }, h.mac), " ", stateOf(h)),
        el("span", { class: "dim small" }, "seen ", ago(h.lastSeen))),
      h.detail ? el("span", { class: "detail" }, h.detail) : null,
      inventory(h.inventory),
      h.entry ? el("div", { class: "row" }, el("span", { class: "dim small" }, "Host entry"), copyButton(h.entry)) : null,
      h.entry ? el("pre", null, h.entry.split("\n").filter((l) => !l.startsWith("//")).join("\n").trim()) : null))));
}

function inventory(inv) {
  if (!inv) return el("span", { class: "dim small" }, "Its inventory is not known yet.");
  const s = inv.smbios || {}, cpu = inv.cpu || {};
  return el("ul", null,
    s.vendor || s.product ? el("li", null, [s.vendor, s.product].filter(Boolean).join(" "), s.serial ? ", serial " + s.serial : "") : null,
    el("li", null, (cpu.sockets || 1) + " × " + (cpu.model || cpu.arch || "CPU") + ", " + cpu.threads + " threads, " + bytes(inv.memory || 0) + ", " + inv.firmware),
    (inv.disks || []).map((d) => el("li", null, d.name + ": " + bytes(d.size), d.model ? ", " + d.model : "", d.holds === "blank" ? ", blank" : d.holds ? ", holds " + d.holds : "")),
    (inv.nics || []).map((n) => el("li", null, n.name + ": ", mono(n.mac), n.driver ? ", " + n.driver : "", n.speed ? ", " + n.speed + " Mbit/s" : "", n.up ? "" : ", no link")));
}

function showImages() {
  const all = [...state.images.values()].filter((i) => i.declared || i.used || i.phase === "running");
  const rank = (i) => ["running", "failed", "queued", "done"].indexOf(i.phase);
  all.sort((a, b) => rank(a) - rank(b) || collate(b.started || "", a.started || "") || collate(a.kind, b.kind) || collate(a.name, b.name));
  if (!all.length) return card("Builds", null, el("p", { class: "empty" }, "Nothing was built yet."));
  return card("Builds", null, el("div", { class: "scroll" }, el("table", { class: "cards", id: "images" },
    el("thead", null, el("tr", null, ["Image", "State", "Size", "Took", "When"].map((t) => el("th", null, t)))),
    el("tbody", null, all.map(imageRow)))));
}

function imageRow(i) {
  const took = i.started && i.finished && i.phase !== "running" ? Math.abs(Date.parse(i.finished) - Date.parse(i.started)) / 1000 : NaN;
  const log = "/api/v1/builds/" + encodeURIComponent(i.recipe) + "/log";
  return el("tr", { "data-key": "image " + i.recipe },
    el("td", { class: "name" }, el("b", null, i.name), el("span", { class: "small dim" }, { base: "OS base", delta: "role delta", disk: "disk image" }[i.kind] ?? i.kind, " ", mono(short(i.recipe), i.recipe))),
    el("td", { class: "wide" }, pill(i.phase, PHASES), " ", i.phase === "queued" ? null : el("a", { href: log, class: "small" }, "log"),
      i.step && i.phase !== "done" ? el("span", { class: "detail" + (i.phase === "failed" ? " bad" : "") }, i.step + (i.error ? ": " + i.error : "")) : null,
      i.phase === "failed" && i.retry ? el("span", { class: "detail" }, "tried " + i.attempts + " times; again at " + new Date(i.retry).toLocaleTimeString()) : null,
      i.phase === "failed" && (i.tail || []).length ? el("details", { open: true }, el("summary", { class: "tail" }, "last lines"), el("pre", null, i.tail.join("\n"))) : null),
    el("td", { class: "num nowrap" + (i.size ? "" : " blank"), "data-label": "size" }, i.size ? bytes(i.size) : ""),
    el("td", { class: "num nowrap" + (took >= 0 ? "" : " blank"), "data-label": "took" }, duration(took)),
    el("td", { class: "num nowrap" + (i.started ? "" : " blank"), "data-label": "when" }, i.started ? ago(i.finished || i.started) : ""));
}

function showEvents(subject) {
  const list = subject ? state.events.filter((e) => e.subject === subject) : state.events;
  return card("Events", null, !list.length ? el("p", { class: "empty" }, "Nothing happened yet.")
    : el("ul", { class: "events" }, list.map((e) => el("li", { "data-key": "event " + e.time + e.subject + e.message },
      el("span", { class: "dim small nowrap" }, ago(e.time)),
      el("span", { class: "what" + (e.warning ? " warn" : "") }, e.warning ? "⚠ " : "", el("b", null, eventSubject(e)), e.message)))));
}

function eventSubject(e) {
  return state.hosts.has(e.subject) ? el("a", { href: "/hosts/" + encodeURIComponent(e.subject) }, e.subject) : e.subject;
}

function drawFleet() {
  document.title = (state.status.converged ? "✔ " : "") + state.status.hosts.serving + "/" + state.status.hosts.total + " · troupe";
  render(byId("main"), ...showTrouble(), showTiles(), showUnclaimedFirst(), showHosts(), showUnclaimedLast(),
    el("div", { class: "two", "data-key": "two" }, showImages(), showEvents()));
}

// An empty fleet is one whose machines wait to be claimed: they come first there.
const declaresSome = () => state.status.hosts.total > 0;
const showUnclaimedFirst = () => (declaresSome() && state.only !== "unclaimed" ? null : showUnclaimed());
const showUnclaimedLast = () => (declaresSome() && state.only !== "unclaimed" ? showUnclaimed() : null);

// --- one host --------------------------------------------------------------------------------------------------------

let detail = null, detailError = "", detailAgain = false, detailBusy = false;

async function loadDetail() {
  if (detailBusy) { detailAgain = true; return; }
  detailBusy = true;
  try {
    const r = await fetch("/api/v1/hosts/" + encodeURIComponent(host), { cache: "no-store" });
    const body = await r.json();
    detailError = r.ok ? "" : body.error || r.statusText;
    detail = r.ok ? body : null;
  } catch { // the banner says that the server is gone
  }
  detailBusy = false;
  draw();
  if (detailAgain) { detailAgain = false; setTimeout(loadDetail, 300); }
}

function drawHost() {
  document.title = host + " · troupe";
  if (detailError) return render(byId("main"), el("p", { class: "note" }, detailError), el("a", { href: "/" }, "All hosts"));
  if (!detail) return render(byId("main"), el("p", { class: "note" }, "Loading…"));
  const d = detail, bad = ["unhealthy", "failed", "rolled-back", "lost"].includes(d.state);
  render(byId("main"),
    el("div", { class: "title", "data-key": "title" }, el("a", { href: "/" }, "← all hosts"), el("h1", null, d.name || d.mac), stateOf(d),
      d.detail ? el("span", { class: bad ? "bad" : "dim" }, d.detail) : null),
    card("Now", null, el("div", { class: "body" }, facts(d))),
    card("Boots", el("span", { class: "legend" }, LEGEND.map(([look, text]) => el("span", null, el("i", { class: "dot " + look }), text))), boots(d)),
    d.entry ? card("Host entry", copyButton(d.entry), el("div", { class: "body" }, el("pre", null, d.entry.trim()))) : null,
    el("div", { class: "two", "data-key": "two" },
      card("Machine", null, el("div", { class: "body machine" }, inventory(d.inventory || (d.machine || {}).inventory))), showEvents(d.name || d.mac)));
}

function facts(d) {
  const fact = (name, ...value) => (value.flat().some((v) => v !== "" && v !== null && v !== undefined) ? el("div", null, el("dt", null, name), el("dd", null, value)) : null);
  return el("dl", { class: "facts" },
    fact("Role", roleOf(d)), fact("Generation", fromTo(d.runningGeneration, d.generation)), fact("Release", releaseOf(d)),
    fact("Last change", d.why, d.since ? [" (", d.commit ? mono(d.commit.slice(0, 10), d.commit) : "", " ", ago(d.since), ")"] : ""),
    fact("Address", d.address), fact("MAC", d.mac ? mono(d.mac) : ""), fact("UUID", d.uuid ? mono(d.uuid) : ""), fact("Serial", d.serial),
    fact("Up for", d.running && d.booted && d.state !== "lost" ? ago(d.booted, "for") : ""), fact("Last seen", d.lastSeen ? ago(d.lastSeen) : "never"), fact("Stage", d.stage),
    fact("Failing checks", (d.failing || []).map((f) => el("div", { class: "bad" }, f))), fact("Error", d.error ? el("span", { class: "bad" }, d.error) : ""),
    fact("Labels", Object.entries(d.labels || {}).map(([k, v]) => el("div", { class: "mono" }, k + "=" + v))));
}

function boots(d) {
  if (!d.boots.length) return el("p", { class: "empty" }, "It never booted from here.");
  return d.boots.map((b, i) => bootPanel(b, i === 0, i === 0 && !b.healthy && ["booting", "rebooting", "waiting"].includes(d.state)));
}

function bootPanel(b, newest, going) {
  const outcome = b.healthy ? el("span", { class: "good" }, "healthy after " + duration(b.took / 1e9))
    : b.error ? el("span", { class: "bad" }, b.error)
      : going ? el("span", { class: "busy" }, "under way") : el("span", { class: "wait" }, "did not become healthy");
  return el("details", { class: "boot", open: newest, "data-key": "boot " + b.id },
    el("summary", null, el("span", { class: "line" }, el("b", null, new Date(b.started).toLocaleString()), el("span", { class: "dim" }, ago(b.started)), outcome,
      el("span", { class: "dim" }, b.bytes ? bytes(b.bytes) + " of images fetched" : b.healthy ? "no image byte fetched" : "")),
    bootBar(b, going)),
    el("div", { class: "scroll marks" }, el("table", null,
      el("thead", null, el("tr", null, el("th", null, "Stage"), el("th", { class: "right" }, "At"), el("th", { class: "right" }, "Took"), el("th", { class: "right" }, "Bytes"), el("th", { class: "rest" }, "Details"))),
      el("tbody", null, b.marks.map((m) => el("tr", null,
        el("td", { class: "nowrap" }, el("i", { class: "dot " + lookOf(m) }), m.stage),
        el("td", { class: "right num nowrap" }, m.later ? new Date(m.time).toLocaleString() : duration(m.at / 1e9)),
        el("td", { class: "right num nowrap" }, m.later ? "" : "+" + duration(m.took / 1e9)),
        el("td", { class: "right num nowrap" }, m.bytes ? bytes(m.bytes) : ""),
        el("td", null, withoutQuery(m.detail || ""), m.error ? el("span", { class: "bad" }, (m.detail ? " " : "") + m.error) : "")))))));
}

const lookOf = (m) => (m.error ? "fail" : STAGE_LOOK[m.stage] || "s3");

// withoutQuery cuts the queries off the URLs in a text: what a machine says of itself there stands elsewhere already.
const withoutQuery = (s) => s.replace(/(https?:\/\/[^\s?]*)\?[^\s,;)]*/g, "$1");

// bootBar draws a boot, each on a scale of its own. What came after it was healthy is no part of it.
function bootBar(b, going) {
  const marks = b.marks.filter((m) => !m.later);
  const end = marks.length ? marks[marks.length - 1].at : 0;
  const fill = el("span", { class: "barfill" });
  fill.style.width = (end ? (going ? 85 : 100) : 0.5) + "%";
  for (const m of marks) {
    if (m.took <= 0 && m.stage !== "failed") continue;
    const share = end ? m.took / end : 1;
    const s = el("span", { class: "seg " + lookOf(m), title: m.stage + ": +" + duration(m.took / 1e9) }, share > 0.075 ? m.stage + " " + duration(m.took / 1e9) : "");
    s.style.flexGrow = String(Math.max(m.took, 1));
    s.style.flexBasis = "0";
    fill.append(s);
  }
  const track = el("span", { class: "bartrack", role: "img", "aria-label": marks.map((m) => m.stage + " at " + duration(m.at / 1e9)).join(", ") }, fill);
  if (going) track.classList.add("open");
  return track;
}

// --- the connection --------------------------------------------------------------------------------------------------

let drawing = false;
function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    if (!state.loaded) return;
    showSource();
    if (host) drawHost(); else drawFleet();
    render(byId("foot"), el("span", null, "troupe " + state.status.version), el("a", { href: "/api/v1/openapi.json" }, "API"), el("a", { href: "/metrics" }, "metrics"));
  });
}

function take(name, data) {
  const c = JSON.parse(data)[name];
  switch (name) {
    case "snapshot":
      state.hosts = new Map(c.hosts.map((h) => [hostKey(h), h]));
      state.images = new Map(c.images.map((i) => [i.recipe, i]));
      state.events = c.events;
      setStatus(c.status);
      state.loaded = true;
      break;
    case "status": setStatus(c); break;
    case "host": state.hosts.set(hostKey(c), c); break;
    case "gone": state.hosts.delete(c); break;
    case "image": state.images.set(c.recipe, c); break;
    case "goneImage": state.images.delete(c); break;
    case "event": state.events = [c, ...state.events].slice(0, 100); break;
  }
  if (host && (name === "snapshot" || (name === "host" && hostKey(c) === hostKey(detail || { name: host })))) loadDetail();
  draw();
}

function setStatus(st) {
  state.status = st;
  state.offset = Date.parse(st.time) - Date.now(); // the server's clock counts
}

let lostAt = 0;
function connect() {
  const source = new EventSource("/api/v1/watch");
  for (const name of ["snapshot", "status", "host", "gone", "image", "goneImage", "event"]) {
    source.addEventListener(name, (ev) => { online(); take(name, ev.data); });
  }
  source.onopen = online;
  source.onerror = () => {
    offline();
    source.close();
    setTimeout(connect, 1500);
  };
}

function online() {
  lostAt = 0;
  byId("offline").hidden = true;
  byId("link").className = "link live";
  byId("link").textContent = "live";
}

function offline() {
  lostAt = lostAt || Date.now();
  byId("link").className = "link gone";
  byId("link").textContent = "no connection";
  byId("offline").hidden = false;
  byId("offline").textContent = "The server has not answered since " + new Date(lostAt).toLocaleTimeString() + ". Trying again; what is shown may be old.";
}

connect();
