// Text files that go with the next message.
import { $, h, iconButton } from "./dom.js";
import { number, t } from "./i18n.js";

const MAX_BYTES = 1024 * 1024;

/** {name, text}, or {name, problem} if the file is too large or not text. */
async function read(file) {
  if (file.size > MAX_BYTES) return { name: file.name, problem: t("file_too_large", { name: file.name }) };
  try {
    const bytes = new Uint8Array(await file.arrayBuffer());
    if (bytes.includes(0)) throw new TypeError("NUL byte");
    return { name: file.name, text: new TextDecoder("utf-8", { fatal: true }).decode(bytes) };
  } catch {
    return { name: file.name, problem: t("file_not_text", { name: file.name }) };
  }
}

export class Attachments {
  constructor(onProblems) {
    this.onProblems = onProblems;
    this.files = [];
    this.list = $("#attachments");
    const input = $("#attach-file");
    $("#attach").addEventListener("click", () => input.click());
    input.addEventListener("change", async () => {
      await this.add([...input.files]);
      input.value = "";
    });
    const main = $("#main");
    const isFile = (event) => event.dataTransfer?.types.includes("Files");
    for (const name of ["dragenter", "dragover"]) {
      main.addEventListener(name, (event) => {
        if (!isFile(event)) return;
        event.preventDefault();
        main.classList.add("dropping");
      });
    }
    main.addEventListener("dragleave", (event) => {
      if (!main.contains(event.relatedTarget)) main.classList.remove("dropping");
    });
    main.addEventListener("drop", (event) => {
      main.classList.remove("dropping");
      if (!isFile(event)) return;
      event.preventDefault();
      this.add([...event.dataTransfer.files]);
    });
  }

  async add(files) {
    const target = this.files;                       // the user may open another conversation meanwhile
    const results = await Promise.all(files.map(read));
    target.push(...results.filter((result) => !result.problem));
    if (target === this.files) this.show(target);
    this.onProblems(results.map((result) => result.problem).filter(Boolean));
  }

  /** Show the files of another conversation. */
  show(files) {
    this.files = files;
    this.list.hidden = files.length === 0;
    this.list.replaceChildren(...files.map((file) => h("li", { class: "chip" },
      h("span", {}, `${file.name} (${t("characters", { n: number(file.text.length) })})`),
      iconButton("close", t("remove_file", { name: file.name }), () => {
        files.splice(files.indexOf(file), 1);
        this.show(files);
        $("#composer-text").focus();
      }))));
  }
}
