// Asking this server: with the API key of this tab, if it has one.

const KEY = "kvarn-api-key";

export class NeedsKey extends Error {}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

// The JSON at `path`, relative to the page. Throws NeedsKey on 401, else an Error that says what to show.
export async function ask(path, seconds = 15) {
  const key = sessionStorage.getItem(KEY);
  const response = await fetch(path, {
    headers: key === null ? {} : { Authorization: `Bearer ${key}` },
    cache: "no-store",
    signal: AbortSignal.timeout(seconds * 1000),
  }).catch(() => {
    throw new Error("the server does not answer; trying again");
  });
  if (response.status === 401) {
    sessionStorage.removeItem(KEY);
    throw new NeedsKey(key === null ? "needs an API key" : "the API key was not accepted");
  }
  const body = await response.json().catch(() => null);
  if (!response.ok) throw new Error(body?.error?.message ?? `the server answered ${response.status}`);
  return body;
}
