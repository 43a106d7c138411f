/** What the views share. me: reply of /page/me. conversation: the open one, null in a new chat. */
export const state = { me: null, conversation: null };

/** localStorage below one prefix; a browser that refuses storage forgets, the page goes on. */
export const store = {
  get(key) { try { return localStorage.getItem(`thinkstack.${key}`); } catch { return null; } },
  set(key, value) {
    try {
      if (value) localStorage.setItem(`thinkstack.${key}`, value);
      else localStorage.removeItem(`thinkstack.${key}`);
      return true;
    } catch { return false; }
  },
  removeBelow(prefix) {
    try {
      for (const key of Object.keys(localStorage)) {
        if (key.startsWith(`thinkstack.${prefix}`)) localStorage.removeItem(key);
      }
    } catch { /* refused storage holds nothing */ }
  },
};
