// Small pieces of interface that every view uses.
import { t } from "./i18n.js";

export const $ = (selector, root = document) => root.querySelector(selector);

/** An element: props are properties (`class`, `on*` as listeners, others with a dash or `role` as attributes). */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const icon = (name) => h("span", { class: `icon i-${name}` });

export function iconButton(name, label, onclick) {
  return h("button", { class: "quiet", type: "button", "aria-label": label, title: label, onclick }, icon(name));
}

export function debounce(ms, run) {
  let timer;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(run, ms, ...args);
  };
}

export async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {                                     // plain http from another machine has no clipboard API
    const area = h("textarea", { value: text, class: "sr" });
    (button.closest("dialog") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const label = button.getAttribute("aria-label");
  button.classList.add("is-copied");
  if (label) button.setAttribute("aria-label", t("copied"));
  setTimeout(() => {
    button.classList.remove("is-copied");
    if (label) button.setAttribute("aria-label", label);
  }, 1_500);
}

/** A line at the top of the chat, with a button if there is something to try again; empty text takes it away. */
export function notice(text, retry = null) {
  const box = $("#notice");
  box.hidden = !text;
  const again = retry ? [h("button", { class: "small", onclick: retry }, t("try_again"))] : [];
  box.replaceChildren(h("p", {}, text), ...again, iconButton("close", t("dismiss"), () => notice("")));
}
