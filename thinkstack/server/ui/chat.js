// What happens in a chat: open, send, branch, stop; and what the page says about it.
import { describe, get, post } from "./api.js";
import { Composer } from "./composer.js";
import { $, copyText, notice } from "./dom.js";
import { number, seconds, t } from "./i18n.js";
import { Sidebar } from "./sidebar.js";
import { state } from "./state.js";
import { Thread } from "./thread.js";

const OUTCOMES = { stop: "done", length: "done", stopped: "stopped", failed: "failed" };
const REFRESH_MS = 1_000;

export class Chat {
  constructor() {
    this.outcome = "";
    this.opening = 0;
    this.uncertain = null;      // a message whose sending got no reply: it may have arrived
    this.thread = new Thread({
      currency: () => state.me.currency,
      changed: () => this.showState(),
      gone: (answer) => this.#answerGone(answer),
      ended: (answer) => this.#ended(answer),
      act: (action, view, button) => this.#act(action, view, button),
    });
    this.composer = new Composer((message) => this.#sendDraft(message));
    this.sidebar = new Sidebar((conversation, button) => this.#menu(conversation, button));
    $("#new-chat").addEventListener("click", () => { this.sidebar.open(false); this.newChat(); });
    $("#menu-open").addEventListener("click", (event) => this.#menu(state.conversation, event.currentTarget));
    $("#stop").addEventListener("click", (event) => {
      event.currentTarget.disabled = true;
      this.#tellAnswers("stop", this.thread.running);
    });
    $("#answer-now").addEventListener("click", () => {
      this.#tellAnswers("answer-now", this.thread.running.filter((view) => view.isThinking));
    });
    $("#import").addEventListener("click", () => $("#import-file").click());
    $("#import-file").addEventListener("change", (event) => this.#import(event.target));
    window.addEventListener("hashchange", () => this.route());
    window.addEventListener("focus", () => this.#refresh());
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.#refresh(); });
  }

  // ---- which conversation ----

  /** Open what the address says. */
  route() {
    const id = location.hash.match(/^#\/c\/([^/?]+)$/)?.[1] ?? null;
    if (id === null) return this.newChat();
    if (id !== state.conversation?.id) return this.open(decodeURIComponent(id));
  }

  newChat() {
    this.opening += 1;
    notice("");
    state.conversation = null;
    this.outcome = "";
    if (location.hash.startsWith("#/c/")) history.pushState(null, "", location.pathname);
    this.thread.clear();
    this.composer.load(null);
    this.#showConversation();
    this.composer.focus();
  }

  async open(id) {
    const opening = this.opening += 1;
    notice("");
    try {
      const conversation = await get(`/conversations/${encodeURIComponent(id)}`);
      if (opening !== this.opening) return;
      state.conversation = conversation;
    } catch (error) {
      if (opening !== this.opening || error.code === "signed_out") return;
      if (error.code === "not_found") this.#conversationGone();
      else notice(describe(error), () => this.open(id));
      return;
    }
    this.outcome = "";
    this.composer.load(id);
    this.thread.show({ messages: [], compared: [] });
    this.#showConversation();
    this.thread.show(state.conversation);
    this.thread.follower.toEnd();
    this.showState();
    this.composer.focus();
  }

  /** Ask again for the open conversation; what is on screen stays where it is. */
  async reload() {
    const id = state.conversation?.id;
    if (!id) return;
    const opening = this.opening;
    try {
      const conversation = await get(`/conversations/${id}`);
      if (opening !== this.opening) return;
      this.#show(conversation);
    } catch (error) {
      if (opening !== this.opening || error.code === "signed_out") return;
      if (error.code === "not_found") this.#conversationGone();
      else notice(describe(error), () => { notice(""); this.reload(); });
    }
  }

  #show(conversation) {
    state.conversation = conversation;
    this.#showConversation();
    this.thread.show(conversation);
    this.showState();
  }

  #conversationGone() {
    const draft = this.composer.text.value;
    if (state.conversation) this.sidebar.drop(state.conversation.id);
    this.newChat();
    if (!this.composer.text.value) this.composer.setText(draft);
    notice(t("conversation_gone"));
  }

  #showConversation() {
    const title = state.conversation ? state.conversation.title || t("untitled") : t("new_chat");
    $("#title").textContent = title;
    document.title = `${title} - thinkstack`;
    $("#menu-open").hidden = !state.conversation;
    $("#empty").hidden = Boolean(state.conversation);
    this.sidebar.show();
    this.showState();
  }

  async #refresh() {
    if (!state.me || this.isAway || Date.now() - (this.refreshedMs ?? 0) < REFRESH_MS) return;
    this.refreshedMs = Date.now();
    await Promise.all([this.sidebar.refresh(), this.refreshMe()]);
    const open = state.conversation;
    const item = this.sidebar.items.find(({ id }) => id === open?.id);
    if (open && !this.composer.isLocked && item?.updated_ms !== open.updated_ms) await this.reload();
  }

  async refreshMe() {
    try {
      state.me = await get("/me");
    } catch {
      return null;              // the next call says what is wrong
    }
    return this.composer.showModels();
  }

  // ---- sending ----

  async #sendDraft(message) {
    await this.acting?.catch(() => {});                 // a branch that is being chosen is the one to send to
    const from = state.conversation?.id ?? null;
    await this.#send(message, state.conversation?.messages.at(-1)?.id ?? null);
    this.composer.sent(from);
  }

  async #send(message, parent) {
    const opening = this.opening;
    const body = { conversation: state.conversation?.id ?? null, parent, ...message };
    try {
      const arrived = await this.#arrived(body);
      const result = arrived ?? await post("/send", body);
      this.uncertain = null;
      this.refreshMe();
      if (opening !== this.opening) this.sidebar.refresh();
      else if (arrived) await this.#enter(arrived);
      else await this.#adopt(result, parent);
    } catch (error) {
      if (error.code === "unreachable") {
        const known = [...this.thread.views.keys(), ...this.sidebar.items.map((item) => item.id)];
        this.uncertain ??= { body: JSON.stringify(body), known: new Set(known) };
      } else if (error.code === "not_found" || error.code === "invalid") {
        const vanished = await this.refreshMe();
        if (vanished) notice(t("model_gone", { model: vanished, other: this.composer.models[0] }));
        else if (error.code === "not_found") await this.reload();
      }
      throw error;
    }
  }

