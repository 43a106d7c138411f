// Text of the page in the language of <html lang>, which theme.js has set.
export const language = document.documentElement.lang;
const { strings } = await import(language === "zh" ? "./zh.js" : "./en.js");

export function t(key, values = {}) {
  return strings[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

export const hasText = (key) => key in strings;

/** Fill the elements of `root` that name their text: data-t, data-t-label (also the tooltip), data-t-placeholder. */
export function translate(root) {
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of root.querySelectorAll("[data-t-placeholder]")) {
    element.placeholder = t(element.dataset.tPlaceholder);
  }
  for (const element of root.querySelectorAll("[data-t-label]")) {
    element.setAttribute("aria-label", t(element.dataset.tLabel));
    if (element.localName === "button") element.title = t(element.dataset.tLabel);
  }
  for (const template of root.querySelectorAll("template")) translate(template.content);
}

const numbers = new Intl.NumberFormat(language);
export const number = (value) => numbers.format(value);

export function seconds(value) {
  return t("seconds", { n: numbers.format(value < 10 ? Math.round(value * 10) / 10 : Math.round(value)) });
}

/** The time of day, with the date unless it is within a day from now. */
export function time(ms) {
  const isNear = Math.abs(ms - Date.now()) < 86_400_000;
  const date = isNear ? {} : { year: "numeric", month: "short", day: "numeric" };
  return new Intl.DateTimeFormat(language, { ...date, hour: "2-digit", minute: "2-digit", hour12: false }).format(ms);
}
