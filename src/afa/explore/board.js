// The pictures of the page. The server sends parts of `state`; what needs no computing stays in the browser: opacity,
// wipe, kept settings, keys, and reading the photo that is dropped.
const root = element.querySelector(".afa");
const find = (name) => root.querySelector(name);
const state = { panes: [], look: [], why: [], legend: [], message: "", kept: null, other: null, point: null };
const escape = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

function stack(pane, from, inside = "") {
  const gray = pane.layer ? "gray" : "";
  const layer = pane.layer ? `<img class="layer" src="${pane.layer}" alt="">` : "";
  const star = state.point ? `<span class="star" style="left:${100 * state.point.x}%;top:${100 * state.point.y}%"></span>` : "";
  return `<div class="stack" tabindex="0" role="img" aria-label="${escape(pane.title)}: ${escape(pane.text)}" style="aspect-ratio:${from.ratio}">
    <img class="${gray}" src="${from.photo}" alt="">${layer}${inside}${star}</div>`;
}

function figure(pane) {
  const picture = pane.empty ? "" : stack(pane, state);
  return `<figure data-key="${pane.key}">${picture}<figcaption><b>${escape(pane.title)}</b>${escape(pane.text)}</figcaption></figure>`;
}

const chips = (legend) => [...new Set(legend.map((each) =>
  `<span class="chip"><i style="background:${each.color}"></i>${escape(each.name)}</span>`))].join("");

const sources = () => ({ now: state, kept: state.kept, other: state.other });
const names = { now: "now", kept: "kept settings", other: "other run" };

function choices(select, wanted) {
  const before = select.value || wanted;
  select.innerHTML = Object.entries(sources()).filter(([, from]) => from).map(([key, from]) =>
    from.panes.filter((pane) => !pane.empty).map((pane) =>
      `<option value="${key}:${pane.key}">${escape(pane.title)}, ${names[key]}</option>`).join("")).join("");
  select.value = before;
  if (select.selectedIndex < 0) select.value = wanted;
  if (select.selectedIndex < 0) select.selectedIndex = 0;
}

const picked = (select) => {
  const [source, key] = select.value.split(":");
  const from = sources()[source];
  return from ? [from, from.panes.find((pane) => pane.key === key)] : [null, null];
};

let cut = 50;
function wipe() {
  const [[leftFrom, left], [rightFrom, right]] = [picked(find(".left")), picked(find(".right"))];
  if (!left || !right) { find(".wipe").innerHTML = ""; return; }
  const over = `<div style="position:absolute;inset:0;background:#222;clip-path:inset(0 0 0 ${cut}%)">
    <img class="${right.layer ? "gray" : ""}" src="${rightFrom.photo}" alt="">
    ${right.layer ? `<img class="layer" src="${right.layer}" alt="">` : ""}</div><span class="cut" style="left:${cut}%"></span>`;
  find(".wipe").innerHTML = stack(left, leftFrom, over) +
    `<input type="range" min="0" max="100" value="${cut}" aria-label="place of the wipe"><div class="bar">${chips([...leftFrom.legend, ...rightFrom.legend])}</div>`;
  find(".wipe input").oninput = (event) => moveCut(event.target.value);
}

function moveCut(value) {
  cut = value;
  find(".wipe [style*=clip-path]").style.clipPath = `inset(0 0 0 ${cut}%)`;
  find(".wipe .cut").style.left = `${cut}%`;
  find(".wipe input").value = cut;
}

function render() {
  const focused = document.activeElement?.closest?.(".afa figure")?.dataset.key;
  find(".message").textContent = state.message;
  find(".why").innerHTML = state.why.map((line) => `<li>${escape(line)}</li>`).join("");
  find(".legend").innerHTML = chips(state.legend);
  find(".panes").innerHTML = state.panes.map(figure).join("");
  find(".look").innerHTML = state.look.map(figure).join("");
  if (state.sheet) {
    const { src, heads, block, head } = state.sheet;
    const columns = 1 + Math.max(...heads);
    find(".sheet img").src = src;
    find(".sheet-text").textContent = `Attention of the encoder from the star: ${heads.length} rows of blocks, the first ` +
      `at the top; first their mean, then their heads, up to ${columns - 1}. Click one to enlarge it.`;
    find(".mark").style.cssText = block ? `left:${(100 * head) / columns}%;top:${(100 * (block - 1)) / heads.length}%;` +
      `width:${100 / columns}%;height:${100 / heads.length}%` : "display:none";
  }
  choices(find(".left"), "now:pseudo");
  choices(find(".right"), "now:prediction");
  wipe();
  if (focused) root.querySelector(`figure[data-key="${focused}"] .stack`)?.focus({ preventScroll: true });
}

