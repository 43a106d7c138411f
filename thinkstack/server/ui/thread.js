// The messages on screen: one view per message id, which lives as long as its message is shown.
import { Answer } from "./answer.js";
import { $, h } from "./dom.js";
import { t } from "./i18n.js";
import { Question } from "./message.js";
import { EndFollower } from "./scroll.js";

const MAX_PARKED = 2;   // streams besides those on screen; browsers open six connections to a server

export class Thread {
  /** hooks: those of Answer, and act(action, view, button). */
  constructor(hooks) {
    this.hooks = { ...hooks, hold: (element, change) => { this.follower.hold(element, change); } };
    this.views = new Map();
    this.parked = new Map();   // answers that run in other conversations: the server ends an answer without readers
    this.list = $("#thread");
    this.follower = new EndFollower($("#messages"), this.list, $("#spacer"),
      (isShown) => { $("#to-end").hidden = !isShown; });
    $("#to-end").addEventListener("click", () => this.follower.toEnd());
    this.list.addEventListener("click", (event) => this.#clicked(event));
  }

  get running() { return [...this.views.values()].filter((view) => view.isRunning); }

  viewOf(element) { return this.views.get(element.closest(".message").dataset.id); }

  #clicked(event) {
    const button = event.target.closest("[data-action]");
    if (!button) return;
    const view = this.viewOf(button);
    if (button.dataset.action !== "toggle") { this.hooks.act(button.dataset.action, view, button); return; }
    const change = () => view.setOpen(!view.isOpen);
    if (this.follower.isVisible(view.toggle)) this.follower.hold(view.toggle, change);
    else if (CSS.supports("overflow-anchor", "auto")) change();      // the browser holds what is on screen
    else this.follower.hold(view.body, change);
  }

  #view(message) {
    let view = this.views.get(message.id) ?? this.parked.get(message.id);
    this.parked.delete(message.id);
    if (view) {
      this.views.set(view.id, view);
      if (message.siblings.length !== view.message.siblings.length) view.showBranches(message.siblings);
    } else {
      view = message.role === "user" ? new Question(message) : new Answer(message, this.hooks);
      this.views.set(message.id, view);
    }
    return view;
  }

  /** Show a conversation. Views of messages that stay are kept: their stream, open thinking and focus go on. */
  show({ messages, compared }) {
    const leaf = messages.at(-1);
    const wanted = messages.map((message) => this.#view(message).element);
    if (compared.length) {
      const columns = [leaf, ...compared].sort((a, b) => leaf.siblings.indexOf(a.id) - leaf.siblings.indexOf(b.id));
      wanted[wanted.length - 1] = this.#columns(columns.map((message) => this.#view(message)), leaf.id);
    }
    const kept = new Set([...messages, ...compared].map((message) => message.id));
    for (const [id, view] of this.views) {
      if (kept.has(id)) continue;
      this.views.delete(id);
      if (view.isRunning) this.parked.set(id, view);
    }
    for (const [id, view] of this.parked) {
      if (this.parked.size <= MAX_PARKED && view.isRunning) continue;
      view.close();
      this.parked.delete(id);
    }
    this.#place(this.list, wanted);
    for (const view of this.running) view.listen();
  }

  #columns(views, chosen) {
    const box = $(".compare", this.list) ?? h("div", { class: "compare", role: "group", "aria-label": t("compare") });
    this.#place(box, views.map((view) => view.element));
    for (const view of views) {
      view.element.classList.toggle("is-chosen", view.id === chosen);
      $("[data-action=choose]", view.element).setAttribute("aria-pressed", view.id === chosen);
    }
    return box;
  }

  /** Make `wanted` the children of parent; elements in the right place stay untouched. */
  #place(parent, wanted) {
    let present = parent.firstElementChild;
    const added = document.createDocumentFragment();
    for (const element of wanted) {
      if (element === present) present = present.nextElementSibling;
      else if (present) parent.insertBefore(element, present);
      else added.append(element);
    }
    while (present) {
      const next = present.nextElementSibling;
      present.remove();
      present = next;
    }
    parent.append(added);
  }

  /** As show(), with the message at `from`, or its replacement `to`, at the same place of the screen. */
  switchBranch(conversation, from, to) {
    this.follower.hold(this.views.get(from).element, () => {
      this.show(conversation);
      return this.views.get(to)?.element;
    });
  }

  /** Read a finished or vanished answer again. */
  forget(id) {
    const view = this.views.get(id);
    view?.close();
    this.views.delete(id);
  }

  closeStreams() {
    for (const view of [...this.views.values(), ...this.parked.values()]) view.close();
    this.parked.clear();
  }

  clear() {
    this.show({ messages: [], compared: [] });
    this.follower.toEnd();
  }
}
