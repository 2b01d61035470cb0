/**
 * Who is signed in on this tab.
 *
 * The token lives in `sessionStorage`: it ends with the tab. A new tab of the same site that
 * has none asks the open ones for theirs, so that a second tab needs no second login; a tab
 * that signs out forgets its own only. A login code in the address (`#login=…`) is used once
 * and taken out of the address bar and the history at once.
 */

import { newId } from "../steward.js";
import { byId } from "./dom.js";

const KEY = "steward.token";
const CHANNEL = "steward.sign-in";
const ASK_MS = 200;

export class SignIn {
  #channel = new BroadcastChannel(CHANNEL);

  constructor() {
    this.#channel.addEventListener("message", ({ data }) => {
      const token = sessionStorage.getItem(KEY);
      if (data?.ask && token !== null) this.#channel.postMessage({ answer: data.ask, token });
    });
  }

  /**
   * A token without asking anybody: from the address, this tab, or another tab. Null if none.
   * Throws an Error when the address held a code that is not valid and there is no other way.
   */
  async silently() {
    const code = takeLoginCode();
    let refused = null;
    if (code !== null) {
      try {
        return this.#store(await logIn(code));
      } catch (error) {
        refused = error;
      }
    }
    const token = sessionStorage.getItem(KEY) ?? (await this.#fromOtherTab());
    if (token === null && refused !== null) throw refused;
    return token;
  }

  /**
   * Show the form until a token is given. `explain` is shown above the field.
   * @returns {Promise<string>}
   */
  async ask(explain = "") {
    const page = byId("sign-in");
    const form = byId("sign-in-form");
    const field = byId("sign-in-secret");
    const error = byId("sign-in-error");
    const submit = byId("sign-in-submit");
    page.hidden = false;
    byId("app").inert = true;
    error.textContent = explain;
    field.value = "";
    field.focus();
    try {
      for (;;) {
        const secret = await submitted(form, field);
        submit.disabled = true;
        try {
          return this.#store(looksLikeToken(secret) ? secret : await logIn(secret));
        } catch (failure) {
          error.textContent = failure.message;
          field.select();
        } finally {
          submit.disabled = false;
        }
      }
    } finally {
      page.hidden = true;
      byId("app").inert = false;
      field.value = "";
    }
  }

  forget() {
    sessionStorage.removeItem(KEY);
  }

  #store(token) {
    sessionStorage.setItem(KEY, token);
    return token;
  }

  #fromOtherTab() {
    const question = newId();
    return new Promise((resolve) => {
      const settle = (token) => {
        clearTimeout(timer);
        this.#channel.removeEventListener("message", listen);
        resolve(token === null ? null : this.#store(token));
      };
      const listen = ({ data }) => {
        if (data?.answer === question) settle(data.token);
      };
      const timer = setTimeout(() => settle(null), ASK_MS);
      this.#channel.addEventListener("message", listen);
      this.#channel.postMessage({ ask: question });
    });
  }
}

function submitted(form, field) {
  return new Promise((resolve) => {
    form.addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        resolve(field.value.trim());
      },
      { once: true },
    );
  });
}

function looksLikeToken(secret) {
  return secret.split(".").length === 3;
}

function takeLoginCode() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const code = parameters.get("login");
  if (code === null) return null;
  parameters.delete("login");
  const rest = parameters.toString();
  history.replaceState(null, "", location.pathname + location.search + (rest ? `#${rest}` : ""));
  return code;
}

/** One use: exchange a login code for a token. Throws an Error that says what to do. */
async function logIn(code) {
  let response;
  try {
    response = await fetch("/v1/login", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ code }),
    });
  } catch {
    throw new Error("Steward does not answer. Try again when it runs.");
  }
  const body = await response.json().catch(() => ({}));
  if (response.ok && typeof body.token === "string") return body.token;
  if (response.status === 401 || response.status === 404) {
    throw new Error("This login code is not valid any more: each works once, for ten minutes.");
  }
  throw new Error(body.message ?? `Signing in failed (HTTP ${response.status}).`);
}
