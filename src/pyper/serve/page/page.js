// The chat page: no build step, no library, no request to anywhere but this server.
"use strict";

const at = (id) => document.getElementById(id);
const COLOURS = 8;

let models = [];        // entries of /v1/models; the first is the mixture
let experts = [];       // names, in the order of the colours
let messages = [];      // {role, content} as they are sent
let running = null;     // AbortController of the answer that is being written
let only = null;        // the expert whose text stands out, if one was chosen

// Server

function headers() {
  const key = at("key").value.trim();
  return {"Content-Type": "application/json", ...(key && {Authorization: `Bearer ${key}`})};
}

async function refuse(response) {
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not from Pyper: the status has to do */ }
  throw Object.assign(new Error(message), {status: response.status});
}

async function loadModels() {
  const response = await fetch("/v1/models", {headers: headers()});
  if (!response.ok) await refuse(response);
  models = (await response.json()).data;
  experts = models[0].pyper.experts;
  at("model-name").textContent = models[0].id;
  document.title = `${models[0].id} · Pyper`;
  at("max-tokens").max = models[0].max_model_len;
  at("author").replaceChildren(...models.map((model, i) =>
    new Option(i ? model.pyper.experts[0] : "The mixture", model.id)));
  drawLegend();
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function body() {
  const context = models[0].max_model_len;
  const longest = Math.max(1, Math.min(Number(at("max-tokens").value) || 256, context));
  const system = at("system").value.trim();
  const topK = Number(at("top-k").value);
  const seed = at("seed").value;
  return {
    model: at("author").value,
    messages: [...(system ? [{role: "system", content: system}] : []), ...messages],
    stream: true,
    temperature: Number(at("temperature").value),
    top_p: Number(at("top-p").value),
    max_tokens: longest,
    // A long conversation keeps its end, and the answer always has room.
    truncate_prompt_tokens: Math.max(1, context - Math.min(longest, Math.floor(context / 2))),
    ...(topK > 0 && {top_k: topK}),
    ...(seed !== "" && {seed: Number(seed)}),
  };
}

// Who writes

function drawLegend() {
  at("bar").replaceChildren(...experts.map((_, i) => {
    const part = document.createElement("i");
    part.className = `e${i % COLOURS}`;
    return part;
  }));
  at("legend").replaceChildren(...experts.map((name, i) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.className = `e${i % COLOURS}`;
    button.setAttribute("aria-pressed", "false");
    button.title = `Show only what ${name} wrote`;
    button.append(name, document.createElement("b"));
    button.addEventListener("click", () => highlight(i));
    item.append(button);
    return item;
  }));
  at("posterior").hidden = experts.length < 2;
}

function highlight(index) {
  only = only === index ? null : index;
  [...at("legend").querySelectorAll("button")].forEach((button, i) =>
    button.setAttribute("aria-pressed", String(i === only)));
  at("messages").querySelectorAll("[data-expert]").forEach(dim);
}

function dim(span) {
  span.classList.toggle("dim", only !== null && span.dataset.expert !== String(only));
}

function showWeights(weights) {
  [...at("bar").children].forEach((part, i) => { part.style.flexGrow = weights[experts[i]] ?? 0; });
  [...at("legend").querySelectorAll("b")].forEach((share, i) => {
    const weight = weights[experts[i]] ?? 0;
    share.textContent = weight >= 0.005 ? `${Math.round(100 * weight)} %` : "";
  });
}

// Conversation

function addMessage(role) {
  const item = document.createElement("li");
  item.className = role;
  const who = document.createElement("span");
  who.className = "hidden";
  who.textContent = role === "user" ? "You:" : "Model:";
  const text = document.createElement("div");
  text.className = "text";
  item.append(who, text);
  at("welcome").hidden = true;
  at("messages").append(item);
  return {item, text};
}

class Reply {
  constructor() {
    Object.assign(this, addMessage("assistant"));
    this.item.setAttribute("aria-busy", "true");
    this.note = document.createElement("p");
    this.note.className = "note";
    this.item.append(this.note);
    this.content = "";
    this.tokens = experts.map(() => 0);
    this.began = null;
  }

  add(spans, weights) {
    const follow = isAtEnd();
    this.began ??= performance.now();
    this.ended = performance.now();
    for (const span of spans) {
      const index = experts.indexOf(span.expert);
      this.tokens[index] += span.tokens;
      this.content += span.text;
      let last = this.text.lastElementChild;
      if (!last || last.dataset.expert !== String(index)) {
        last = document.createElement("span");
        last.dataset.expert = index;
        last.className = `e${index % COLOURS}`;
        dim(last);
        last.title = span.expert;
        this.text.append(last);
      }
      last.append(span.text);
    }
    showWeights(weights);
    this.note.textContent = this.summary();
    if (follow) at("transcript").scrollTop = at("transcript").scrollHeight;
  }

