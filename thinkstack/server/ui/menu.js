// The menu of one conversation: rename, share, export, delete.
import { call, describe, post, remove } from "./api.js";
import { ask } from "./ask.js";
import { copyText, h, icon, notice } from "./dom.js";
import { t } from "./i18n.js";

const FORMATS = [["json", "export_json"], ["markdown", "export_markdown"], ["html", "export_html"]];

function place(menu, button) {
  const at = button.getBoundingClientRect();
  const top = Math.min(at.bottom + 4, innerHeight - menu.offsetHeight - 8);
  menu.style.top = `${Math.max(8, top)}px`;
  menu.style.left = `${Math.max(8, Math.min(at.left, innerWidth - menu.offsetWidth - 8))}px`;
}

/** on: renamed(id, title), deleted(id). */
export function openMenu(conversation, button, on) {
  const { id, title } = conversation;
  const item = (name, key, run) => h("button", { class: "plain", onclick: () => { menu.hidePopover(); run(); } },
    icon(name), h("span", {}, t(key)));
  const menu = h("div", { class: "menu", popover: "auto", role: "group", "aria-label": t("menu_of", { title }) },
    item("edit", "rename", () => ask({
      title: t("rename"), ok: t("save"), field: { label: t("title"), value: title },
      submit: async (value) => {
        await call("PATCH", `/conversations/${id}`, { title: value.trim() });
        on.renamed(id, value.trim());
      } })),
    item("share", "share", () => share(id)),
    ...FORMATS.map(([format, key]) => h("a", {
      class: "plain", href: `/page/conversations/${id}/export?format=${format}`, download: "",
      onclick: () => menu.hidePopover() }, icon("export"), h("span", {}, t(key)))),
    item("delete", "delete", () => ask({
      title: t("delete_title"), text: t("delete_text", { title }), ok: t("delete"), isDanger: true,
      submit: async () => { await remove(`/conversations/${id}`); on.deleted(id); } })));
  menu.addEventListener("toggle", (event) => {
    if (event.newState !== "closed") return;
    menu.remove();
    if (document.activeElement === document.body && button.isConnected) button.focus();
  });
  menu.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const items = [...menu.children];
    items.at((items.indexOf(document.activeElement) + step) % items.length).focus();
  });
  button.closest("nav, main").append(menu);
  menu.showPopover({ source: button });
  place(menu, button);
  menu.firstElementChild.focus();
}

async function share(id) {
  let url;
  try {
    ({ url } = await post(`/conversations/${id}/share`));
  } catch (error) {
    notice(describe(error));
    return;
  }
  const link = h("input", { readOnly: true, value: new URL(url, location.href).href, onfocus: () => link.select() });
  const copy = h("button", { type: "button", class: "primary" }, t("copy_link"));
  copy.addEventListener("click", () => copyText(link.value, copy));
  const error = h("p", { class: "error", role: "alert", hidden: true });
  const dialog = h("dialog", { "aria-labelledby": "share-title" }, h("form", { method: "dialog" },
    h("h2", { id: "share-title" }, t("share")), h("p", {}, t("share_text")),
    h("label", {}, h("span", {}, t("link")), link), error,
    h("div", { class: "buttons" },
      h("button", { type: "button", class: "danger", onclick: async () => {
        try {
          await remove(`/conversations/${id}/share`);
          dialog.close();
          notice(t("share_taken_back"));
        } catch (failure) {
          error.textContent = describe(failure);
          error.hidden = false;
        }
      } }, t("take_back")),
      h("button", {}, t("close")), copy)));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}
