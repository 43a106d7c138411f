// Sign in, or make an account where the server permits it.
import { describe, post } from "./api.js";
import { $ } from "./dom.js";
import { t } from "./i18n.js";

/** Show the form until it succeeds. signUp: off, invitation or open. isAgain: a session ended in mid-use. */
export function signIn(signUp, isAgain) {
  const view = $("#sign-in");
  const form = $("#sign-in-form");
  const error = $("#sign-in-error");
  const invitation = location.hash.match(/^#\/invitation\/(.+)$/)?.[1] ?? "";
  let isNew = Boolean(invitation) && signUp !== "off";

  function show() {
    $("#sign-in-hint").textContent = t(isAgain && !isNew ? "session_ended" : isNew ? "sign_up_hint" : "sign_in_hint");
    $("#password-label").textContent = t(isNew ? "password" : "password_or_key");
    $("#invitation-field").hidden = !isNew || signUp !== "invitation";
    form.elements.invitation.required = isNew && signUp === "invitation";
    form.elements.password.autocomplete = isNew ? "new-password" : "current-password";
    $("#sign-in-submit").textContent = t(isNew ? "sign_up" : "sign_in");
    $("#sign-in-switch").textContent = t(isNew ? "have_account" : "need_account");
    $("#sign-in-switch").hidden = signUp === "off";
    error.hidden = true;
  }

  form.elements.invitation.value = decodeURIComponent(invitation);
  show();
  document.title = `${t("sign_in")} - thinkstack`;
  if ($("#app")) $("#app").hidden = true;
  view.hidden = false;
  form.elements.name.focus();
  return new Promise((resolve) => {
    $("#sign-in-switch").onclick = () => { isNew = !isNew; show(); form.elements.name.focus(); };
    form.onsubmit = async (event) => {
      event.preventDefault();
      const { name, password, invitation: code } = form.elements;
      const body = { name: name.value.trim(), password: password.value };
      $("#sign-in-submit").disabled = true;
      try {
        if (isNew) await post("/sign-up", { ...body, invitation: code.value.trim() });
        else await post("/sign-in", body);
      } catch (failure) {
        error.textContent = describe(failure);
        error.hidden = false;
        return;
      } finally {
        $("#sign-in-submit").disabled = false;
      }
      if (invitation) history.replaceState(null, "", location.pathname);
      password.value = "";
      view.hidden = true;
      resolve();
    };
  });
}
