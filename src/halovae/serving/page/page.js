// The page's form, its list of jobs, and its connection to the server.
import { curl, duration, facts, plan } from "./job.js";
import { el, short, show } from "./dom.js";

const SILENCE = 40_000; // ms without a byte after which the stream is dead: the server sends one every 15 s
const ROOT = new URL(".", location.href).pathname.slice(0, -1); // of a server behind a proxy's prefix
const FIELDS = ["prompt", "size", "num_inference_steps", "num_frames", "fps", "seed", "negative_prompt"];
const CARD_SAYS = ["cancelled", "out_of_memory", "timeout", "internal_error"]; // codes of jobs that failed
const STATUSES = { queued: "Waiting", in_progress: "Running", completed: "Done", failed: "Failed" };
const STAGES = { waiting: "Waiting", denoising: "Denoising", decoding: "Decoding" };
const $ = id => document.getElementById(id);
const form = $("form"), cards = new Map(), sent = new Map();
let model = null, busy = false, wake = () => {};

const pathOf = job => `${ROOT}/v1/${job.object}s/${job.id}`;
const say = text => { $("said").textContent = text; };

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (form.key.value) headers.Authorization = "Bearer " + form.key.value;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  const error = (await answer.json().catch(() => null))?.error;
  const message = error?.message ?? `${answer.status} ${answer.statusText}`;
  throw Object.assign(new Error(message), { param: answer.status === 401 ? "key" : error?.param, code: error?.code });
}

// The form
function wrong(name, message, focus = true) {
  const input = form.elements[name];
  input.closest(".field").hidden = false;
  input.setAttribute("aria-invalid", "true");
  show($(`${name}-wrong`), message);
  if (focus) input.focus();
}
function right(input) {
  input.removeAttribute("aria-invalid");
  show($(`${input.name}-wrong`), "");
}
const complaint = input => input.validity.patternMismatch ? `Expected ${input.title}.` : input.validationMessage;
function refused(error) {
  const name = ["input_reference", "image"].includes(error.param) ? "picture" : error.param;
  if ([...FIELDS, "picture", "key"].includes(name)) wrong(name, error.message);
  else $("error").textContent = error.message;
}
const inputs = () => [...form.elements].filter(input => input.name && !input.closest(".field").hidden);

form.addEventListener("submit", async event => {
  event.preventDefault();
  $("error").textContent = "";
  inputs().forEach(right);
  const bad = inputs().filter(input => !input.validity.valid);
  for (const input of bad.reverse()) wrong(input.name, complaint(input)); // the first one keeps the focus
  if (bad.length || busy) return;
  if (!model) { $("error").textContent = "The server has not been reached yet."; return; }
  const video = model.makes === "video", path = ROOT + (video ? "/v1/videos" : "/v1/images/generations");
  const given = inputs().filter(input => FIELDS.includes(input.name) && input.value.trim());
  const fields = { ...Object.fromEntries(given.map(input => [input.name, input.value.trim()])), preview_every: 5 };
  const asked = { negative: form.negative_prompt.value.trim(), pictures: form.picture.files.length };
  if (!video) fields.response_format = "url";
  busy = video; // a request for pictures is answered when they are done
  try {
    const answer = asked.pictures
      ? call(path.replace("generations", "edits"), { method: "POST", body: filled(fields, video) })
      : call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(fields) });
    if (!video) say("Submitted.");
    const made = await (await answer).json();
    sent.set(video ? made.id : made.data[0].url.split("/").at(-2), asked);
    if (video) say("Submitted.");
  } catch (error) {
    if (video || error.param || !CARD_SAYS.includes(error.code)) refused(error);
  } finally { busy = false; }
});
function filled(fields, video) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) body.append(name, value);
  for (const picture of form.picture.files) body.append(video ? "input_reference" : "image", picture);
  return body;
}
form.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
});
let typed = 0;
form.addEventListener("input", ({ target }) => {
  right(target);
  lengths();
  if (target.name === "key") { clearTimeout(typed); typed = setTimeout(() => wake(), 400); }
});
function lengths() {
  const seconds = form.num_frames.value / form.fps.value;
  if (seconds > 0 && seconds < Infinity) show($("num_frames-hint"), `${seconds.toFixed(1)} s of video.`);
  else show($("num_frames-hint"), form.num_frames.value ? "" : "Empty: the model's own.");
}

