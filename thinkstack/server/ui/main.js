// Starts the page: who is here, then the chat.
import { get, session } from "./api.js";
import { Chat } from "./chat.js";
import { $ } from "./dom.js";
import { translate } from "./i18n.js";
import { state } from "./state.js";

const RETRY_MS = 2_000;

translate(document);
let chat = null;

/** Fill state.me; sign in first where that is needed, wait while the server is away. */
async function findUser(isAgain) {
  for (;;) {
    try {
      const me = await get("/me");
      $("#starting").hidden = true;
      return me;
    } catch (error) {
      if (error.code === "signed_out") {
        $("#starting").hidden = true;
        const { signIn } = await import("./signin.js");
        await signIn(error.body.sign_up ?? "off", isAgain);
        continue;
      }
      $("#starting").hidden = chat !== null;
      await new Promise((resolve) => { setTimeout(resolve, RETRY_MS); });
    }
  }
}

async function enter(isAgain) {
  const before = state.me?.user;
  state.me = await findUser(isAgain);
  if (before && before !== state.me.user) { location.reload(); return; }   // nothing of another user stays
  if (!chat) {                                                       // the controls exist once they are true
    document.body.append($("#app-template").content);
    chat = new Chat();
    $("#settings-open").addEventListener("click", async () => {
      const { openSettings } = await import("./settings.js");
      openSettings(chat);
    });
  }
  $("#user-name").textContent = state.me.is_local ? "" : state.me.user;
  $("#app").hidden = false;
  chat.isAway = false;
  chat.composer.showModels();
  chat.sidebar.refresh();
  if (isAgain && state.conversation) await chat.reload();
  else await chat.route();
}

session.onSignedOut = () => {
  if (!chat || chat.isAway) return;
  chat.isAway = true;
  chat.thread.closeStreams();
  document.querySelectorAll("dialog[open]").forEach((dialog) => dialog.close());
  enter(true);
};

await enter(false);