  summary(why = "") {
    const total = this.tokens.reduce((a, b) => a + b, 0);
    const seconds = (this.ended - this.began) / 1000;
    const parts = [`${total} token${total === 1 ? "" : "s"}`];
    if (total > 1 && seconds > 0) parts.push(`${Math.round((total - 1) / seconds)} tokens/s`);
    const shares = this.tokens.map((n, i) => [n / total, experts[i]]).filter(([share]) => share > 0);
    shares.sort((a, b) => b[0] - a[0]);
    parts.push(...shares.slice(0, 3).map(([share, name]) => `${name} ${Math.round(100 * share)} %`));
    return [...parts, ...(why ? [why] : [])].join(" · ");
  }

  finish(why) {
    this.item.removeAttribute("aria-busy");
    this.note.textContent = this.began === null ? why || "no text" : this.summary(why);
    announce(`${this.content} ${this.note.textContent}`);
  }
}

async function send(text) {
  const conversation = messages;
  showProblem("");
  messages.push({role: "user", content: text});
  addMessage("user").text.textContent = text;
  at("transcript").scrollTop = at("transcript").scrollHeight;
  setRunning(new AbortController());
  announce("Writing");
  const reply = new Reply();
  let why = "";
  try {
    why = await write(reply, running.signal);
  } catch (error) {
    why = error.name === "AbortError" ? "stopped" : "failed";
    if (why === "failed") showProblem(error.message, error.status);
  }
  reply.finish(why);
  setRunning(null);
  if (conversation === messages) keep(reply, text, why);  // else a new chat has begun
}

async function write(reply, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(body()), signal,
  });
  if (!response.ok) await refuse(response);
  let reason = "";
  for await (const event of eventsOf(response)) {
    for (const choice of event.choices) {
      if (choice.pyper) reply.add(choice.pyper.spans, choice.pyper.weights);
      reason = choice.finish_reason ?? reason;
    }
  }
  return reason === "length" ? "at its limit" : "";
}

function keep(reply, text, why) {
  if (reply.content) {
    messages.push({role: "assistant", content: reply.content});
  } else if (why === "failed") {  // nothing was said: the message returns to its field
    messages.pop();
    at("messages").lastElementChild.remove();
    at("messages").lastElementChild.remove();
    at("prompt").value ||= text;
    grow();
  }
}

// Page

function isAtEnd() {
  const box = at("transcript");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 40;
}

function announce(text) { at("announce").textContent = text; }

function showProblem(message, status) {
  at("problem").textContent = message;
  at("problem").hidden = !message;
  if (status === 401) askForKey();
}

function askForKey() {
  at("key-field").hidden = false;
  document.body.classList.add("with-settings");
  at("toggle-settings").setAttribute("aria-expanded", "true");
  at("key").focus();
}

function setRunning(controller) {
  const focused = document.activeElement;
  running = controller;
  at("send").hidden = controller !== null;
  at("stop").hidden = controller === null;
  // A button that hides would take the place of a keyboard user with it.
  if (controller && focused === at("send")) at("stop").focus();
  if (!controller && focused === at("stop")) at("prompt").focus();
}

function grow() {
  const field = at("prompt");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

function showTheme() {
  const chosen = document.documentElement.dataset.theme;
  const dark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  at("theme").setAttribute("aria-pressed", String(dark));
  return dark;
}

function connectControls() {
  for (const id of ["temperature", "top-p"]) {
    const show = () => { at(`${id}-value`).value = Number(at(id).value).toFixed(2); };
    at(id).addEventListener("input", show);
    show();
  }
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  at("key").value = sessionStorage.getItem("key") ?? "";
  at("key").addEventListener("change", () => {
    sessionStorage.setItem("key", at("key").value.trim());
    start();
  });
  at("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = showTheme() ? "light" : "dark";
    localStorage.setItem("theme", document.documentElement.dataset.theme);
    showTheme();
  });
  at("toggle-settings").addEventListener("click", () => {
    const open = document.body.classList.toggle("with-settings");
    at("toggle-settings").setAttribute("aria-expanded", String(open));
  });
}

function connectComposer() {
  at("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = at("prompt").value;
    if (running || !text.trim() || !models.length) return;
    at("prompt").value = "";
    grow();
    send(text);
  });
  at("prompt").addEventListener("input", grow);
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      at("composer").requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing) running?.abort();
  });
  at("stop").addEventListener("click", () => { running?.abort(); at("prompt").focus(); });
  at("new-chat").addEventListener("click", () => {
    running?.abort();
    messages = [];
    at("messages").replaceChildren();
    at("welcome").hidden = false;
    showProblem("");
    showWeights({});
    at("prompt").focus();
  });
}

async function start() {
  try {
    await loadModels();
    showProblem("");
    if (sessionStorage.getItem("key")) at("key-field").hidden = false;
  } catch (error) {
    const missing = error.status === 401 && !at("key").value;
    showProblem(missing ? "This server asks for an API key." : error.message, error.status);
  }
}

const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
showTheme();
connectControls();
connectComposer();
start();
