"use strict";
// The reviewers' page: what it shows; act.js follows. Every text of a record reaches the screen as a text node or an attribute, never as
// markup; the policy of the page (trusted types) forbids the other way.

const start = JSON.parse(document.body.dataset.start);
const token = document.querySelector("meta[name=token]").content;
const $ = (id) => document.getElementById(id);
const FILTERS = { dataset: "Data set", modality: "Modality", task: "Task", label: "Label", split: "Split", check: "Quality check" };
const STATES = { open: "not decided yet", accept: "accepted", correct: "corrected", reject: "rejected", disagree: "reviewers disagree", void: "counts no more" };
const ROLES = { required: "requires", supportive: "is supported by", excluded: "excludes" };
const KEYS = [["A", "accept"], ["C", "correct"], ["R", "reject, with a reason: then 1 to 8 and Enter"], ["→ or N", "next"], ["← or P", "previous"], ["U", "undo the last decision"], ["Z", "closer, or a click into the image"], ["B", "boxes on and off"], ["S", "sources of the knowledge"], ["F", "filter"], ["Esc", "close, without saving"]];
let now = null; // what the server said of the case on the screen
let busy = false;

function make(tag, attributes, ...children) {
  const svg = ["svg", "rect", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  const shown = children.flat().filter((child) => child !== null && child !== undefined && child !== "");
  node.append(...shown.map((child) => (typeof child === "string" ? plain(child) : child)));
  return node;
}

function plain(text) { // without what controls or turns the text around it
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");
}

function option(words, value) {
  return make("option", { value }, words);
}

function tell(text, bad) {
  const told = $("told");
  told.textContent = plain(text);
  told.className = text ? (bad ? "shown bad" : "shown") : "";
  clearTimeout(tell.timer);
  if (!bad) tell.timer = setTimeout(() => { told.className = ""; }, 4000);
}

// ---- asking the server ----

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", body: JSON.stringify(body),
    headers: { "Content-Type": "application/json", "X-Review-Token": token },
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    throw new Error("The review command does not answer. Is it still running?");
  }
  const found = await answer.json();
  if (found.error) throw new Error(found.error);
  return found;
}

async function alone(work) { // one thing at a time: a key held down must not decide twice
  if (busy) return;
  busy = true;
  try {
    await work();
  } catch (error) {
    tell(error.message, true);
  } finally {
    busy = false;
  }
}

function filters() {
  const chosen = new URLSearchParams();
  for (const select of $("filters").querySelectorAll("select")) {
    if (select.value) chosen.set(select.name, select.value);
  }
  return chosen;
}

async function go(row, move, besides) {
  const query = filters();
  for (const [name, value] of Object.entries(besides || {})) query.set(name, value);
  query.set("row", row);
  query.set("move", move);
  const found = await ask(`/case?${query}`);
  if (found.row === null) {
    if (now && now.row !== null && found.matching) {
      tell(move > 0 ? "This is the last one." : "This is the first one.");
      progress(found);
      return false;
    }
    now = found;
    show();
    return false;
  }
  now = found;
  history.replaceState(null, "", `/#${found.row}`); // without the key
  show();
  return true;
}

// ---- what is on the screen ----

function progress(found) {
  const counts = found.progress;
  const total = counts.open + counts.accept + counts.correct + counts.reject;
  const done = total - counts.open;
  for (const name of ["accept", "correct", "reject"]) {
    $("progress").querySelector(`.${name}`).style.width = `${total ? (100 * counts[name]) / total : 0}%`;
  }
  const words = `${done.toLocaleString("en")} of ${total.toLocaleString("en")} decided`;
  $("progress").setAttribute("aria-label", `${words}: ${counts.accept} accepted, ${counts.correct} corrected, ${counts.reject} rejected`);
  $("count").textContent = words;
  const set = [...filters()].length;
  $("filtered").textContent = set ? `${set} · ${found.matching.toLocaleString("en")}` : "";
}

function pieces(found) {
  return found.map(([text, kind, why]) => (kind ? make("mark", { class: kind, title: why }, text) : text));
}

function verdict(kind, text, lines) {
  return make("div", { class: `verdict ${kind}` }, text, lines && lines.length ? make("ul", null, lines.map((line) => make("li", null, make("bdi", null, line)))) : null);
}

const WORDS = { accept: "accepted", correct: "corrected", reject: "rejected" };

function decision(one, who) {
  const when = one.time.replace("T", " ").replace("Z", " UTC");
  const reason = one.reason ? `: ${one.reason}` : "";
  const kind = one.void ? "warn" : one.outcome === "reject" ? "bad" : one.outcome === "correct" ? "warn" : "";
  const lines = one.void ? [`This counts no more: ${one.void}.`] : [];
  if (one.outcome === "correct") lines.push(one.think, `Answer: ${one.answer}`);
  const node = verdict(kind, `${who} ${WORDS[one.outcome]} this${reason} (${when})`, lines);
  node.classList.add("decided");
  return node;
}