// Jobs
function shown(job) {
  let card = cards.get(job.id);
  if (job.gone) { if (card) forget(card); return; }
  if (!card) cards.set(job.id, card = blank(job));
  const before = card.job?.status, running = ["queued", "in_progress"];
  card.job = job;
  card.at = performance.now();
  if (job.status === "in_progress") {
    card.first ??= { at: card.at, progress: job.progress };
    if (job.progress < card.first.progress) card.first = { at: card.at, progress: job.progress }; // tried again
  } else card.first = null;
  card.root.dataset.status = job.status;
  card.bar.hidden = !running.includes(job.status);
  card.bar.value = job.progress;
  show(card.status, (job.status === "in_progress" && STAGES[job.stage]) || STATUSES[job.status]);
  show(card.drop, card.bar.hidden ? "Delete" : "Cancel");
  tick(card);
  if (!card.bar.hidden && job.preview && job.preview !== card.drawn) preview(card, job.preview);
  if (job.status === before) return;
  if (job.status === "completed") finish(card);
  else card.media.replaceChildren();
  if (job.status === "failed") show(card.failure, `${job.error.message} (${job.error.code})`);
  card.facts.replaceChildren(...plan(job), facts(job));
  if (running.includes(before) && card.bar.hidden) say(`${card.status.textContent}: ${short(job.prompt, 80)}`);
}

// A card that says nothing of the job's state yet.
function blank(job) {
  const card = { root: el("article", "", { tabIndex: -1 }), status: el("strong"),
    detail: el("span", "", { className: "detail" }), bar: el("progress", "", { max: 100, ariaLabel: "Progress" }),
    media: el("div", "", { className: "media" }),
    facts: el("div", "", { className: "facts" }), failure: el("p", "", { className: "wrong failure" }),
    wrong: el("p", "", { className: "wrong", role: "alert" }), saves: el("span", "", { className: "saves" }),
    drop: el("button", "", { type: "button", className: "danger" }), addresses: [], gone: false };
  const prompt = el("p", short(job.prompt, 300), { id: `prompt-${job.id}` });
  const copy = el("button", "Copy as curl", { type: "button", onclick: () => copied(card, copy) });
  card.drop.onclick = () => card.job.status === "completed" ? ask(card) : drop(card);
  card.root.setAttribute("aria-labelledby", prompt.id);
  for (const button of [copy, card.drop]) button.setAttribute("aria-describedby", prompt.id);
  const top = el("div", "", { className: "top" }), result = el("div", "", { className: "result" });
  const actions = el("div", "", { className: "actions" });
  top.append(card.status, card.detail);
  result.append(card.media, card.facts);
  actions.append(card.saves, copy, card.drop);
  card.root.append(top, prompt, card.bar, card.failure, result, actions, card.wrong);
  $("none").hidden = true;
  $("results").after(card.root);
  return card;
}

// How far a running job is. The server says how long it takes, or the events so far do.
function tick(card) {
  const job = card.job, parts = [], passed = (performance.now() - card.at) / 1000;
  if (job.status === "queued") parts.push("in the queue");
  if (job.status === "in_progress") {
    if (job.step != null && job.steps != null) parts.push(`step ${job.step} of ${job.steps}`);
    parts.push(`${job.progress} %`);
    const gained = job.progress - card.first.progress, took = (card.at - card.first.at) / 1000;
    const left = job.eta_seconds ?? (gained > 0 ? (100 - job.progress) * took / gained : null);
    if (left != null) parts.push(duration(left - passed));
  }
  show(card.detail, parts.join(", "));
}
setInterval(() => { for (const card of cards.values()) if (card.job.status === "in_progress") tick(card); }, 1000);

// The media element's address of a path. With a key, only fetch() can send it.
async function source(card, path) {
  if (!form.key.value) return path;
  const address = URL.createObjectURL(await (await call(path)).blob());
  if (card.gone) URL.revokeObjectURL(address);
  card.addresses.push(address);
  return address;
}
async function preview(card, path) {
  card.drawn = path;
  try {
    const address = URL.createObjectURL(await (await call(path.startsWith(`${ROOT}/`) ? path : ROOT + path)).blob());
    const picture = el("img", "", { alt: "Preview", src: address, onload: () => URL.revokeObjectURL(address) });
    if (card.drawn === path && card.job.status === "in_progress") card.media.replaceChildren(framed(card.job, picture));
  } catch { /* the next one may come through */ }
}
function framed(job, node) {
  const frame = el("div");
  const [across, down] = job.size.split("x").map(Number);
  frame.style.aspectRatio = `${across} / ${down}`;
  frame.style.maxWidth = `min(28rem, ${24 * across / down}rem)`;
  frame.append(node);
  return frame;
}

