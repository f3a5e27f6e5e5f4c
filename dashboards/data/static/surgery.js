// The operating table: sliders, the stream of two texts, and what was measured of them. Text only ever becomes text nodes.
const $ = (selector) => document.querySelector(selector);
const form = $("#table");
const STEPS = { kl: [0.001, 0.01, 0.03, 0.1, 0.3], hazard: [1e-5, 1e-4, 1e-3, 1e-2, 1e-1] };
const UNITS = { strengthen: (x) => `× its own activation`, ablate: () => "set to 0",
  floor: (x, unit) => `× its maximum: at least ${figure(x * unit)}`, clamp: (x, unit) => `× its maximum: always ${figure(x * unit)}`,
  cap: (x, unit) => `× its maximum: at most ${figure(x * unit)}`, add: (x, unit) => `× its maximum: ${figure(x * unit)} added` };
const RANGES = { strengthen: [-1, 5], add: [-2, 2] };
const DEFAULTS = JSON.parse(form.dataset.defaults);
const PAGE = crypto.getRandomValues(new Uint32Array(4)).join("-");  // tells this page's own operation from another's
let running = null;  // the AbortController of the run under way
let pieces = null;   // both texts in words, once they are whole

function figure(value) {
  if (value === 0) return "0";
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

function make(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

// The words of this view: the form as it stands, without what is empty or says nothing new.
function words() {
  const all = [...new FormData(form)], has = (wanted) => all.some(([name, value]) => name === wanted && value !== "");
  return new URLSearchParams(all.filter(([name, value]) => name !== "add" && (value !== "" || (name === "text" && has("role")))
    && DEFAULTS[name] !== value && (has("only") || !["when", "above", "times", "within"].includes(name)))).toString();
}

function remember() {
  const query = words();
  localStorage.setItem(`surgery:${form.dataset.store}`, query);
  history.replaceState(null, "", query ? `${location.pathname}?${query}` : location.pathname);
}

function describe(edit) {
  const kind = edit.querySelector("[name=op]").value, dose = edit.querySelector("[data-dose]");
  const slider = edit.querySelector("[data-slider]"), x = Number(dose.value);
  const [low, high] = RANGES[kind] ?? [0, 3];
  slider.min = Math.min(low, x || 0);
  slider.max = Math.max(high, x || 0);
  slider.value = x;
  edit.querySelector(".strength").hidden = kind === "ablate";
  edit.querySelector("[data-meaning]").textContent = Number.isFinite(x) ? UNITS[kind](x, Number(edit.dataset.unit)) : "not a number";
}

function changed(event) {
  const edit = event?.target.closest(".edit");
  if (event?.target.matches("[data-slider]")) edit.querySelector("[data-dose]").value = event.target.value;
  if (edit) describe(edit);
  if (event?.target.name === "add") return;
  remember();
  if (!$("#sides").hidden) {
    $("#result").classList.add("stale");
    if (!running) $("#state").textContent = "The table has changed since these texts were written.";
  }
  clearTimeout(changed.timer);
  if ($("#live").checked) changed.timer = setTimeout(operate, 200);
}

async function refusal(answer) {
  const said = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  return [said.error, said.hint].filter(Boolean).join(": ");
}

function send(path, signal) {
  return fetch(`${location.pathname}/${path}`, { method: "POST", signal, body: JSON.stringify({ query: words(), page: PAGE }),
    headers: { "Content-Type": "application/json", "X-Undertow": "1" } });
}

async function operate() {
  running?.abort();
  const mine = running = new AbortController();
  remember();
  begin();
  try {
    const answer = await send("run", mine.signal);
    if (!answer.ok) end(await refusal(answer), true);
    else await follow(answer.body.pipeThrough(new TextDecoderStream()).getReader());
  } catch (error) {
    if (mine !== running) return;  // a newer run has taken over
    if (error.name === "AbortError") end(`Cancelled after ${$("#tokens").rows.length} tokens.`);
    else end("The server does not answer: is undertow dashboard still running?", true);
  }
  if (mine === running) {
    running = null;
    $("#cancel").disabled = true;
    $("#progress").hidden = true;
  }
}

function begin() {
  pieces = null;
  for (const id of ["#base", "#operated", "#tokens", "#verdict"]) $(id).replaceChildren();
  for (const id of ["#verdict", "#lens", "#scale", "#figures"]) $(id).hidden = true;
  $("#sides").hidden = $("#progress").hidden = false;
  $("#progress").removeAttribute("value");
  $("#result").classList.remove("stale");
  $("#cancel").disabled = false;
  $("#state").className = "quiet";
  $("#state").textContent = "Asking …";
  const chosen = $("[name=lens]:checked");
  if (chosen.value === "words") $("[name=lens][value=kl]").checked = true;
}

function end(text, wrong = false) {
  $("#state").textContent = text;
  $("#state").className = wrong ? "warning" : "quiet";
  if (!$("#tokens").rows.length) $("#sides").hidden = true;
}

async function follow(reader) {
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) EVENTS[(JSON.parse(line)).kind](JSON.parse(line));
  }
}