  /** The conversation with this message, if an earlier sending of it got no reply and yet arrived; else null. */
  async #arrived(body) {
    if (this.uncertain?.body !== JSON.stringify(body)) { this.uncertain = null; return null; }
    let id = body.conversation;
    if (id === null) {
      id = (await get("/conversations?")).conversations[0]?.id;
      if (!id || this.uncertain.known.has(id)) return null;
    }
    const conversation = await get(`/conversations/${id}`);
    const isSent = conversation.messages.some((message) => message.role === "user" && message.parent === body.parent
      && message.text.trim() === body.text.trim() && !this.uncertain.known.has(message.id));
    return isSent ? conversation : null;
  }

  async #enter(conversation) {
    const isNew = conversation.id !== state.conversation?.id;
    if (isNew) history.pushState(null, "", `#/c/${conversation.id}`);
    this.outcome = "";
    notice("");
    if (isNew) {
      this.composer.sent(null);
      this.composer.load(conversation.id);
    }
    this.#show(conversation);
    this.sidebar.touch({ id: conversation.id, title: conversation.title, updated_ms: conversation.updated_ms });
    this.thread.follower.toEnd();
  }

  async #adopt({ conversation, user, answers }, parent) {
    const before = conversation.id === state.conversation?.id ? state.conversation.messages : [];
    const end = before.findIndex((message) => message.id === parent) + 1;
    await this.#enter({ share: null, ...state.conversation, ...conversation,
      messages: [...before.slice(0, end), user, answers[0]], compared: answers.slice(1) });
  }

  /** A new sibling of an answer takes its place. */
  async #adoptAnswers({ answers }, conversation) {
    if (state.conversation?.id !== conversation.id) return;
    const { messages } = state.conversation;
    const end = messages.findIndex((message) => message.id === answers[0].parent) + 1;
    await this.#enter({ ...state.conversation, messages: [...messages.slice(0, end), answers[0]], compared: [] });
    this.refreshMe();
  }

  // ---- what the buttons of a message do ----

  async #act(action, view, button) {
    const conversation = state.conversation;
    const path = `/messages/${view.id}`;
    const way = { model: this.composer.models[0], thinking: this.composer.thinking };
    const run = {
      copy: async () => copyText(view.message.text || (await get(`${path}/source`)).content, button),
      edit: () => this.#editQuestion(view),
      regenerate: async () => this.#adoptAnswers(await post(`${path}/regenerate`, way), conversation),
      continue: async () => this.#adoptAnswers(await post(`${path}/continue`, { reasoning: null }), conversation),
      "edit-thinking": () => this.#editThinking(view, path, conversation),
      previous: () => this.#switchBranch(view, -1, action),
      next: () => this.#switchBranch(view, 1, action),
      choose: async () => this.#show(await post(`${path}/select`)),
      "stop-one": () => this.#tellAnswers("stop", [view]),
    }[action];
    if (this.acting) return;
    try {
      this.acting = run();
      await this.acting;
    } catch (error) {
      const message = describe(error);
      if (error.code === "not_found") await this.reload();
      if (error.code !== "signed_out" && state.conversation === conversation) notice(message);
    } finally {
      this.acting = null;
    }
  }

  async #editQuestion(view) {
    const { ask } = await import("./ask.js");
    const files = view.message.files ?? [];
    return ask({
      title: t("edit"), ok: t("send"), field: { value: view.message.text, isLong: true },
      text: files.length ? t("files_sent_again", { names: files.map((file) => file.name).join(", ") }) : "",
      submit: (text) => this.#send({
        text, files: [], files_of: view.id, models: this.composer.models, thinking: this.composer.thinking,
      }, view.message.parent),
    });
  }

  async #editThinking(view, path, conversation) {
    const [{ ask }, { reasoning }] = await Promise.all([import("./ask.js"), get(`${path}/source`)]);
    await ask({
      title: t("edit_thinking"), text: t("edit_thinking_text"), ok: t("go_on_from_here"),
      field: { value: reasoning, isLong: true },
      submit: async (text) => this.#adoptAnswers(await post(`${path}/continue`, { reasoning: text }), conversation),
    });
  }

  async #switchBranch(view, step, action) {
    const { siblings } = view.message;
    const id = siblings[siblings.indexOf(view.id) + step];
    const conversation = await post(`/messages/${id}/select`);
    if (state.conversation?.id !== conversation.id) return;
    state.conversation = conversation;
    this.thread.switchBranch(conversation, view.id, id);
    const shown = this.thread.views.get(id)?.element;
    const again = shown && $(`[data-action=${action}]`, shown);
    (again?.disabled ? $(".branch button:enabled", shown) : again)?.focus({ preventScroll: true });
    this.showState();
  }

  async #tellAnswers(what, views) {
    try {
      await Promise.all(views.map((view) => post(`/answers/${view.id}/${what}`)));
    } catch (error) {
      $("#stop").disabled = false;
      const hasEnded = ["not_found", "conflict", "signed_out"].includes(error.code);
      if (!hasEnded) notice(describe(error));
    }
  }

  async #menu(conversation, button) {
    const { openMenu } = await import("./menu.js");
    openMenu(conversation, button, {
      renamed: (id, title) => {
        if (id === state.conversation?.id) { state.conversation.title = title; this.#showConversation(); }
        this.sidebar.rename(id, title);
      },
      deleted: (id) => {
        this.sidebar.drop(id);
        if (id === state.conversation?.id) this.newChat();
      },
    });
  }

  async #import(input) {
    const [file] = input.files;
    try {
      const text = await file.text();
      input.value = "";
      try { JSON.parse(text); } catch { notice(t("import_not_json", { name: file.name })); return; }
      const { id } = await post("/import", text);
      await this.sidebar.refresh();
      location.hash = `#/c/${id}`;
    } catch (error) {
      notice(describe(error));
    }
  }

  // ---- what the page says about the answers ----

  #ended(answer) {
    if (this.thread.views.get(answer.id) !== answer) { this.sidebar.refresh(); return; }
    this.outcome = OUTCOMES[answer.message.status] ?? "done";
    this.showState();
    this.refreshMe();
    this.sidebar.refresh();
  }

  #answerGone(answer) {
    if (this.thread.views.get(answer.id) !== answer) return;
    this.thread.forget(answer.id);
    this.reload();
  }

  showState() {
    const running = this.thread.running;
    const isThinking = running.some((view) => view.isThinking);
    const word = running.length ? (isThinking ? "thinking" : "answering") : this.outcome;
    const text = word && t(`status_${word}`);
    if ($("#status").textContent !== text) $("#status").textContent = text;   // said once by a screen reader
    const total = running.find((view) => view.total)?.total;
    $("#progress").textContent = total ? t("progress", { time: seconds(total.seconds), n: number(total.tokens) }) : "";
    const isLost = running.some((view) => view.isLost);
    if ($("#connection").hidden === isLost) {
      $("#connection").hidden = !isLost;
      $("#connection").textContent = isLost ? t("connection_lost") : "";
    }
    $("#answer-now").hidden = !running.some((view) => view.isThinking && view.state === "thinking");
    this.composer.showRunning(running.length > 0);
  }
}
