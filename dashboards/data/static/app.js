// Keys, stars, labels, notes, the way to the operating table. Every page reads without this file; only writing needs it.
const $ = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];

function toggleTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
}

function say(id, text) {
  const place = $(id);
  place.textContent = text;
  place.hidden = !text;
}

async function post(url, body) {
  try {
    const answer = await fetch(url, {
      method: "POST", headers: { "Content-Type": "application/json", "X-Undertow": "1" }, body: JSON.stringify(body),
    });
    if (answer.ok) { say("#alert", ""); return true; }
    const refusal = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
    say("#alert", [refusal.error, refusal.hint].filter(Boolean).join(": "));
  } catch {
    say("#alert", "The server does not answer: is undertow dashboard still running?");
  }
  return false;
}

async function toggleStar(button) {
  const on = button.getAttribute("aria-pressed") !== "true";
  if (!(await post(button.dataset.star, { on }))) return;
  button.setAttribute("aria-pressed", String(on));
  button.textContent = on ? "★" : "☆";
}

// Roving focus over rows and contexts.
function step(by) {
  const stops = all("a[data-row], [data-context]").filter((stop) => stop.offsetParent !== null);
  const here = stops.findIndex((stop) => stop === document.activeElement || stop.contains(document.activeElement)
                                         || stop.closest("tr")?.contains(document.activeElement));
  const next = stops[here < 0 ? (by > 0 ? 0 : stops.length - 1) : here + by];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}

// Within a focused context: the activation of one active token after another, also said to a screen reader.
function readMark(context, by) {
  const marks = [...context.querySelectorAll(":scope > .text mark, :scope > mark")];
  const here = marks.findIndex((mark) => mark.classList.contains("read"));
  const next = marks[here < 0 ? (by > 0 ? 0 : marks.length - 1) : Math.min(marks.length - 1, Math.max(0, here + by))];
  marks.forEach((mark) => mark.classList.toggle("read", mark === next));
  if (next) say("#readout", `${next.textContent.trim()}: ${next.dataset.v}`);
}

function follow(rel) {
  const link = $(`head link[rel=${rel}]`);
  if (link) location.assign(link.getAttribute("href"));
}

function starOfFocus() {
  const row = document.activeElement?.closest("tr");
  const button = row ? row.querySelector("[data-star]") : $(".head [data-star]");
  if (button) toggleStar(button);
}

// To the operating table as it was left in this browser, with one feature more.
function putOnTable(link) {
  const [path] = link.getAttribute("href").split("?");
  const left = localStorage.getItem(`surgery:${path.split("/")[2]}`);
  location.assign(`${path}?${left ? `${left}&` : ""}add=${link.dataset.operate}`);
}

function operateOnFocus() {
  const link = (document.activeElement?.closest("tr") ?? $(".head"))?.querySelector("[data-operate]");
  if (link) putOnTable(link);
}

const KEYS = {
  j: () => step(1), k: () => step(-1), "[": () => follow("prev"), "]": () => follow("next"), u: () => follow("up"),
  s: operateOnFocus, "*": starOfFocus, d: toggleTheme, "?": () => $("#help").showModal(),
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input:not([type=range], [type=checkbox], [type=radio]), textarea, select");
  if (event.key === "Escape" && typing) { event.target.blur(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey || typing || $("#help").open) return;
  const context = event.target.closest("[data-context]");
  if (context && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
    readMark(context, event.key === "ArrowRight" ? 1 : -1);
    event.preventDefault();
    return;
  }
  const field = all("[data-focus]").find((place) => place.dataset.focus === event.key && place.offsetParent !== null);
  const link = all("a[data-key]").find((place) => place.dataset.key === event.key);
  if (field) { field.focus(); field.select(); }
  else if (link) link.click();
  else if (Object.hasOwn(KEYS, event.key)) KEYS[event.key]();
  else return;
  event.preventDefault();
});

document.addEventListener("click", async (event) => {
  const star = event.target.closest("[data-star]");
  if (star) toggleStar(star);
  const operate = event.target.closest("[data-operate]");
  if (operate && !(event.ctrlKey || event.metaKey || event.shiftKey)) {
    event.preventDefault();
    putOnTable(operate);
  }
  const copy = event.target.closest("[data-copy]");
  if (copy) {
    await navigator.clipboard.writeText(copy.dataset.copy);
    copy.textContent = "copied";
  }
});

document.addEventListener("focusout", () => say("#readout", ""));

document.addEventListener("submit", async (event) => {
  const url = event.target.dataset.post;
  if (!url) return;
  event.preventDefault();
  if (await post(url, { text: event.target.elements.text.value })) location.reload();
});

$("#theme").addEventListener("click", toggleTheme);
$("#help-open").addEventListener("click", () => $("#help").showModal());
