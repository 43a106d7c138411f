// The settings: one tab each for language and theme, the account, its keys, its usage and invitations.
import { describe, get, post, remove } from "./api.js";
import { ask } from "./ask.js";
import { $, copyText, h } from "./dom.js";
import { language, number, t, time } from "./i18n.js";
import { state, store } from "./state.js";

const button = (key, onclick, kind = "") => h("button", { type: "button", class: kind, onclick }, t(key));
const labelled = (key, control) => h("label", {}, h("span", {}, t(key)), control);

/** A table that scrolls by itself; rows: arrays of text or elements. */
function table(caption, heads, rows) {
  return h("div", { class: "table", tabIndex: 0, role: "region", "aria-label": t(caption) }, h("table", {},
    h("thead", {}, h("tr", {}, ...heads.map((key) => h("th", { scope: "col" }, t(key))))),
    h("tbody", {}, ...rows.map((cells) => h("tr", {}, ...cells.map((cell) => h("td", {}, cell)))))));
}

/** Fill `pane` by an asynchronous function; its failure is shown with a way to try again. */
async function fill(pane, build) {
  try {
    pane.replaceChildren(...await build(() => fill(pane, build)));
  } catch (error) {
    pane.replaceChildren(h("p", { class: "error", role: "alert" }, describe(error)),
      button("try_again", () => fill(pane, build)));
  }
}

/** A form whose submit() returns the sentence to show. */
function form(fields, ok, submit) {
  const result = h("p", { role: "status" });
  const element = h("form", {}, ...fields, h("button", { class: "primary" }, t(ok)), result);
  element.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      result.className = "";
      result.replaceChildren(await submit(element.elements));
      element.reset();
    } catch (error) {
      result.className = "error";
      result.textContent = describe(error);
    }
  });
  return element;
}

/** A secret that is shown once, with a button that copies it. */
function secret(sentence, value) {
  const copy = button("copy", () => copyText(value, copy), "small");
  return h("span", { class: "secret" }, h("span", {}, t(sentence)), h("code", {}, value), copy);
}

function choice(key, current, values, onChange) {
  const select = h("select", { onchange: () => onChange(select.value) },
    ...values.map(([value, name]) => h("option", { value, selected: value === current }, name)));
  return labelled(key, select);
}

async function general() {
  const root = document.documentElement;
  return [
    choice("language", language, [["en", "English"], ["zh", "\u4e2d\u6587"]], (value) => {
      store.set("language", value);
      location.reload();
    }),
    choice("theme", root.dataset.theme ?? "system",
      ["system", "light", "dark"].map((value) => [value, t(`theme_${value}`)]), (value) => {
        store.set("theme", value);
        if (value === "system") delete root.dataset.theme;
        else root.dataset.theme = value;
      }),
  ];
}

async function account(again, chat) {
  const { has_password: hasPassword, user, balance, currency } = state.me;
  const { sessions } = await get("/sessions");
  const password = (key, name, autocomplete) =>
    labelled(key, h("input", { type: "password", name, autocomplete, required: true }));
  const amount = `${balance} ${currency ?? ""}`.trim();
  return [
    h("p", {}, t("signed_in_as", { user }), balance === null ? "" : ` ${t("balance", { amount })}`),
    form([], "sign_out", async () => {
      await post("/sign-out");
      chat.composer.forgetDrafts();
      location.replace(location.pathname);
      return "";
    }),
    h("h3", {}, t(hasPassword ? "change_password" : "set_password")),
    form([hasPassword ? password("old_password", "old", "current-password") : "",
      password("new_password", "new", "new-password")], "save", async ({ old, new: fresh }) => {
      await post("/password", { old: old?.value ?? "", new: fresh.value });
      state.me.has_password = true;
      return t("password_changed");
    }),
    h("h3", {}, t("sessions")),
    table("sessions", ["browser", "signed_in_at", "last_seen", "action"], sessions.map((session) => [
      session.agent, time(session.created_ms), time(session.last_seen_ms),
      session.is_this ? t("this_session") : button("revoke", () => ask({
        title: t("revoke"), text: session.agent, ok: t("revoke"), isDanger: true,
        submit: async () => { await remove(`/sessions/${session.id}`); again(); } }), "small"),
    ])),
  ];
}