// Thumbnails and pictures are fetched when they are scrolled to.
const loads = new WeakMap();
const visible = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries) if (isIntersecting) {
    visible.unobserve(target);
    loads.get(target)();
  }
}, { rootMargin: "200px" });

function finish(card) {
  const job = card.job, video = job.object === "video";
  card.media.replaceChildren();
  card.saves.replaceChildren();
  for (let index = 0; index < job.n; index++) {
    const path = `${pathOf(job)}/content?index=${index}`, which = job.n > 1 ? ` ${index + 1}` : "";
    const picture = el("img", "", { alt: video ? "" : short(job.prompt, 100) });
    const play = el("button", "", { type: "button", className: "play", ariaLabel: `Play${which}` });
    play.append(picture);
    const frame = framed(job, video ? play : picture);
    card.media.append(frame);
    play.onclick = () => played(card, frame, play, path);
    loads.set(frame, async () => {
      const drawn = video ? `${path}&variant=thumbnail` : path;
      picture.onerror = () => {
        picture.style.visibility = "hidden";
        unplayable(card, drawn, "this browser cannot show the picture");
      };
      try { picture.src = await source(card, drawn); } catch (error) { show(card.wrong, error.message); }
    });
    visible.observe(frame);
    const save = el("button", `Download${which}`, { type: "button", onclick: () => saved(card, path, index) });
    save.setAttribute("aria-describedby", `prompt-${job.id}`);
    card.saves.append(save);
  }
}
// Say why an element could not load what it was given.
async function unplayable(card, path, otherwise) {
  show(card.wrong, await call(path).then(() => otherwise, error => error.message));
}
async function played(card, frame, button, path) {
  show(card.wrong, "");
  const video = el("video", "", { controls: true, autoplay: true, muted: true, playsInline: true, tabIndex: 0,
    loop: !matchMedia("(prefers-reduced-motion: reduce)").matches, poster: button.firstChild.src,
    ariaLabel: short(card.job.prompt, 100) });
  video.onerror = () => {
    frame.replaceChildren(button);
    button.focus();
    unplayable(card, path, "this browser cannot play the video");
  };
  try {
    video.src = await source(card, path);
    frame.replaceChildren(video);
    video.focus();
  } catch (error) { show(card.wrong, error.message); }
}
async function saved(card, path, index) {
  show(card.wrong, "");
  try {
    if (!form.key.value) (await call(path)).body.cancel(); // a link would show no error
    const name = `${card.job.id}${card.job.n > 1 ? `-${index}` : ""}.${card.job.object === "video" ? "mp4" : "png"}`;
    el("a", "", { href: await source(card, path), download: name }).click();
  } catch (error) { show(card.wrong, error.message); }
}

function forget(card) {
  const held = card.root.contains(document.activeElement), next = card.root.nextElementSibling;
  card.gone = true;
  card.addresses.forEach(address => URL.revokeObjectURL(address));
  cards.delete(card.job.id);
  card.root.remove();
  $("none").hidden = cards.size > 0;
  if (held) (next?.tagName === "ARTICLE" ? next : $("results")).focus();
}
async function drop(card) {
  show(card.wrong, "");
  try {
    await call(pathOf(card.job), { method: "DELETE" });
    say(`${card.bar.hidden ? "Deleted" : "Cancelled"}: ${short(card.job.prompt, 80)}`);
    if (!card.gone) forget(card);
  } catch (error) { show(card.wrong, error.message); }
}
function ask(card) {
  $("ask-what").textContent = short(card.job.prompt, 200);
  $("ask").returnValue = "";
  $("ask").onclose = () => { if ($("ask").returnValue === "delete") drop(card); };
  $("ask").showModal();
}

async function copied(card, button) {
  const command = curl(card.job, location.origin + ROOT, model, sent.get(card.job.id), form.key.value !== "");
  card.root.querySelector(".command")?.remove();
  try {
    await navigator.clipboard.writeText(command); // only there on localhost and over HTTPS
    button.textContent = "Copied";
    say("Copied.");
    setTimeout(() => { button.textContent = "Copy as curl"; }, 2000);
  } catch {
    const text = el("textarea", command, { className: "command", readOnly: true, ariaLabel: "The curl command" });
    card.root.append(text);
    text.focus();
    text.select();
  }
}

