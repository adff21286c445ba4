"use strict";

const $ = (id) => document.getElementById(id);
const chosen = { before: [], after: [], inputs: [] };
let about = null, tasks = [], running = null;

// --- files

function take(id, files) {
  const images = [...files].filter((file) => file.type.startsWith("image/") || !file.type);
  if (!images.length) return;
  chosen[id] = id === "inputs" ? [...chosen.inputs, ...images] : images.slice(0, 1);
  show(id);
}

function show(id) {
  if (id === "inputs") {
    $("chosen").replaceChildren(...chosen.inputs.map((file, i) => {
      const item = document.createElement("li"), remove = document.createElement("button");
      remove.type = "button";
      remove.textContent = "×";
      remove.ariaLabel = `Remove ${file.name}`;
      remove.onclick = () => { chosen.inputs.splice(i, 1); show(id); };
      item.append(picture(URL.createObjectURL(file), file.name), remove);
      return item;
    }));
    return;
  }
  $(id).querySelector("img")?.remove();
  $(id).append(picture(URL.createObjectURL(chosen[id][0]), id));
  $(id).classList.add("filled");
}

function picture(source, alt) {
  const image = new Image();
  image.src = source;
  image.alt = alt;
  return image;
}

for (const id of Object.keys(chosen)) {
  const field = $(id).querySelector("input");
  field.onchange = () => { take(id, field.files); field.value = ""; };
  $(id).ondragover = (event) => { event.preventDefault(); $(id).classList.add("over"); };
  $(id).ondragleave = () => $(id).classList.remove("over");
  $(id).ondrop = (event) => { event.preventDefault(); $(id).classList.remove("over"); take(id, event.dataTransfer.files); };
}
for (const name of ["dragover", "drop"]) addEventListener(name, (event) => event.preventDefault());  // a missed drop opens no file

// --- the model and its compiled prompts

async function load() {
  about = await (await fetch("/api/about")).json();
  const limits = about.limits;
  $("about").textContent = `${about.size} × ${about.size} pixels, ${about.layers} layers of ${about.dim}, ${about.xp_tokens} XP tokens · ` +
    `at most ${limits.upload_mb} MB and ${limits.images} images a request, ${limits.queue} requests in line · xprompt_jax ${about.version}`;
  $("form").elements.num_images.max = limits.images;
  $("form").elements.instruction.maxLength = limits.instruction;
  tasks = await (await fetch("/api/tasks")).json();
  for (const task of tasks) {
    const option = new Option(task.error ? `${task.name} (cannot be used)` : task.name, task.name);
    option.disabled = Boolean(task.error);
    option.title = task.error || "";
    $("task").append(option);
  }
  $("task").hidden = !tasks.length;
}

$("task").onchange = () => {
  const task = tasks.find((one) => one.name === $("task").value);
  $("pair").hidden = Boolean(task);
  $("shown").hidden = !task;
  $("shown").replaceChildren(...(task?.thumbnails ?? []).map((data) => picture(`data:image/png;base64,${data}`, "example")));
  $("form").elements.instruction.value = "";
  $("form").elements.instruction.placeholder = task ? task.instruction : "remove the rain";
};

// --- drawing

$("form").onsubmit = async (event) => {
  event.preventDefault();
  fail("");
  const form = new FormData($("form")), each = Number(form.get("num_images")) || 1;
  for (const id of Object.keys(chosen)) if (id === "inputs" || !form.get("task")) chosen[id].forEach((file) => form.append(id, file));
  const size = Object.values(chosen).flat().reduce((sum, file) => sum + file.size, 0) / 1e6;
  if (about && size > about.limits.upload_mb) return fail(`${size.toFixed(1)} MB of images; this server takes ${about.limits.upload_mb} MB`);
  running = new AbortController();
  $("draw").disabled = true;
  $("stop").hidden = false;
  $("status").textContent = "Sending …";
  try {
    const answer = await fetch("/api/draw", { method: "POST", body: form, signal: running.signal });
    if (!answer.ok) throw new Error((await answer.json()).error);
    const frames = frame(chosen.inputs, each);
    let last;
    for await (last of lines(answer.body)) react(last, frames);
    if (last?.event !== "done") throw new Error("the server broke off; is it still running?");
  } catch (error) {
    if (error.name === "AbortError") $("status").textContent = "Stopped.";
    else fail(error.message);
  } finally {
    $("draw").disabled = false;
    $("stop").hidden = true;
    $("progress").hidden = true;
  }
};

$("stop").onclick = () => running?.abort();

async function* lines(body) {
  let rest = "";
  for (const reader = body.pipeThrough(new TextDecoderStream()).getReader(); ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts.map((line) => JSON.parse(line));
  }
}

function frame(inputs, each) {
  const drawn = [];
  $("rows").replaceChildren(...inputs.map((file) => {
    const row = document.createElement("div");
    row.className = "row";
    row.append(figure("input", fine(picture(URL.createObjectURL(file), file.name))).whole);
    for (let i = 0; i < each; i++) {
      const one = figure(each > 1 ? `image ${i + 1}` : "drawn", null);
      drawn.push(one);
      row.append(one.whole);
    }
    return row;
  }));
  return drawn;
}

function figure(name, image) {
  const whole = document.createElement("figure"), box = document.createElement("div"), caption = document.createElement("figcaption");
  caption.textContent = name;
  if (image) box.append(image);
  whole.append(box, caption);
  return { whole, box, caption };
}

function react(told, frames) {
  if (told.event === "queued") {
    $("status").textContent = `Waiting: ${told.ahead} ahead in line.`;
  } else if (told.event === "compiled") {
    $("status").textContent = told.known ? "Example known." : `Example compiled in ${told.seconds.toFixed(1)} s.`;
    $("download").href = `/api/compiled/${told.key}`;
    $("download").textContent = `Keep the compiled prompt (${told.kib < 1024 ? `${Math.ceil(told.kib)} KiB` : `${(told.kib / 1024).toFixed(1)} MiB`})`;
    $("download").hidden = false;
  } else if (told.event === "row") {
    $("status").textContent = `Row ${told.row} of ${told.rows}`;
    $("progress").hidden = false;
    $("progress").value = told.row / told.rows;
    told.images.forEach((source, i) => paint(frames[i], source, told.row / told.rows));
  } else if (told.event === "done") {
    const count = told.images.length;
    $("status").textContent = `${count} image${count > 1 ? "s" : ""} in ${told.seconds.toFixed(1)} s.`;
    told.images.forEach((source, i) => {
      paint(frames[i], source, 1);
      const save = document.createElement("a");
      save.href = source;
      save.download = `drawn-${i}.png`;
      save.textContent = "save";
      frames[i].caption.append(save);
    });
  } else if (told.event === "error") {
    throw new Error(told.error);
  }
}

function fine(image) {  // pixels of small models are shown as they are
  if (about?.size < 128) image.className = "small";
  return image;
}

function paint({ box }, source, part) {
  const image = fine(picture(source, "drawn")), line = document.createElement("b");
  image.style.clipPath = `inset(0 0 ${100 * (1 - part)}% 0)`;  // what is not drawn yet is no image
  line.style.top = `${100 * part}%`;
  box.replaceChildren(image, ...(part < 1 ? [line] : []));
}

function fail(line) {
  $("error").textContent = line;
  $("error").hidden = !line;
  if (line) $("status").textContent = "";
}

load().catch(() => fail("The server does not answer; is it still running?"));
