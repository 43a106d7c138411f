// The form below the thread: draft, files, model, Deep Think, compare.
import { describe } from "./api.js";
import { Attachments } from "./attachments.js";
import { $, debounce, h } from "./dom.js";
import { number, t, time } from "./i18n.js";
import { state, store } from "./state.js";

const SAVE_MS = 400;
const LONG_CHARS = 20_000;   // from here on the text has its greatest height, and is not measured at every key

export class Composer {
  /** onSend(message): message is {text, files, models, thinking}. */
  constructor(onSend) {
    this.onSend = onSend;
    this.text = $("#composer-text");
    this.form = $("#composer");
    this.key = null;
    this.kept = new Map();                            // files and unsaved drafts by conversation
    this.attachments = new Attachments((problems) => problems.length && this.#showError(problems.join(" "), []));
    this.save = debounce(SAVE_MS, () => this.#save());
    this.text.addEventListener("input", () => this.#changed());
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.#submit(); });
    window.addEventListener("pagehide", () => this.#save());
    $("#deep-think").addEventListener("click", () => {
      store.set("deep_think", this.thinking ? "off" : "on");
      this.showModels();
    });
    $("#compare").addEventListener("click", () => {
      this.isComparing = !this.isComparing;
      this.showModels();
    });
    $("#model").addEventListener("change", (event) => { store.set("model", event.target.value); this.showModels(); });
    $("#second-model").addEventListener("change", () => this.showModels());
  }

  #changed() {
    this.text.classList.toggle("is-long", this.text.value.length > LONG_CHARS);
    this.save();
  }

  // ---- drafts ----

  #draftKey(conversation) { return `draft.${state.me.user}.${conversation ?? "new"}`; }

  #save() {
    if (this.key === null) return;
    const text = this.text.value;
    const isStored = store.set(this.key, text);
    this.kept.set(this.key, { files: this.attachments.files, text: isStored ? null : text });
  }

  /** Put the draft of a conversation (null: of a new chat) into the form. */
  load(conversation) {
    this.#save();
    this.key = this.#draftKey(conversation);
    const kept = this.kept.get(this.key);
    this.setText(kept?.text ?? store.get(this.key) ?? "");
    this.attachments.show(kept?.files ?? []);
    this.clearError();
  }

  /** Forget the draft that was sent from `conversation`, and show the next one. */
  sent(conversation) {
    const key = this.#draftKey(conversation);
    store.set(key, "");
    this.kept.delete(key);
    if (key !== this.key) return;
    this.setText("");
    this.attachments.show([]);
  }

  setText(text) {
    this.text.value = text;
    this.#changed();
  }

  forgetDrafts() {
    this.key = null;
    store.removeBelow(`draft.${state.me.user}.`);
  }

  // ---- models ----

  get models() {
    const names = [$("#model").value];
    if (this.isComparing) names.push($("#second-model").value);
    return names;
  }

  get thinking() { return $("#deep-think").getAttribute("aria-pressed") === "true"; }

  /** Show the models, the Deep Think switch and what is left of it, as state.me says. Returns a vanished model. */
  showModels() {
    const { models, deep_think: limit } = state.me;
    const names = models.map((model) => model.name);
    const wanted = $("#model").value || store.get("model");
    const fill = (select, value) => {
      if ([...select.options].map((option) => option.value).join("\n") !== names.join("\n")) {
        select.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
      }
      select.value = value;
    };
    const first = names.includes(wanted) ? wanted : names[0];
    const second = $("#second-model").value;
    fill($("#model"), first);
    fill($("#second-model"), names.includes(second) ? second : names.find((name) => name !== first) ?? first);
    $("#compare").hidden = names.length < 2;
    if (names.length < 2) this.isComparing = false;
    $("#compare").setAttribute("aria-pressed", Boolean(this.isComparing));
    $("#second-model").hidden = !this.isComparing;

    const chosen = models.filter((model) => this.models.includes(model.name));
    const modes = new Set(chosen.flatMap((model) => model.modes));
    const preference = store.get("deep_think");
    const isOn = modes.size === 1 ? modes.has(true) : preference ? preference === "on" : Boolean(chosen[0]?.thinking);
    const button = $("#deep-think");
    button.disabled = modes.size < 2;
    button.setAttribute("aria-pressed", isOn);
    const left = limit && Math.max(0, limit.limit - limit.used);
    $("#deep-think-left").textContent = !limit || !isOn ? "" : limit.used === 0 || !limit.resets_ms
      ? t("left", { n: number(left) }) : t("left_until", { n: number(left), time: time(limit.resets_ms) });
    return wanted && wanted !== first ? wanted : null;
  }

  // ---- sending ----

  async #submit(changes = {}) {
    const message = { text: this.text.value, files: [...this.attachments.files], models: this.models,
      thinking: this.thinking, ...changes };
    if (this.isLocked || this.isRunning || (!message.text.trim() && !message.files.length)) return;
    this.#save();
    this.clearError();
    this.#lock(true);
    try {
      await this.onSend(message);
    } catch (error) {
      if (error.code !== "signed_out") this.#explain(error, message);
    } finally {
      this.#lock(false);
    }
  }

  #lock(isLocked) {
    this.isLocked = isLocked;
    this.form.classList.toggle("is-sending", isLocked);
    this.text.readOnly = isLocked;
    $("#send").disabled = isLocked;
  }

  #explain(error, message) {
    const ways = [[t("try_again"), () => this.#submit()]];
    if (error.code === "rate_limited" && message.thinking && !$("#deep-think").disabled) {
      ways.push([t("send_without_deep_think"), () => this.#submit({ thinking: false })]);
    }
    this.#showError(describe(error), ways);
  }

  #showError(text, ways) {
    const box = $("#composer-error");
    box.replaceChildren(h("span", {}, text), ...ways.map(([label, run]) =>
      h("button", { class: "small", type: "button", onclick: run }, label)),
    h("button", { class: "small", type: "button", onclick: () => this.clearError() }, t("dismiss")));
    box.hidden = false;
  }

  clearError() {
    if ($("#composer-error").contains(document.activeElement)) this.text.focus();
    $("#composer-error").hidden = true;
  }

  /** Stop takes the place of send while an answer runs. */
  showRunning(isRunning) {
    if (isRunning === this.isRunning) return;
    const hadFocus = [$("#send"), $("#stop")].includes(document.activeElement);
    this.isRunning = isRunning;
    $("#send").hidden = isRunning;
    $("#stop").hidden = !isRunning;
    $("#stop").disabled = false;
    if (hadFocus) this.text.focus();
  }

  focus() {
    if (matchMedia("(hover: hover)").matches) this.text.focus({ preventScroll: true });
  }
}