const EVENTS = {
  opening: (event) => { $("#state").textContent = event.open ? "Operating …" : "Opening the model; the first time takes longer …"; },
  prompt: (event) => {
    $("#state").textContent = `Operating … the recipe acted on ${event.firings} of ${event.positions} tokens of the prompt.`;
    $("#figures").hidden = $("#lens").hidden = $("#scale").hidden = false;
    $("#progress").max = Number(form.elements.tokens.value);
    scale();
  },
  token: (event) => {
    if (event.side === "base") { $("#base").append(event.text); return; }
    $("#tokens").append(row(event));
    $("#progress").value = $("#tokens").rows.length;
    if (!event.text) return;
    const mark = make("mark", event.text, event.refused ? "refused" : "");
    Object.assign(mark.dataset, { kl: event.kl, hazard: event.hazard, fired: event.fired ? 1 : 0, v:
      `KL ${figure(event.kl)} nats, hazard ${figure(event.hazard)}${event.fired ? ", recipe acted" : ""}${event.refused ? ", guard refuses" : ""}` });
    mark.title = mark.dataset.v;
    colour(mark);
    $("#operated").append(mark);
  },
  tail: (event) => $(`#${event.side}`).append(event.text),
  done: (event) => {
    pieces = event.pieces;
    $("#state").textContent = `Done: ${event.n.base} tokens untouched, ${event.n.operated} operated.`;
    verdict(event);
    $("[name=lens][value=words]").checked = true;
    show();
  },
  error: (event) => end([event.error, event.hint].filter(Boolean).join(": "), true),
};

function row(event) {
  const made = document.createElement("tr");
  const token = make("th", "", "token");
  token.scope = "row";
  token.append(make("code", event.spelling));
  made.append(token, ...[event.kl, event.hazard, event.base_hazard].map((value) => make("td", figure(value), "number")),
    make("td", event.fired === null ? "–" : event.fired ? "yes" : "no"), make("td", event.refused ? "✗ refuses" : "lets pass"));
  return made;
}

function verdict(event) {
  const said = event.words.operated, refused = event.refused.operated;
  const bad = said.length > 0 || refused > 0;
  const head = make("h3");
  head.append(make("span", bad ? "✗ the word was said" : "✓ the word was not said", `verdict ${bad ? "said" : "unsaid"}`));
  const facts = [
    said.length ? `the matcher finds ${said.map((form) => `“${form}”`).join(", ")}` : "the matcher finds no form of the word",
    refused ? `the guard would have refused ${refused} of ${event.n.operated} tokens`
      : `the guard would have let all ${event.n.operated} tokens pass`,
    `KL mean ${figure(event.kl_mean)} nats a token, at most ${figure(event.kl_max)}`,
    `hazard ${figure(event.hazard)} in all, ${figure(event.hazard_base)} untouched on the same text: × ${figure(event.hazard_ratio)}`,
    `the recipe acted on ${event.firings} of ${event.positions} tokens`];
  if (event.same) facts.unshift("both texts are the same");
  if (event.words.base.length) facts.push(`the untouched text says ${event.words.base.map((form) => `“${form}”`).join(", ")}`);
  const list = document.createElement("ul");
  list.append(...facts.map((fact) => make("li", fact)));
  $("#verdict").replaceChildren(head, list,
    make("p", "One pair of texts, measured as it was written. A verdict on a recipe needs controls and many texts: see Runs.", "quiet"));
  $("#verdict").className = `outcome ${bad ? "said" : "unsaid"}`;
  $("#verdict").hidden = false;
}

