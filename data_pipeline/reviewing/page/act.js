// What a reviewer does; show.js stands before this in the page.

// ---- deciding ----

async function decide(body) {
  const found = await ask("/decide", { row: now.row, trace: now.case.trace.sha256, ...body });
  if (found.reasons.length) return found.reasons;
  const row = now.row;
  if (!(await go(row, 1))) await go(row, 0); // the last one: show what was decided on it
  tell(`${WORDS[body.outcome][0].toUpperCase()}${WORDS[body.outcome].slice(1)}. U takes it back.`);
  return [];
}

const accept = () => alone(() => decide({ outcome: "accept" }));

const undo = () => alone(async () => {
  const found = await ask("/undo", {});
  if (found.row === null) return tell("Nothing was decided in this session.");
  await go(found.row, 0);
  tell("Taken back.");
});

function openReject() {
  $("detail").value = "";
  $("reject-fault").textContent = "";
  choose(null);
  $("reject-panel").showModal();
  $("reasons").focus();
}

function choose(reason) {
  for (const button of $("reasons").children) {
    button.setAttribute("aria-checked", String(button.dataset.reason === reason));
  }
  if (reason) $("detail").focus();
}

function saveReject() {
  const chosen = $("reasons").querySelector("[aria-checked=true]");
  const detail = $("detail").value.trim();
  if (!chosen) return void ($("reject-fault").textContent = "Choose a reason: 1 to 8.");
  if (chosen.dataset.reason === "other" && !detail) return void ($("reject-fault").textContent = "Say in words why.");
  alone(async () => {
    try {
      await decide({ outcome: "reject", reason: detail ? `${chosen.dataset.reason}: ${detail}` : chosen.dataset.reason });
    } finally {
      $("reject-panel").close();
    }
  });
}

function openCorrect() {
  const shown = now.case, mine = shown.decision && shown.decision.outcome === "correct" ? shown.decision : shown.trace;
  const answer = mine.answer || shown.published;
  $("think").value = mine.think ?? shown.trace.text;
  $("published").textContent = plain(`(published: ${shown.published})`);
  $("answer-choice").hidden = !shown.options.length;
  $("answer-text").hidden = Boolean(shown.options.length);
  $("answer-choice").replaceChildren(...shown.options.map((words) => option(words, words)));
  $("answer-choice").value = answer;
  $("answer-text").value = answer;
  $("check").replaceChildren();
  $("preview").replaceChildren();
  $("correct-panel").showModal();
  $("think").focus();
  $("think").setSelectionRange(0, 0);
  checkSoon(0);
}

function correction() {
  const shown = now.case;
  return { think: $("think").value.trim(), answer: shown.options.length ? $("answer-choice").value : $("answer-text").value.trim() };
}

function checked(reasons) {
  $("check").replaceChildren(reasons.length ? verdict("bad", "The quality check would not let it pass:", reasons) : verdict("", "The quality check lets it pass."));
}

function checkSoon(delay) {
  clearTimeout(checkSoon.timer);
  checkSoon.timer = setTimeout(async () => {
    const asked = correction();
    try {
      const found = await ask("/check", { row: now.row, ...asked });
      if (!$("correct-panel").open || JSON.stringify(asked) !== JSON.stringify(correction())) return;
      $("preview").replaceChildren(...pieces(found.pieces));
      checked(found.reasons);
    } catch (error) {
      $("check").replaceChildren(verdict("bad", error.message));
    }
  }, delay);
}

function saveCorrect() {
  clearTimeout(checkSoon.timer);
  alone(async () => {
    try {
      const reasons = await decide({ outcome: "correct", ...correction() });
      if (reasons.length) checked(reasons); else $("correct-panel").close();
    } catch (error) {
      $("check").replaceChildren(verdict("bad", error.message));
    }
  });
}

// ---- keys, buttons, filters ----

