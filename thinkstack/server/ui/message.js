// What messages of both roles have: an element from a template, a branch switch, and a user's text.
import { $, h } from "./dom.js";
import { number, t } from "./i18n.js";
import { TextBlocks } from "./text.js";

export function fromTemplate(id, message) {
  const element = $(`#${id}`).content.firstElementChild.cloneNode(true);
  element.dataset.id = message.id;
  return element;
}

export class View {
  constructor(template, message) {
    this.element = fromTemplate(template, message);
    this.message = message;
    this.showBranches(message.siblings);
  }

  get id() { return this.message.id; }

  showBranches(siblings) {
    this.message.siblings = siblings;
    const branch = $(".branch", this.element);
    branch.hidden = siblings.length < 2;
    if (branch.hidden) return;
    if (!branch.firstElementChild) branch.append($("#branch").content.cloneNode(true));
    const index = siblings.indexOf(this.id);
    $(".branch-count", branch).textContent = `${index + 1}/${siblings.length}`;
    $("[data-action=previous]", branch).disabled = index <= 0;
    $("[data-action=next]", branch).disabled = index === siblings.length - 1;
  }

  close() {}
}

export class Question extends View {
  isRunning = false;

  constructor(message) {
    super("user-message", message);
    new TextBlocks($(".user-text", this.element)).append(message.text);
    const files = message.files ?? [];
    $(".files", this.element).hidden = files.length === 0;
    $(".files", this.element).append(...files.map((file) =>
      h("li", {}, `${file.name} (${t("characters", { n: number(file.chars) })})`)));
  }
}