// The connection
let lost = "connecting", starting = false;
function tell() {
  show($("state"), lost || (starting ? "the ranks are starting" : "ready"));
  $("state").dataset.state = lost.startsWith("not") ? "lost" : lost || starting ? "wait" : "ready";
}
function learned(entry) {
  model = entry;
  const video = model.makes === "video", usual = model.defaults ?? {}, own = "Empty: the model's own.";
  show($("model"), model.id);
  for (const name of ["size", "num_inference_steps", "num_frames", "fps"]) {
    const input = form.elements[name], value = String(usual[name] ?? "");
    if (!input.value || input.value === input.dataset.usual) input.value = value;
    input.dataset.usual = value;
    show($(`${name}-hint`), value ? "" : own);
  }
  show($("size-hint"), `${usual.size ? "" : own + " "}Multiples of ${model.multiple_of}.`);
  lengths();
  for (const node of [form.num_frames, form.fps]) node.closest(".field").hidden = node.closest(".pair").hidden = !video;
  form.picture.closest(".field").hidden = !(model.pictures.at(-1) > 0);
  form.picture.multiple = model.pictures.at(-1) > 1;
  form.picture.required = !model.pictures.includes(0);
  $("generate").disabled = false;
  right(form.key);
}
// Seeds have up to 63 bits: they stay text.
const parsed = text => JSON.parse(text, (name, value, context) => name === "seed" ? context?.source ?? value : value);

async function listen() {
  const stop = new AbortController(), seen = new Set();
  let dead = 0, prune = 0;
  const alive = () => {
    clearTimeout(dead);
    dead = setTimeout(() => stop.abort(new Error("the server is silent")), SILENCE);
  };
  try {
    alive();
    learned((await (await call(`${ROOT}/v1/models`, { signal: stop.signal })).json()).data[0]);
    const { body } = await call(`${ROOT}/v1/jobs`, { signal: stop.signal });
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    lost = "";
    tell();
    prune = setTimeout(() => { // those that were deleted meanwhile
      for (const [id, card] of cards) if (!seen.has(id)) forget(card);
    }, 3000);
    for (let rest = "";;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("the connection was lost");
      alive();
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) if (event.startsWith("data: ")) {
        const job = parsed(event.slice(6));
        seen.add(job.id);
        shown(job);
      }
    }
  } finally { clearTimeout(dead); clearTimeout(prune); }
}
async function follow() {
  for (let wait = 1;; wait = Math.min(15, 2 * wait)) {
    const began = performance.now();
    try { await listen(); } catch (error) {
      const key = error.param === "key";
      if (performance.now() - began > 20_000) wait = 1;
      if (key && form.key.value) wrong("key", error.message, false);
      if (key) form.key.closest(".field").hidden = false;
      lost = `not connected: ${error.message}` + (key ? "" : "; trying again");
      tell();
      await new Promise(resolve => { wake = resolve; setTimeout(resolve, key ? 30_000 : 1000 * wait); });
    }
  }
}
addEventListener("online", () => wake());
document.addEventListener("visibilitychange", () => { if (!document.hidden) wake(); });
// Groups of ranks on a Ray cluster. The server says nothing of them if there are none.
function replicas(found) {
  $("replicas").hidden = !found.length;
  const rows = $("replicas").querySelector("tbody");
  while (rows.rows.length > found.length) rows.deleteRow(-1);
  for (const [index, one] of found.entries()) {
    const row = rows.rows[index] ?? rows.insertRow();
    const state = one.state === "ready" || !one.reason ? one.state : `${one.state} (${one.reason})`;
    row.dataset.state = one.state;
    const texts = [one.name, state, one.host, one.jobs, one.completed, one.restarts];
    for (const [column, text] of texts.entries()) show(row.cells[column] ?? row.insertCell(), String(text));
  }
}
async function health() {
  try {
    const headers = form.key.value ? { Authorization: "Bearer " + form.key.value } : {};
    const found = await (await fetch(`${ROOT}/health`, { headers })).json();
    starting = found.status !== "ready";
    replicas(found.replicas ?? []);
    tell();
  } catch { /* follow() says so */ }
}
follow();
health();
setInterval(() => { if (!document.hidden) health(); }, 3000);