async function keys(again) {
  const rows = (await get("/keys")).keys;
  const name = h("input", { name: "name", required: true, maxLength: 64 });
  const days = h("input", { name: "days", type: "number", min: 1, max: 3650, placeholder: t("never") });
  const made = form([labelled("key_name", name), labelled("expires_days", days)], "make_key", async () => {
    const { key } = await post("/keys", { name: name.value, expires_days: days.value ? Number(days.value) : null });
    again.shown = secret("key_shown_once", key);
    again();
    return "";
  });
  const revoke = (key) => ask({
    title: t("revoke"), text: t("revoke_text", { name: key.name, prefix: key.prefix }), ok: t("revoke"), isDanger: true,
    submit: async () => { await remove(`/keys/${key.id}`); again(); } });
  return [made, table("keys", ["key_name", "key", "made_at", "expires_at", "last_used", "action"], rows.map((key) => [
    key.name, h("code", {}, `${key.prefix}\u2026`), time(key.created_ms),
    key.expires_ms ? time(key.expires_ms) : t("never"),
    key.last_used_ms ? time(key.last_used_ms) : t("never"),
    key.is_active ? button("revoke", () => revoke(key), "small") : t("revoked"),
  ]))];
}

async function usage() {
  const { currency, days } = await get("/usage");
  if (!days.length) return [h("p", {}, t("no_usage"))];
  const heads = ["day", "requests", "prompt_tokens", "completion_tokens"];
  const hasCost = days.some((day) => day.cost !== null);
  return [table("usage", hasCost ? [...heads, "cost"] : heads, days.map((day) => [
    day.day, number(day.requests), number(day.prompt_tokens), number(day.completion_tokens),
    ...(hasCost ? [day.cost === null ? "" : `${day.cost} ${currency ?? ""}`.trim()] : []),
  ]))];
}

async function invitations() {
  return [h("p", {}, t("invitation_text")), form([], "make_invitation", async () => {
    const { invitation } = await post("/invitations");
    return secret("invitation_made", `${location.origin}/#/invitation/${encodeURIComponent(invitation)}`);
  })];
}

export function openSettings(chat) {
  const { is_local: isLocal, is_admin: isAdmin, sign_up: signUp } = state.me;
  const tabs = [["general", general]];
  if (!isLocal) tabs.push(["account", (again) => account(again, chat)], ["keys", keys]);
  tabs.push(["usage", usage]);
  if (isAdmin && !isLocal && signUp !== "off") tabs.push(["invitations", invitations]);

  const pane = h("div", { id: "settings-pane", role: "tabpanel", tabIndex: 0 });
  const list = h("div", { role: "tablist", "aria-label": t("settings") }, ...tabs.map(([key, build]) => h("button", {
    role: "tab", id: `tab-${key}`, "aria-controls": "settings-pane",
    onclick: (event) => show(event.currentTarget, build) }, t(key))));
  const dialog = h("dialog", { id: "settings", class: "wide", "aria-labelledby": "settings-title" },
    h("header", {}, h("h2", { id: "settings-title" }, t("settings")), button("close", () => dialog.close())),
    list, pane);

  function show(tab, build) {
    for (const other of list.children) {
      other.setAttribute("aria-selected", other === tab);
      other.tabIndex = other === tab ? 0 : -1;
    }
    pane.setAttribute("aria-labelledby", tab.id);
    pane.replaceChildren(h("p", { class: "muted" }, t("loading")));
    const again = () => fill(pane, async () => {
      const parts = await build(again);
      const shown = again.shown ? [h("p", { role: "status" }, again.shown)] : [];
      if (tab.getAttribute("aria-selected") !== "true") return [...pane.childNodes];   // another tab is shown now
      return [...shown, ...parts];
    });
    again();
  }

  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const items = [...list.children];
    const next = items.at((items.indexOf(document.activeElement) + step) % items.length);
    next.focus();
    next.click();
  });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  list.firstElementChild.click();
  $("[role=tab]", list).focus();
}
