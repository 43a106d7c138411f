// Calls of /page. Every failure is an ApiError; its text for people comes from describe().
import { hasText, seconds, t, time } from "./i18n.js";
import { state } from "./state.js";

export class ApiError extends Error {
  /** status 0, code "unreachable": no reply came. body: the whole reply, {} if it was not JSON. */
  constructor(status, code, message, body = {}) {
    super(message);
    Object.assign(this, { status, code, body });
  }
}

/** What happens at 401 signed_out; main.js sets it. */
export const session = { onSignedOut: () => {} };

async function request(method, path, body) {
  const headers = {};
  if (method !== "GET" && state.me) headers["X-CSRF-Token"] = state.me.csrf;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const text = typeof body === "string" || body === undefined ? body : JSON.stringify(body);
  let response;
  try {
    response = await fetch(`/page${path}`, { method, headers, body: text, cache: "no-store" });
  } catch {
    throw new ApiError(0, "unreachable", "");
  }
  const reply = await response.json().catch(() => null);
  if (response.ok && reply !== null) return reply;
  const isGateway = reply === null && (response.ok || response.status >= 502);
  const { code = isGateway ? "unreachable" : "server_error", message = "" } = reply?.error ?? {};
  throw new ApiError(response.status, code, message, reply ?? {});
}

/** body: an object, or a string that is JSON already. */
export async function call(method, path, body) {
  try {
    return await request(method, path, body);
  } catch (error) {
    if (error.code === "signed_out" && path !== "/me") session.onSignedOut();
    if (error.code !== "forbidden" || method === "GET" || !state.me) throw error;
    const me = await request("GET", "/me");       // a new sign-in in another tab has changed the token
    if (me.csrf === state.me.csrf) throw error;
    state.me = me;
    return request(method, path, body);
  }
}

export const get = (path) => call("GET", path);
export const post = (path, body = {}) => call("POST", path, body);
export const remove = (path) => call("DELETE", path);

export function describe(error) {
  if (!(error instanceof ApiError)) throw error;
  const parts = [t(hasText(`error_${error.code}`) ? `error_${error.code}` : "error_server_error"), error.message];
  const wait = error.body.retry_after;
  if (wait > 90) parts.push(t("retry_at", { time: time(Date.now() + wait * 1000) }));
  else if (wait) parts.push(t("retry_after", { time: seconds(wait) }));
  return parts.filter(Boolean).join(" ");
}
