// The reader: shows one document at one draw and context, its masked chunks coloured, candidates in one tooltip.
// All text goes into the page as text nodes, never as markup. MARK … END_MARK enclose what can't be seen as it is.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const [textBox, tip, legend] = ["text", "tip", "legend"].map(byId);
  const PROBABILITY = [[0.01, "below 1 %"], [0.1, "1 – 10 %"], [0.5, "10 – 50 %"], [0.9, "50 – 90 %"], [Infinity, "90 % and more"]];
  const GAIN = [[-1, "plain surer by over 1 nat"], [-0.2, "plain surer"], [0.2, "about equal"], [1, "compdemo surer"], [Infinity, "compdemo surer by over 1 nat"]];
  const MEASURES = {
    gold: { name: "the text’s probability", steps: PROBABILITY, of: (s, m) => Math.exp(s.gold[m]) },
    best: { name: "best filling’s probability", steps: PROBABILITY, of: (s, m) => s.best[m][1], needs: (s) => s.best },
    gain: { name: "compdemo against plain", steps: GAIN, of: (s, m, all) => all.compdemo.gold[m] - all.plain.gold[m],
      needs: (s, all) => all.compdemo && all.plain },
  };

  const element = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const percent = (p) => p >= 0.0995 ? `${(100 * p).toFixed(1)} %` : p >= 0.0001 ? `${(100 * p).toPrecision(2)} %` : "< 0.01 %";
  const nats = (x) => x.toFixed(2).replace("-", "−");
  const step = (measure, value) => measure.steps.findIndex(([limit]) => value < limit);

  // Text in which hidden characters and, on request, white space can be seen.
  function addText(node, text, spaces) {
    for (const part of text.split(/(\ue000[^\ue001]*\ue001)/)) {
      if (part.startsWith("\ue000")) node.append(element("span", "mark", part.slice(1, -1)));
      else if (!spaces) node.append(part);
      else for (const piece of part.split(/(\n|\t| )/)) {
        if (piece === "\n") node.append(element("span", "space", "⏎"), spaces === "lines" ? "\n" : "");
        else if (piece === "\t") node.append(element("span", "space", "⇥"), spaces === "lines" ? "\t" : "");
        else if (piece === " " && spaces === "all") node.append(element("span", "space", "␣"));
        else if (piece) node.append(piece);
      }
    }
    return node;
  }

  const state = { document: 0, draw: 0, context: "", measure: "gold", filling: "gold" };
  const here = () => data.documents[state.document];
  const draw = () => here().draws[state.draw];
  const scores = () => draw().contexts[state.context];
  let chunks = [];   // the spans of the masked chunks, in order
  let current = -1;  // the one whose candidates are shown

  function options(select, entries, chosen) {
    select.replaceChildren(...entries.map(([value, name]) => {
      const option = element("option", "", name);
      option.value = value;
      option.selected = String(value) === String(chosen);
      return option;
    }));
    select.disabled = entries.length < 2;
  }

  function chooseDocument(index) {
    state.document = (index + data.documents.length) % data.documents.length;
    const draws = here().draws;
    state.draw = Math.floor(draws.length / 2);
    options(byId("document"), data.documents.map((d, i) => [i, `${d.name} (position ${d.position})`]), state.document);
    options(byId("draw"), draws.map((d, i) => [i, `${d.draw}, t = ${d.t.toFixed(2)}`]), state.draw);
    show();
  }

  function show() {
    const all = draw().contexts;
    if (!(state.context in all)) state.context = "compdemo" in all ? "compdemo" : Object.keys(all)[0];
    options(byId("context"), Object.keys(all).map((name) => [name, name]), state.context);
    const usable = Object.entries(MEASURES).filter(([, m]) => !m.needs || m.needs(scores(), all));
    if (!usable.some(([name]) => name === state.measure)) state.measure = "gold";
    options(byId("measure"), usable.map(([name, m]) => [name, m.name]), state.measure);
    const measure = MEASURES[state.measure];
    legend.replaceChildren(...measure.steps.map(([, name], i) => element("li", `s${i}`, name)));
    hide();
    const place = new Map(draw().masked.map((chunk, m) => [chunk, m]));
    chunks = [];
    textBox.replaceChildren(...here().messages.map((message) => {
      const box = element("div", message.trainable ? "message" : "message prompt");
      if (here().chat) box.append(element("div", "role", message.trainable ? message.role : `${message.role} (not trained)`));
      const content = element("div", "content");
      content.dir = "auto";
      for (const [text, chunk] of message.parts) {
        const m = place.get(chunk);
        if (m === undefined) addText(content, text);
        else content.append(chunkSpan(text, m, measure, all));
      }
      box.append(content);
      return box;
    }));
    if (chunks.length) chunks[0].tabIndex = 0;
    const [shown, total] = here().chunks;
    const mean = scores().gold.reduce((a, b) => a + b, 0) / Math.max(chunks.length, 1);
    byId("summary").textContent = `${chunks.length} of ${shown} chunks masked` + (total > shown ? ` (the first ${shown} of ${total} are shown)` : "")
      + (chunks.length ? `; mean log-likelihood ${nats(mean)} nats per chunk` : "") + (here().cut ? "; the document was cut to the length limit" : "")
      + (scores().best ? "; dotted underline: the teacher’s best filling is another" : "") + ".";
  }

  function chunkSpan(text, m, measure, all) {
    const span = element("span", `chunk s${step(measure, measure.of(scores(), m, all))}`);
    if (scores().rank && scores().rank[m] !== 0) span.classList.add("miss");
    const best = scores().best && data.strings[scores().best[m][0]];
    const shown = state.filling === "best" && best !== undefined ? best : state.filling === "mask" ? "\u2591".repeat(Math.max(2, text.length)) : text;
    addText(span, shown || "\ue000empty\ue001", "lines");
    span.tabIndex = -1;
    span.setAttribute("role", "button");
    span.setAttribute("aria-describedby", "tip");
    span.dataset.m = m;
    span.dataset.text = text;
    chunks.push(span);
    return span;
  }

  function fillTip(m) {
    const s = scores(), all = draw().contexts;
    const chunk = draw().masked[m], tokens = here().tokens[chunk];
    const head = element("div");
    head.append(addText(element("b"), chunks[m].dataset.text, "all"));
    const parts = [head, element("div", "figures", `${percent(Math.exp(s.gold[m]))}, ${nats(s.gold[m])} nats, ${tokens} teacher token${tokens > 1 ? "s" : ""}`)];
    if (Object.keys(all).length > 1)
      parts.push(element("div", "note", Object.entries(all).map(([name, c]) => `${name} ${percent(Math.exp(c.gold[m]))}`).join(" · ")));
    if (state.context === "compdemo")
      parts.push(element("div", "note", draw().split[m] ? "in A: shown in pass 1, scored in pass 2" : "in B: scored in pass 1, shown in pass 2"));
    if (s.best) {
      const list = element("ol");
      let rest = 1;
      for (let j = 0; j < s.best[m].length; j += 2) {
        const p = s.best[m][j + 1];
        rest -= p;
        list.append(row(data.strings[s.best[m][j]], p, s.rank[m] === j / 2 ? "gold" : ""));
      }
      if (s.rank[m] < 0 || s.rank[m] * 2 >= s.best[m].length) {
        list.append(row(chunks[m].dataset.text, Math.exp(s.gold[m]), "gold"));
        rest -= Math.exp(s.gold[m]);
      }
      const other = row("", Math.max(rest, 0), "other");
      other.firstChild.textContent = "all others";
      list.append(other);
      parts.push(list);
    } else parts.push(element("div", "note", "this cache holds no candidates (no topk lane)"));
    tip.replaceChildren(...parts);
  }

  function row(text, p, className) {
    const item = element("li", className), bar = element("span", "bar"), fill = element("i");
    fill.style.width = `${100 * Math.min(p, 1)}%`;
    bar.append(fill);
    const filling = addText(element("span", "filling"), text, "all");
    if (className === "gold") filling.append(" ◂");
    item.append(filling, bar, element("span", "", percent(p)));
    return item;
  }

  function point(m) {
    if (m === current) return;
    if (current >= 0) chunks[current].classList.remove("here");
    current = m;
    const span = chunks[m];
    span.classList.add("here");
    fillTip(m);
    tip.hidden = false;
    const [box] = span.getClientRects(), size = tip.getBoundingClientRect();
    const [over, under] = [box.top - size.height - 8, box.bottom + 8];
    const top = under + size.height <= innerHeight ? under : over >= 0 ? over : Math.max(8, innerHeight - size.height - 8);
    const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - size.width - 8));
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${top + scrollY}px`;
  }

  // On a phone the candidates lie at the window's foot: move the chunk out from under them. Not before the tap is over,
  // or it ends on what has moved to its place.
  function uncover() {
    if (current < 0 || getComputedStyle(tip).position !== "fixed") return;
    scrollBy(0, Math.max(0, chunks[current].getClientRects()[0].bottom + 12 - tip.getBoundingClientRect().top));
  }

  function hide() {
    if (current >= 0 && chunks[current]) chunks[current].classList.remove("here");
    current = -1;
    tip.hidden = true;
  }

  const at = (event) => event.target.closest && event.target.closest(".chunk");
  textBox.addEventListener("pointerover", (event) => { const span = at(event); if (span && event.pointerType !== "touch") point(+span.dataset.m); });
  textBox.addEventListener("pointerout", (event) => {
    if (event.pointerType === "mouse" && at(event)) { const kept = document.activeElement; if (kept && kept.classList.contains("chunk")) point(+kept.dataset.m); else hide(); }
  });
  textBox.addEventListener("focusin", (event) => { const span = at(event); if (span) point(+span.dataset.m); });
  textBox.addEventListener("focusout", hide);
  textBox.addEventListener("click", (event) => { const span = at(event); if (span) { span.focus({ preventScroll: true }); point(+span.dataset.m); uncover(); } });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  addEventListener("scroll", () => {
    if (current < 0) return;
    const box = chunks[current].getBoundingClientRect();
    if (box.bottom < 0 || box.top > innerHeight) hide();
  }, { passive: true });
  document.addEventListener("click", (event) => { if (!at(event)) hide(); });
  textBox.addEventListener("keydown", (event) => {
    const span = at(event);
    if (!span) return;
    const m = +span.dataset.m;
    const next = { ArrowRight: m + 1, ArrowDown: m + 1, ArrowLeft: m - 1, ArrowUp: m - 1, Home: 0, End: chunks.length - 1 }[event.key];
    if (next === undefined || !chunks[next]) return;
    event.preventDefault();
    span.tabIndex = -1;
    chunks[next].tabIndex = 0;
    chunks[next].focus();
    uncover();
  });
  byId("document").addEventListener("change", (event) => chooseDocument(+event.target.value));
  byId("previous").addEventListener("click", () => chooseDocument(state.document - 1));
  byId("next").addEventListener("click", () => chooseDocument(state.document + 1));
  for (const name of ["draw", "context", "measure", "filling"])
    byId(name).addEventListener("change", (event) => { state[name] = name === "draw" ? +event.target.value : event.target.value; show(); });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());

  if (data.documents.length) chooseDocument(0);
  else byId("controls").replaceChildren(element("p", "", "No document was read: --documents 0, or a cache without draws."));
  document.documentElement.dataset.ready = "yes";
})();