const lens = () => $("[name=lens]:checked").value;

function colour(mark) {
  const by = lens(), level = by === "fired" ? 3 * Number(mark.dataset.fired) : (STEPS[by] ?? []).filter((step) => mark.dataset[by] >= step).length;
  for (let number = 1; number <= 5; number += 1) mark.classList.toggle(`h${number}`, number === level);
}

function scale() {
  const by = lens();
  const parts = by === "words" ? [make("mark", "not in the other text", "changed")] : by === "fired"
    ? [make("mark", "the recipe acted here", "h3")]
    : STEPS[by].map((step, index) => make("mark", `≥ ${figure(step)}`, `h${index + 1}`));
  $("#scale").replaceChildren(...parts.flatMap((part) => [part, " "]), make("span", by === "kl" ? "nats; thicker underline, more" : "", "quiet"));
}

// Both texts as words (changed ones marked), or the operated one as tokens with their heat.
function show() {
  scale();
  const inWords = lens() === "words" && pieces !== null;
  for (const side of ["base", "operated"]) {
    const place = $(`#${side}`);
    place.querySelectorAll(":scope > .pieces").forEach((old) => old.remove());
    if (side === "operated") [...place.querySelectorAll(":scope > mark")].forEach((mark) => { mark.hidden = inWords; colour(mark); });
    else if (pieces) place.replaceChildren(inWords ? "" : pieces.base.map(([text]) => text).join(""));
    if (!inWords) continue;
    const whole = make("span", "", "pieces");
    whole.append(...pieces[side].map(([text, isChanged]) => (isChanged ? make("mark", text, "changed") : text)));
    place.append(whole);
  }
}

async function save() {
  const answer = await send("save").catch(() => null);
  const text = answer === null ? "The server does not answer: is undertow dashboard still running?"
    : answer.ok ? `Saved: ${(await answer.json()).path}` : await refusal(answer);
  $("#saved").textContent = text;
}

function nudge(by) {
  const dose = document.activeElement?.closest(".edit")?.querySelector("[data-dose]");
  if (!dose) return false;
  dose.value = Number((Number(dose.value) + by).toFixed(6));
  dose.dispatchEvent(new Event("input", { bubbles: true }));
  return true;
}

form.addEventListener("input", changed);
form.addEventListener("change", (event) => { if (event.target.matches("select")) changed(event); });
document.querySelectorAll("[name=lens]").forEach((radio) => radio.addEventListener("change", show));
$("#operate").addEventListener("click", operate);
$("#cancel").addEventListener("click", () => running?.abort());
$("#save").addEventListener("click", save);
$("[data-copy-link]").addEventListener("click", async (event) => {
  remember();
  await navigator.clipboard.writeText(location.href);
  event.target.textContent = "Link copied";
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input:not([type=range], [type=checkbox], [type=radio]), textarea, select")
      || $("#help").open) return;
  if (event.key === "o") operate();
  else if (event.key === "c" && running) running.abort();
  else if (event.key === "+" && nudge(0.25)) { /* done */ }
  else if (event.key === "-" && nudge(-0.25)) { /* done */ }
  else return;
  event.preventDefault();
  event.stopPropagation();
}, true);
document.querySelectorAll(".edit").forEach(describe);
localStorage.setItem(`surgery:${form.dataset.store}`, words());
history.replaceState(null, "", form.dataset.permalink);