function picture(row) { // no larger than the screen shows it
  const side = Math.ceil((Math.min(innerWidth, 900) * Math.min(devicePixelRatio || 1, 3)) / 256) * 256;
  return `/picture?row=${row}&side=${side}`;
}

function sight(shown) {
  const image = make("img", { alt: `${shown.modality} image`, src: picture(now.row), draggable: "false" });
  const inner = make("div", null, image);
  const frame = make("div", { class: "frame", title: "Click to look closer" }, inner);
  const drawn = [...shown.boxes.map((box) => [...box, ""]), ...(shown.trace.said || []).map((box) => [...box, " claimed"])];
  if (drawn.length) {
    inner.append(make("svg", { viewBox: "0 0 999 999", preserveAspectRatio: "none", "aria-hidden": "true" }, drawn.flatMap(([name, x1, y1, x2, y2, claimed]) => {
      const place = { x: x1, y: y1, width: x2 - x1, height: y2 - y1, "data-finding": name };
      return [make("rect", { ...place, class: "under" }), make("rect", { ...place, class: `f${(shown.colours[name] ?? 4) % 6}${claimed}` })];
    })));
  }
  image.addEventListener("load", () => {
    if (now.next !== null) new Image().src = picture(now.next); // so that the server has it ready
  }, { once: true });
  image.addEventListener("load", () => frame.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight));
  image.addEventListener("error", async () => {
    let text = "The picture can not be shown.";
    try { text = (await (await fetch(image.src)).json()).error || text; } catch (error) { /* the text above says it */ }
    frame.replaceWith(make("p", { class: "broken" }, text));
  });
  frame.addEventListener("click", (event) => closer(event));
  frame.addEventListener("mousemove", (event) => aim(event));
  const count = shown.boxes.length;
  return make("figure", { class: "sight" }, frame, make("p", { class: "small under-picture" },
    make("span", null, count ? `${count} ${count === 1 ? "box" : "boxes"} of the publisher’s masks` : "no boxes", (shown.trace.said || []).length ? "; dashed: those the trace says" : ""),
    make("span", null, make("kbd", null, "Z"), " closer ", drawn.length ? make("kbd", null, "B") : null, drawn.length ? " boxes" : null)));
}

function closer(event) {
  const frame = document.querySelector(".frame");
  if (!frame) return;
  const inner = frame.firstChild, image = frame.querySelector("img");
  const near = frame.classList.toggle("near");
  inner.style.transform = near ? "scale(3)" : "";
  if (event) aim(event); else inner.style.transformOrigin = "50% 50%";
  if (near && !image.dataset.large) { // the same picture in its own size, as far as the server gives it
    image.dataset.large = "yes";
    const large = new Image();
    large.addEventListener("load", () => { image.src = large.src; });
    large.src = image.src.replace(/side=\d+/, "side=4096");
  }
}

function aim(event) {
  const frame = document.querySelector(".frame");
  if (!frame || !frame.classList.contains("near")) return;
  const box = frame.getBoundingClientRect();
  frame.firstChild.style.transformOrigin = `${(100 * (event.clientX - box.left)) / box.width}% ${(100 * (event.clientY - box.top)) / box.height}%`;
}

function traceCard(shown) {
  const trace = shown.trace;
  const card = make("section", { class: "card", "aria-label": "trace" }, make("h3", null, "The trace"),
    make("p", { class: "said trace" }, trace.pieces.length ? pieces(trace.pieces) : make("small", null, "There is no text.")),
    make("p", { class: "truth" }, make("small", null, "Answer "), make("b", null, make("bdi", null, trace.answer || "none"))));
  if (trace.pieces.some((piece) => piece[1])) {
    card.append(make("p", { class: "legend" }, make("span", null, make("mark", { class: "supported" }, "supported")), make("span", null, make("mark", { class: "unsupported" }, "unsupported"), " claimed, not found"), make("span", null, make("mark", { class: "contradicted" }, "contradicted"))));
  }
  if (trace.missed.length) card.append(verdict("warn", `Found, but not named: ${trace.missed.join(", ")}`));
  if (trace.malformed && trace.malformed.length) card.append(verdict("bad", "Boxes that can not be read", trace.malformed));
  card.append(trace.kept ? verdict("", "The quality check kept it.") : verdict("bad", "The quality check rejected it. To accept it overrules the check.", trace.reasons));
  return card;
}

