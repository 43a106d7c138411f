// An assistant's message: its thinking, its blocks, its tail. What arrives is put in place once per frame and
// never rendered again.
import { get } from "./api.js";
import { $, h } from "./dom.js";
import { number, seconds, t } from "./i18n.js";
import { View } from "./message.js";
import { follow } from "./stream.js";
import { TextBlocks } from "./text.js";

const FLUSH_MS = 48;        // at most one update of the document in this time
const GROUP_BLOCKS = 24;    // blocks in one element that is not laid out while it is off screen

let nextId = 0;

const parsePosition = (at) => at.split(".").map(Number);

/** The first n characters of text; characters are code points, as the server counts them. */
function takeCharacters(text, n) {
  let index = 0;
  for (let left = n; left > 0 && index < text.length; left -= 1) index += text.codePointAt(index) > 0xffff ? 2 : 1;
  return text.slice(0, index);
}

export class Answer extends View {
  /** hooks: changed(), gone(answer), ended(answer), currency(), hold(element, change). */
  constructor(message, hooks) {
    super("assistant-message", message);
    this.hooks = hooks;
    this.isLost = false;
    this.body = $(".answer-body", this.element);
    this.tail = $(".tail", this.element);
    this.tailBlocks = new TextBlocks(this.tail);
    this.toggle = $(".thinking-toggle", this.element);
    this.#fill(message);
  }

  get isRunning() { return this.message.status === "running"; }
  get isThinking() { return this.isRunning && this.state !== "answering" && this.message.thinking; }
  get isOpen() { return this.toggle.getAttribute("aria-expanded") === "true"; }

  // ---- a whole message ----

