// The event stream of one answer, read again from the last id after every break.
import { session } from "./api.js";

const SILENCE_MS = 15_000;
const MIN_WAIT_MS = 500;
const MAX_WAIT_MS = 5_000;

function parse(frame) {
  const event = { name: "message", id: null, data: "" };
  for (const line of frame.split("\n")) {
    if (line.startsWith("data:")) event.data += line.slice(line[5] === " " ? 6 : 5);
    else if (line.startsWith("event:")) event.name = line.slice(6).trim();
    else if (line.startsWith("id:")) event.id = line.slice(3).trim();
  }
  return event;
}

/**
 * Read /page/answers/{id}/events from position `at` until its end event.
 * on: event(name, id, data), lost() at a break, found() when events come again, gone() at 404.
 * Returns a function that stops the reading.
 */
export function follow(id, at, on) {
  let isClosed = false;
  let isLost = false;
  let wait = MIN_WAIT_MS;
  let abort = new AbortController();
  let wake = () => {};

  async function readOnce() {
    let silence;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => abort.abort(), SILENCE_MS);
    };
    heard();
    try {
      const path = `/page/answers/${id}/events?after=${at}`;
      const response = await fetch(path, { signal: abort.signal, cache: "no-store" });
      if (response.status === 401 || response.status === 404) {
        isClosed = true;
        if (response.status === 401) session.onSignedOut();
        else on.gone();
        return;
      }
      if (!response.ok) throw new Error(`status ${response.status}`);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let buffer = "";
      while (!isClosed) {
        const { value, done } = await reader.read();
        if (done) throw new Error("early end");
        heard();
        buffer += value.replaceAll("\r", "");
        let start = 0;
        for (let end; (end = buffer.indexOf("\n\n", start)) !== -1; start = end + 2) {
          const event = parse(buffer.slice(start, end));
          if (!event.data) continue;
          if (isLost) { isLost = false; on.found(); }
          wait = MIN_WAIT_MS;
          if (event.id) at = event.id;
          if (event.name !== "ping") on.event(event.name, event.id, JSON.parse(event.data));
          if (event.name === "end") { isClosed = true; return; }
        }
        buffer = buffer.slice(start);
      }
    } finally {
      clearTimeout(silence);
      abort.abort();
    }
  }

  async function run() {
    while (!isClosed) {
      abort = new AbortController();
      try {
        await readOnce();
      } catch (error) {
        if (isClosed) return;
        if (!isLost) { isLost = true; on.lost(error); }
        await new Promise((resolve) => { wake = resolve; setTimeout(resolve, wait); });
        wait = Math.min(wait * 2, MAX_WAIT_MS);
      }
    }
  }

  const online = () => wake();
  window.addEventListener("online", online);
  run().finally(() => window.removeEventListener("online", online));
  return () => { isClosed = true; abort.abort(); wake(); };
}
