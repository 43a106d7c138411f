// The list of conversations.
import { describe, get } from "./api.js";
import { $, debounce, h, iconButton, notice } from "./dom.js";
import { t, time } from "./i18n.js";
import { state } from "./state.js";

const SEARCH_MS = 250;

export class Sidebar {
  /** onMenu(conversation, button): open the menu of a conversation. */
  constructor(onMenu) {
    this.onMenu = onMenu;
    this.items = [];
    this.next = null;
    this.query = "";
    this.requests = 0;
    $("#search").addEventListener("input", debounce(SEARCH_MS, () => {
      this.query = $("#search").value.trim();
      this.refresh();
    }));
    $("#load-more").addEventListener("click", () => this.#load(this.next));
    $("#open-sidebar").addEventListener("click", () => this.open(true));
    for (const id of ["#close-sidebar", "#backdrop"]) $(id).addEventListener("click", () => this.open(false));
    $("#skip").addEventListener("click", () => { this.open(false); $("#composer-text").focus(); });
    $("#conversations").addEventListener("click", (event) => { if (event.target.closest("a")) this.open(false); });
    $("#app").addEventListener("keydown", (event) => { if (event.key === "Escape") this.open(false); });
  }

  /** The drawer of narrow screens. */
  open(isOpen) {
    if (isOpen === document.body.classList.contains("drawer")) return;
    document.body.classList.toggle("drawer", isOpen);
    $("#main").inert = isOpen;
    (isOpen ? $("#close-sidebar") : $("#open-sidebar")).focus();
  }

  async #load(before) {
    const request = this.requests += 1;
    const search = new URLSearchParams();
    if (this.query) search.set("q", this.query);
    if (before) search.set("before", before);
    try {
      const page = await get(`/conversations?${search}`);
      if (request !== this.requests) return;         // a newer question is on its way
      const shown = new Set(before ? this.items.map((item) => item.id) : []);
      this.items = [...(before ? this.items : []), ...page.conversations.filter((item) => !shown.has(item.id))];
      this.next = page.next;
      this.show();
    } catch (error) {
      if (error.code !== "signed_out") notice(describe(error));
    }
  }

  refresh() { return this.#load(null); }

  /** Put a new or changed conversation first. */
  touch(conversation) {
    if (this.query) return;
    this.items = [conversation, ...this.items.filter((item) => item.id !== conversation.id)];
    this.show();
  }

  rename(id, title) {
    for (const item of this.items) if (item.id === id) item.title = title;
    this.show();
  }

  drop(id) {
    this.items = this.items.filter((item) => item.id !== id);
    this.show();
  }

  show() {
    const list = $("#conversations");
    const focused = list.contains(document.activeElement) && document.activeElement.closest("li").dataset.id;
    const focusedTag = document.activeElement.localName;
    list.replaceChildren(...this.items.map((item) => {
      const title = item.title || t("untitled");
      const menu = iconButton("more", t("menu_of", { title }), () => this.onMenu(item, menu));
      menu.setAttribute("aria-haspopup", "true");
      return h("li", { "data-id": item.id },
        h("a", { href: `#/c/${item.id}`, title: `${title} (${time(item.updated_ms)})`,
          "aria-current": item.id === state.conversation?.id ? "page" : null }, title), menu);
    }));
    if (focused) $(`li[data-id="${CSS.escape(focused)}"] ${focusedTag}`, list)?.focus();
    $("#load-more").hidden = this.next === null;
    const empty = $("#no-conversations");
    empty.hidden = this.items.length > 0;
    empty.textContent = t(this.query ? "nothing_found" : "no_conversations");
  }
}