  #fill(message) {
    this.message = message;
    this.position = parsePosition(message.at ?? "0.0");
    this.pending = { thought: "", html: "", tail: null, end: null, isScheduled: false };
    this.thought = { base: this.position[0], prefix: this.position[0] === 0 ? "" : null, pieces: [] };
    this.progress = { tokens: message.usage?.reasoning_tokens ?? 0, seconds: message.thinking_seconds };
    this.state = message.state;
    this.#insertBlocks(message.html);
    this.#replaceTail(message.tail);
    $(".model-name", this.element).textContent = message.model;
    $(".thinking", this.element).hidden = !(message.thinking || message.reasoning_chars > 0);
    this.#showStatus();
  }

  #insertBlocks(html) {
    if (!html) return;
    const template = document.createElement("template");
    template.innerHTML = html;                       // sanitised by the server
    for (const element of template.content.querySelectorAll("pre, table, math[display=block]")) {
      const box = element.localName === "pre" ? element : element.parentElement;
      box.tabIndex = 0;                              // what may scroll sideways can be reached by keyboard
      box.classList.add("scrolls");
    }
    while (template.content.firstChild) {
      if (!this.group || this.group.childElementCount >= GROUP_BLOCKS) {
        this.group = h("div", { class: "blocks" });
        this.body.insertBefore(this.group, this.tail);
      }
      this.group.append(template.content.firstChild);
    }
  }

  /** The line breaks before a block are no room of their own: the block would jump up when it is finished. */
  #replaceTail(text) { this.tailBlocks.replace(text.replace(/^\n+/, "")); }

  #clearBody() {
    this.body.replaceChildren(this.tail);
    this.group = null;
  }

  #showStatus() {
    const { message } = this;
    this.element.classList.toggle("running", this.isRunning);
    this.element.dataset.status = message.status;
    const show = (action, isShown) => { $(`[data-action=${action}]`, this.element).hidden = !isShown; };
    show("continue", message.status === "length" || message.status === "stopped");
    show("edit-thinking", message.thinking || message.reasoning_chars > 0);
    const error = $(".answer-error", this.element);
    error.hidden = message.status !== "failed" && !message.error;
    if (!error.hidden) {
      error.replaceChildren(t("failed_sentence", { error: message.error }), " ",
        h("button", { class: "small", "data-action": "regenerate" }, t("try_again")));
    }
    if (!this.isRunning) $(".figures", this.element).textContent = this.#figures();
    this.#showThinkingLabel();
  }

  #showThinkingLabel() {
    const { tokens, seconds: spent } = this.progress;
    const key = this.isThinking ? "thinking_for" : "thought_for";
    const label = t(key, { time: seconds(spent ?? 0), n: number(tokens) });
    const span = this.toggle.lastElementChild;
    if (span.textContent !== label) span.textContent = label;
  }

  #figures() {
    const { message } = this;
    const usage = message.usage ?? {};
    const tokens = usage.completion_tokens ?? 0;
    const spent = message.seconds - (message.first_token_seconds ?? 0);
    const hits = usage.prompt_cache_hit_tokens ?? 0;
    const prompt = hits + (usage.prompt_cache_miss_tokens ?? 0);
    const parts = [];
    if (message.status === "length") parts.push(t("cut_off"));
    if (message.status === "stopped") parts.push(t("was_stopped"));
    if (tokens && spent > 0) parts.push(t("speed", { n: number(Math.round((tokens / spent) * 10) / 10) }));
    if (prompt) parts.push(t("cache_hits", { n: number(hits), of: number(prompt) }));
    if (message.draft_tokens > 0) {
      parts.push(t("accepted", { n: number(message.accepted_tokens), of: number(message.draft_tokens) }));
    }
    const { cost } = message;
    if (cost !== null && cost !== undefined) parts.push(`${cost} ${this.hooks.currency() ?? ""}`.trim());
    return parts.join(" \u00b7 ");
  }

  // ---- the thinking ----

  /** Show or take away the text of the thinking. Called within EndFollower.hold, so nothing above it moves. */
  setOpen(isOpen) {
    this.toggle.setAttribute("aria-expanded", isOpen);
    if (!isOpen) {
      this.thoughtBlocks?.root.remove();
      this.thoughtBlocks = null;
      this.toggle.removeAttribute("aria-controls");
      return;
    }
    if (this.thought.prefix !== null) this.#showThought(this.#knownThought());
    else this.#loadThought(this.thought);
  }

  #showThought(text) {
    if (!this.thoughtBlocks) {
      const root = h("div", { class: "thinking-text", id: `thinking-${nextId += 1}` });
      this.toggle.setAttribute("aria-controls", root.id);
      this.thoughtBlocks = new TextBlocks(root);
      this.toggle.after(root);
    }
    this.thoughtBlocks.replace(text);
  }

  #knownThought() {
    return this.thought.prefix + this.thought.pieces.join("");
  }

  async #loadThought(thought) {
    let text;
    try {
      const { reasoning } = await get(`/messages/${this.id}/source`);
      thought.prefix = takeCharacters(reasoning, thought.base);   // the pieces after it came by the stream
    } catch {
      text = t("thinking_not_loaded");
    }
    if (!this.isOpen || thought !== this.thought) return;
    this.hooks.hold(this.toggle, () => this.#showThought(text ?? this.#knownThought()));
  }

  // ---- the stream ----

  listen() {
    if (!this.isRunning || this.stop) return;
    this.stop = follow(this.id, this.position.join("."), {
      event: (name, id, data) => this.#take(name, id, data),
      lost: () => this.#setLost(true),
      found: () => this.#setLost(false),
      gone: () => { this.#setLost(false); this.hooks.gone(this); },
    });
  }

  close() {
    this.stop?.();
    this.stop = null;
    this.isLost = false;
  }

  #setLost(isLost) {
    this.isLost = isLost;
    this.hooks.changed();
  }

  #take(name, id, data) {
    const { pending } = this;
    const [r, c] = id ? parsePosition(id) : this.position;
    if (name === "reset") { this.#reset(data.message); return; }
    if (name === "reasoning" && r > this.position[0]) pending.thought += data.text;
    else if (name === "content" && data.blocks && c >= this.position[1]) {
      pending.html += data.blocks.join("");
      pending.tail = { isNew: true, text: data.tail };
    } else if (name === "content" && data.append && c > this.position[1]) {
      pending.tail ??= { isNew: false, text: "" };
      pending.tail.text += data.append;
    } else if (name === "progress") pending.progress = data;
    else if (name === "end") pending.end = data;
    this.position = [r, c];
    if (pending.isScheduled) return;
    pending.isScheduled = true;
    const flush = () => { if (pending === this.pending) this.#flush(); };
    if (document.hidden) setTimeout(flush, 250);
    else setTimeout(() => requestAnimationFrame(flush), FLUSH_MS);
  }

  #flush() {
    const { pending } = this;
    pending.isScheduled = false;
    if (pending.thought) {
      this.thought.pieces.push(pending.thought);
      if (this.thoughtBlocks && this.thought.prefix !== null) this.thoughtBlocks.append(pending.thought);
      pending.thought = "";
    }
    this.#insertBlocks(pending.html);
    pending.html = "";
    const { tail } = pending;
    if (tail && (tail.isNew || !this.tail.firstChild)) this.#replaceTail(tail.text);
    else if (tail) this.tailBlocks.append(tail.text);
    pending.tail = null;
    if (pending.progress) this.#showProgress(pending.progress);
    pending.progress = null;
    if (pending.end) this.#end(pending.end);
  }

  #showProgress(progress) {
    this.state = progress.state;
    this.progress.tokens = progress.thinking_tokens;
    if (progress.state !== "answering") this.progress.seconds = progress.seconds;
    else if (progress.thinking_seconds !== null) this.progress.seconds = progress.thinking_seconds;
    this.total = progress;
    this.#showThinkingLabel();
    this.hooks.changed();
  }

  #end({ message, blocks }) {
    this.stop = null;
    this.isLost = false;
    if (blocks) {
      this.#insertBlocks(blocks.join(""));
      this.tailBlocks.replace("");
    } else {
      this.#replaceBody(message);
    }
    this.message = { ...message, html: "", tail: "" };   // the document holds them; a second copy is not needed
    const tokens = message.usage?.reasoning_tokens ?? this.progress.tokens;
    this.progress = { tokens, seconds: message.thinking_seconds };
    this.showBranches(message.siblings);
    this.#showStatus();
    this.hooks.ended(this);
  }

  #replaceBody(message) {
    this.#clearBody();
    this.#insertBlocks(message.html);
    this.#replaceTail(message.tail);
  }

  #reset(message) {
    this.#clearBody();
    this.#fill(message);
    if (this.isOpen && this.thought.prefix === null) this.#loadThought(this.thought);
    else this.thoughtBlocks?.replace("");
    this.hooks.changed();
  }
}
