import { describe } from "./api.js";
import { h } from "./dom.js";
import { t } from "./i18n.js";

/**
 * A dialog with one question. field: {label, value, isLong} or none; without a label the title names it.
 * submit(value): what to do; its ApiError is shown and the dialog stays. Resolves to the value (true without a field),
 * or null if it was cancelled.
 */
export function ask({ title, text = "", field = null, ok, isDanger = false, submit = null }) {
  return new Promise((resolve) => {
    let result = null;
    const input = field && h(field.isLong ? "textarea" : "input", {
      value: field.value, required: true, "aria-labelledby": field.label ? null : "ask-title" });
    const error = h("p", { class: "error", role: "alert", hidden: true });
    const confirm = h("button", { class: isDanger ? "danger" : "primary" }, ok);
    const cancel = h("button", { type: "button", onclick: () => dialog.close() }, t("cancel"));
    const form = h("form", {},
      h("h2", { id: "ask-title" }, title), text ? h("p", {}, text) : null,
      field?.label ? h("label", {}, h("span", {}, field.label), input) : input, error,
      h("div", { class: "buttons" }, cancel, confirm));
    const dialog = h("dialog", { "aria-labelledby": "ask-title", class: field?.isLong ? "wide" : "" }, form);
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      confirm.disabled = true;
      try {
        result = input ? input.value : true;
        await submit?.(result);
        dialog.close();
      } catch (failure) {
        result = null;
        error.textContent = describe(failure);
        error.hidden = false;
      } finally {
        confirm.disabled = false;
      }
    });
    dialog.addEventListener("close", () => { dialog.remove(); resolve(result); });
    document.body.prepend(dialog);
    dialog.showModal();
    if (input && !field.isLong) input.select();
  });
}