function findingsCard(shown) {
  const found = shown.findings;
  const card = make("section", { class: "card", "aria-label": "findings" });
  if (!found) {
    card.append(make("h3", null, "Findings"), make("p", { class: "small" }, "Nobody looked for findings in this image."));
    return card;
  }
  const voted = `by ${found.n} votes of a model`;
  const origin = { pixels: "from the publisher’s masks", votes: voted, both: `from the publisher’s masks and ${voted}` };
  card.append(make("h3", null, `Findings, ${origin[found.origin]}`));
  const placed = new Set(shown.boxes.map((box) => box[0]));
  const list = make("ul", { class: "findings" }, found.rows.map(([name, present, votes]) => {
    const there = placed.has(name);
    const row = make("li", { class: `${present ? "present" : "absent"}${there ? " placed" : ""}`, "data-finding": name },
      make("i", { class: there ? `f${shown.colours[name] % 6}` : "none" }), make("bdi", null, name),
      votes === null ? make("span") : make("span", { class: "share" }, bar(votes / Math.max(1, found.n))),
      make("span", { class: "votes" }, votes === null ? (present ? "present" : "absent") : `${votes} of ${found.n}`));
    row.addEventListener("mouseenter", () => pick(there ? name : null));
    row.addEventListener("mouseleave", () => pick(null));
    return row;
  }));
  card.append(found.rows.length ? list : make("p", { class: "small" }, "None is present."));
  if (found.unseen) card.append(make("p", { class: "small note" }, `${found.unseen} more ${found.unseen === 1 ? "was" : "were"} asked for and got no vote.`));
  if (found.unknown.length) card.append(make("p", { class: "small note" }, `Nobody looked for ${found.unknown.join(", ")}.`));
  return card;
}

function bar(share) {
  const span = make("span");
  span.style.width = `${100 * share}%`;
  return span;
}

function pick(name) {
  document.body.classList.toggle("pick", name !== null);
  for (const rect of document.querySelectorAll(".frame rect")) rect.classList.toggle("picked", rect.dataset.finding === name);
}

function knowledgeCard(shown) {
  const known = shown.knowledge;
  if (!known) return null;
  const there = new Map((shown.findings ? shown.findings.rows : []).map(([name, present]) => [name, present]));
  const roles = make("dl", { class: "roles" });
  for (const [role, words] of Object.entries(ROLES)) {
    if (!known[role].length) continue;
    roles.append(make("dt", null, words), make("dd", null, known[role].map((name) => {
      const kind = there.get(name) ? (role === "excluded" ? " no" : " yes") : role === "required" && shown.findings ? " no" : "";
      return make("span", { class: `chip${kind}` }, kind === " yes" ? "✓ " : kind === " no" ? (role === "excluded" ? "✗ " : "missing: ") : "", make("bdi", null, name));
    })));
  }
  const count = known.passages.length;
  return make("section", { class: "card", "aria-label": "knowledge" }, make("h3", null, `Known of ${known.label} in ${shown.modality}`),
    make("p", { class: "said known" }, known.text), roles,
    make("details", { id: "sources", open: count === 1 }, make("summary", null, count ? `${count} ${count === 1 ? "source" : "sources"} ` : "no source", make("kbd", null, "S")),
      known.passages.map((one) => make("blockquote", null, quoted(one), make("footer", null, make("bdi", null, one.source), " · ", address(one.address), " · ", make("bdi", null, one.licence))))));
}

function quoted(passage) { // its text, with the words marked that a finding's role rests on
  const places = passage.quotes.map(([finding, role, quote]) => [passage.text.indexOf(quote), quote, `${ROLES[role] || "also"}: ${finding}`])
    .filter(([at]) => at >= 0).sort((a, b) => a[0] - b[0]);
  const shown = [];
  let end = 0;
  for (const [at, quote, why] of places) {
    if (at < end) { // two findings rest on the same words
      const last = shown[shown.length - 1];
      if (last.title) last.title += `; ${plain(why)}`;
      continue;
    }
    shown.push(passage.text.slice(end, at), make("mark", { class: "quote", title: plain(why) }, quote));
    end = at + quote.length;
  }
  return [...shown, passage.text.slice(end)];
}

function address(text) {
  const web = /^https?:\/\//i.test(text);
  return web ? make("a", { href: text, target: "_blank", rel: "noopener noreferrer" }, text) : make("bdi", null, text || "no address");
}

function show() {
  progress(now);
  const main = $("case"), shown = now.case;
  for (const id of ["accept", "correct", "reject"]) $(id).disabled = !shown;
  document.body.classList.remove("pick");
  if (!shown) {
    main.replaceChildren(make("p", { class: "empty" }, [...filters()].length ? "No trace fits these filters." : "There is no trace to review."));
    return;
  }
  $("undo").disabled = !shown.undo;
  const place = now.place ? `${now.place.toLocaleString("en")} of ${now.matching.toLocaleString("en")}` : "outside of the filters";
  const head = make("div", null, make("p", { class: "where" }, place, " · ", make("bdi", null, shown.id), ` · ${shown.split}`),
    make("h1", null, make("bdi", null, shown.question)),
    make("p", { class: "truth" }, make("small", null, "Published answer "), make("b", null, make("bdi", null, shown.published)), make("small", null, ` · ${shown.modality}${shown.eye ? ` · ${shown.eye}` : ""}`)));
  const said = [];
  if (shown.decision) said.push(decision(shown.decision, "You"));
  for (const one of shown.others) said.push(decision(one, one.reviewer));
  if (shown.disagree) said.push(verdict("bad", "Reviewers disagree: the trace is left out until they agree."));
  main.replaceChildren(sight(shown), make("div", { class: "facts" }, head, said.length ? make("div", null, said) : null, traceCard(shown), findingsCard(shown), knowledgeCard(shown)));
  scrollTo(0, 0);
  main.focus({ preventScroll: true });
}
