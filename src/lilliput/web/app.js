// The page: a chat over /v1/chat/completions and a live view of /stats. No library, no build step, nothing from elsewhere.
import { render } from "./markdown.js";

const $ = (id) => document.getElementById(id);

function headers() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

// ---- conversation

// One conversation with one model. With two columns a question goes to both, and each remembers its own answers.
class Column {
  constructor(log, pick) {
    this.log = log;
    this.pick = pick;
    this.history = []; // {role, content}
    this.running = null; // the AbortController of the answer that is being written
  }

  turn(role, text) {
    this.log.querySelector(".empty")?.remove();
    const node = document.createElement("div");
    node.className = `turn ${role}`;
    if (role === "user") node.textContent = text;
    this.log.append(node);
    return node;
  }

  empty() {
    this.running?.abort();
    this.history = []; // an answer that still runs keeps the old one
    const node = document.createElement("p");
    node.className = "empty";
    const title = document.createElement("strong");
    title.textContent = "What shall we talk about?";
    node.append(title, "The model runs on this machine; nothing leaves it.");
    this.log.replaceChildren(node);
  }

  get atEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 60;
  }

  toEnd() {
    this.log.scrollTop = this.log.scrollHeight;
  }

  request() {
    const system = $("system").value.trim();
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.history];
    return {
      model: this.pick.value || undefined, messages, stream: true, stream_options: { include_usage: true }, temperature: number("temperature"),
      top_p: number("top_p"), top_k: number("top_k"), max_tokens: number("max_tokens"), repetition_penalty: number("repetition_penalty"),
      seed: number("seed"),
    };
  }

  async ask(text) {
    const { history } = this;
    history.push({ role: "user", content: text });
    this.turn("user", text);
    const node = this.turn("assistant", "");
    const said = document.createElement("div");
    node.append(said);
    node.classList.add("waiting");
    this.toEnd();
    const mine = this.running = new AbortController();
    let answer = "", thought = "", drawn = true, usage = null, reason = null, first = 0;
    const started = performance.now();
    const draw = () => {
      drawn = true;
      const stay = this.atEnd;
      said.replaceChildren(render(answer));
      if (thought) {
        const box = document.createElement("details");
        const head = document.createElement("summary");
        head.textContent = answer ? "thought" : "thinking";
        box.open = !answer;
        box.append(head, thought);
        box.style.whiteSpace = "pre-wrap";
        said.prepend(box);
      }
      if (stay) this.toEnd();
    };
    try {
      const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(this.request()), signal: mine.signal });
      if (!response.ok) throw new Error(await refusal(response));
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        usage = event.usage || usage;
        const choice = event.choices[0];
        if (!choice) continue;
        reason = choice.finish_reason || reason;
        if (!choice.delta.content && !choice.delta.reasoning_content) continue;
        first = first || performance.now();
        thought += choice.delta.reasoning_content || "";
        answer += choice.delta.content || "";
        if (drawn) { drawn = false; requestAnimationFrame(draw); }
      }
      draw();
      if (usage) note(node, told(usage, first - started, performance.now() - first, reason));
    } catch (fault) {
      draw();
      const stopped = fault.name === "AbortError";
      note(node, stopped ? "stopped" : fault.message, stopped ? "" : "error");
    }
    node.classList.remove("waiting");
    if (answer) history.push({ role: "assistant", content: answer });
    else history.pop();
    if (this.atEnd || !answer) this.toEnd();
    if (this.running === mine) this.running = null;
  }
}

const columns = [new Column($("log"), $("model-a")), new Column($("log-b"), $("model-b"))];
const shown = () => ($("column-b").hidden ? columns.slice(0, 1) : columns);
const running = () => columns.some((column) => column.running);
const stop = () => columns.forEach((column) => column.running?.abort());

function note(node, text, kind = "") {
  const line = document.createElement("div");
  line.className = `note ${kind}`;
  line.textContent = text;
  node.append(line);
}

function number(id) {
  const value = $(id).value.trim();
  return value === "" ? undefined : Number(value);
}

// Server-sent events of a response, as parsed JSON.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask(text) {
  busy(true);
  await Promise.all(shown().map((column) => column.ask(text)));
  busy(running());
}

function told(usage, wait, spent, reason) {
  const rate = usage.completion_tokens > 1 && spent > 0 ? `, ${((usage.completion_tokens - 1) / spent * 1000).toFixed(1)} tokens/s` : "";
  return `${usage.completion_tokens} tokens, first after ${Math.max(0, wait).toFixed(0)} ms${rate}${reason === "length" ? ", cut at the limit" : ""}`;
}

async function refusal(response) {
  if (response.status === 401) { $("key-row").hidden = false; return "This server wants an API key: see the settings."; }
  try { return (await response.json()).error.message; } catch { return `the server answered ${response.status}`; }
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  if (!is) $("text").focus();
}