const next = () => alone(() => go(now.row ?? -1, 1));
const previous = () => alone(() => go(now.row ?? start.total, -1));
const toggleFilters = () => {
  const hidden = ($("filters").hidden = !$("filters").hidden);
  $("filter-button").setAttribute("aria-expanded", String(!hidden));
  if (!hidden) $("filters").querySelector("select").focus(); else $("case").focus();
};
const sources = () => { const node = $("sources"); if (node) { node.open = !node.open; node.scrollIntoView({ block: "nearest" }); } };
const HOTKEYS = {
  a: () => now.case && accept(), c: () => now.case && openCorrect(), r: () => now.case && openReject(), u: undo,
  n: next, arrowright: next, p: previous, arrowleft: previous,
  z: () => closer(null), b: () => document.body.classList.toggle("bare"), s: sources, f: toggleFilters, "?": () => $("help-panel").showModal(),
};

document.addEventListener("keydown", (event) => {
  const panel = document.querySelector("dialog[open]");
  if (panel && panel.id === "reject-panel" && event.target !== $("detail") && /^[1-8]$/.test(event.key)) {
    event.preventDefault();
    return choose(start.reasons[Number(event.key) - 1]);
  }
  if (panel && panel.id === "reject-panel" && event.target === $("reasons") && event.key === "Enter") return saveReject();
  if (panel && panel.id === "correct-panel" && event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    return saveCorrect();
  }
  if (panel || event.ctrlKey || event.metaKey || event.altKey || !now) return;
  if (event.key === "Escape" && !$("filters").hidden) return toggleFilters();
  if (event.target.matches("select, input, textarea")) return;
  const work = HOTKEYS[event.key.toLowerCase()];
  if (!work || (event.repeat && ["a", "u"].includes(event.key.toLowerCase()))) return;
  event.preventDefault();
  work();
});

function prepare() {
  $("who").textContent = start.reviewer;
  $("reasons").append(...start.reasons.map((reason, number) => {
    const button = make("button", { type: "button", role: "radio", "aria-checked": "false", "data-reason": reason }, make("kbd", null, String(number + 1)), reason);
    button.addEventListener("click", () => choose(reason));
    return button;
  }));
  $("all-keys").append(...KEYS.flatMap(([key, what]) => [make("dt", null, make("kbd", null, key)), make("dd", null, what)]));
  const choice = (name, title, rows) => make("label", null, title, make("select", { name }, option("all", ""), rows));
  for (const [name, title] of Object.entries(FILTERS)) {
    const rows = start.facets[name].map(([value, count]) => option(`${value} (${count.toLocaleString("en")})`, value));
    if (name === "check") rows.unshift(option("rejected", "rejected"));
    $("filters").append(choice(name, title, rows));
  }
  $("filters").append(choice("decision", "Decision", Object.entries(STATES).map(([value, words]) => option(words, value))));
  $("filters").addEventListener("change", () => alone(async () => { now = null; await go(-1, 1); }));
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  const work = { "filter-button": toggleFilters, previous, next, accept, undo, correct: openCorrect, reject: openReject, help: () => $("help-panel").showModal() };
  for (const [id, act] of Object.entries(work)) $(id).addEventListener("click", act);
  for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
  $("reject-panel").firstElementChild.addEventListener("submit", (event) => { event.preventDefault(); saveReject(); });
  $("correct-panel").firstElementChild.addEventListener("submit", (event) => { event.preventDefault(); saveCorrect(); });
  for (const id of ["think", "answer-choice", "answer-text"]) $(id).addEventListener("input", () => checkSoon(300));
  if (start.unknown) tell(`${start.unknown} earlier decisions are about traces that are not here.`);
}

prepare();
alone(async () => {
  const there = location.hash.slice(1);
  if (/^\d+$/.test(there) && Number(there) < start.total) return go(Number(there), 0);
  const open = await ask("/case?row=-1&move=1&decision=open");
  return open.row === null ? go(-1, 1) : go(open.row, 0);
});
