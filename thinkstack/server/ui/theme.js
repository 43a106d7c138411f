// Runs before the first paint: the theme and the language that were chosen in this browser.
(() => {
  const read = (key) => { try { return localStorage.getItem(`thinkstack.${key}`); } catch { return null; } };
  const root = document.documentElement;
  const theme = read("theme");
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  const language = read("language") ?? navigator.language;
  root.lang = language.startsWith("zh") ? "zh" : "en";
})();