function grow() {
  const box = $("text");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running()) return;
  $("text").value = "";
  grow();
  ask(text);
});
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("form").requestSubmit(); }
});
$("stop").addEventListener("click", stop);
function restart() {
  columns.forEach((column) => column.empty());
  $("text").focus();
}
$("new").addEventListener("click", restart);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.altKey && event.key.toLowerCase() === "n") { event.preventDefault(); restart(); }
});
$("toggle").addEventListener("click", () => {
  $("side").hidden = !$("side").hidden;
  $("toggle").setAttribute("aria-expanded", String(!$("side").hidden));
});
for (const id of ["temperature", "top_p"]) $(id).addEventListener("input", () => { $(`${id}-value`).textContent = $(id).value; });
$("key").value = sessionStorage.getItem("key") || "";
$("key-row").addEventListener("submit", (event) => { event.preventDefault(); $("key").blur(); });
$("key").addEventListener("change", () => { sessionStorage.setItem("key", $("key").value.trim()); look(); });

// ---- live view

const SECONDS = 60;
const speeds = [];
let before = null;

function line() {
  const top = Math.max(10, ...speeds);
  const points = speeds.map((value, index) => `${(120 * (SECONDS - speeds.length + index) / (SECONDS - 1)).toFixed(1)},${(31 - 29 * value / top).toFixed(1)}`);
  const path = points.length > 1 ? `M${points.join("L")}` : "";
  $("line").querySelector(".stroke").setAttribute("d", path);
  $("line").querySelector(".area").setAttribute("d", path && `${path}L120,32L${points[0].split(",")[0]},32Z`);
}

// Which models there are, adapters too; with two of them the second is shown beside the first.
let known = "";

function offer(models) {
  const names = models.flatMap((one) => [one.model, ...one.adapters]);
  if (names.join("\n") === known) return;
  const first = known === "";
  known = names.join("\n");
  for (const [id, options] of [["model-a", names], ["model-b", ["", ...names]]]) {
    const kept = $(id).value;
    $(id).replaceChildren(...options.map((name) => new Option(name || "nobody", name)));
    $(id).value = options.includes(kept) ? kept : options[0];
  }
  if (first && models.length > 1) $("model-b").value = models[1].model;
  $("models").hidden = names.length < 2;
  arrange();
}

function arrange() {
  const two = $("model-b").value !== "";
  $("column-b").hidden = $("name-a").hidden = !two;
  $("name-a").textContent = $("model-a").value;
  $("name-b").textContent = $("model-b").value;
  if (!two) columns[1].empty();
}

$("model-a").addEventListener("change", () => { columns[0].empty(); arrange(); });
$("model-b").addEventListener("change", () => { columns[1].empty(); arrange(); });

// What all models do together.
function together(models) {
  const sum = (key) => models.reduce((total, one) => total + (one[key] || 0), 0);
  const keys = ["generated", "running", "waiting", "prefix_hits", "prefix_queries", "preempted_swap", "preempted_recompute", "drafted", "accepted",
    "blocks_used", "blocks_total"];
  const slowest = Math.max(...models.map((one) => one.last_step_seconds || 0));
  return { ...Object.fromEntries(keys.map((key) => [key, sum(key)])), last_step_seconds: slowest };
}

const share = (part, whole) => (whole ? `${(100 * part / whole).toFixed(0)} %` : "\u2013");

function show(answer, now) {
  const names = answer.models.map((one) => one.model).join(", ");
  $("model").textContent = names;
  document.title = `Lilliput \u00b7 ${names}`;
  offer(answer.models);
  const stats = together(answer.models);
  if (!stats.blocks_total) return; // an encoder: nothing to watch
  if (before) {
    speeds.push(Math.max(0, (stats.generated - before.generated) / ((now - before.at) / 1000)));
    if (speeds.length > SECONDS) speeds.shift();
    const speed = speeds.slice(-2).reduce((sum, value) => sum + value, 0) / Math.min(2, speeds.length);
    $("speed").textContent = speed < 10 && speed > 0 ? speed.toFixed(1) : speed.toFixed(0);
    line();
  }
  before = { generated: stats.generated, at: now };
  $("running").textContent = stats.running;
  $("waiting").textContent = stats.waiting;
  $("step").textContent = stats.last_step_seconds ? `${(1000 * stats.last_step_seconds).toFixed(1)} ms` : "\u2013";
  $("hits").textContent = share(stats.prefix_hits, stats.prefix_queries);
  $("preempted").textContent = stats.preempted_swap + stats.preempted_recompute;
  $("accepted-row").hidden = !stats.drafted;
  $("accepted").textContent = share(stats.accepted, stats.drafted);
  $("cache").value = stats.blocks_used / stats.blocks_total;
  $("cache-text").textContent = `${stats.blocks_used} of ${stats.blocks_total} blocks`;
}

async function look() {
  const state = $("state");
  try {
    const response = await fetch("/stats", { headers: headers() });
    if (!response.ok) throw new Error(await refusal(response));
    show(await response.json(), performance.now());
    state.textContent = "live";
    state.classList.remove("off");
  } catch (fault) {
    state.textContent = fault instanceof TypeError ? "unreachable" : "locked";
    state.classList.add("off");
    before = null;
  }
}

restart();
if (matchMedia("(max-width: 780px)").matches) $("toggle").click();
look();
setInterval(() => { if (!document.hidden) look(); }, 1000);