function take(value) {
  if (!value) return;
  // What was asked of an image before the next one was open: ask again.
  if (value.of && value.of !== (value.opened ?? state.opened)) { trigger("again"); return; }
  if (value.opened && value.opened !== state.opened) state.kept = null;
  if (value.download) {
    const link = document.createElement("a");
    link.href = `data:application/octet-stream;base64,${value.download.data}`;
    link.download = value.download.name;
    link.click();
  }
  Object.assign(state, value, { download: null });
  root.classList.remove("busy");
  render();
  if (waiting && (value.opened || value.message)) setTimeout(() => { waiting = false; step(0); });
}

// Presses that come while an image is encoded add up.
let [waiting, steps] = [false, 0];
function step(by) {
  steps += by;
  if (waiting || !steps) return;
  waiting = true;
  root.classList.add("busy");
  trigger("step", { by: steps });
  steps = 0;
}

function open(file) {
  if (!file) return;
  const reader = new FileReader();
  root.classList.add("busy");
  reader.onload = () => trigger("photo", { name: file.name, data: reader.result.slice(reader.result.indexOf(",") + 1) });
  reader.onerror = () => take({ message: `${file.name}: it cannot be read` });
  reader.readAsDataURL(file);
}

const look = (x, y) => trigger("point", { x: Math.min(0.999, Math.max(0, x)), y: Math.min(0.999, Math.max(0, y)) });

find(".sheet").addEventListener("click", (event) => {
  const [box, heads] = [find(".sheet img").getBoundingClientRect(), state.sheet?.heads ?? []];
  const row = Math.floor((heads.length * (event.clientY - box.top)) / box.height);
  const head = Math.floor(((1 + Math.max(...heads)) * (event.clientX - box.left)) / box.width);
  if (head <= heads[row]) trigger("map", { block: row + 1, head });
});
root.addEventListener("click", (event) => {
  const target = event.target.closest(".stack");
  if (!target) return;
  const box = target.getBoundingClientRect();
  const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  if (target.closest(".wipe")) moveCut(Math.round(100 * x)); else look(x, y);
});
root.addEventListener("keydown", (event) => {
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!move || !event.target.closest("figure .stack") || !state.point) return;
  event.preventDefault();
  event.stopPropagation();
  look(state.point.x + move[0] * state.point.dx, state.point.y + move[1] * state.point.dy);
});
find(".opacity").oninput = (event) => root.style.setProperty("--opacity", event.target.value / 100);
find(".file input").onchange = (event) => { open(event.target.files[0]); event.target.value = ""; };
find(".keep").onclick = () => {
  state.kept = { photo: state.photo, ratio: state.ratio, panes: state.panes, legend: state.legend };
  choices(find(".left"), "now:pseudo");
  choices(find(".right"), "now:prediction");
  find(".left").value = "kept:pseudo";
  find(".right").value = "now:pseudo";
  wipe();
};
for (const select of [find(".left"), find(".right")]) select.onchange = wipe;
document.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by || event.ctrlKey || event.altKey || event.metaKey || event.target.closest?.("input, textarea, select, [role]")) return;
  step(by);
});
document.addEventListener("afa-step", (event) => step(event.detail));
document.addEventListener("afa-busy", () => root.classList.add("busy"));
document.addEventListener("dragover", (event) => { event.preventDefault(); root.classList.add("dropping"); });
document.addEventListener("dragleave", () => root.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  root.classList.remove("dropping");
  open(event.dataTransfer.files[0]);
});
watch("value", () => take(props.value));
take(props.value);
