/**
 * A JavaScript client of the edge at STEWARD_URL that merges, and that sleeps before it reads; run by
 * test_slow_clients.py. Says `ready` on its output, waits for a line of input, then prints what
 * it got up to the sequence in that line.
 */

import { createInterface } from "node:readline";

import { Client } from "../../../edge/static/steward.js";

const client = new Client({
  url: process.env.STEWARD_URL,
  token: process.env.STEWARD_TOKEN,
  position: { stream_id: process.env.STEWARD_STREAM, sequence: 0 },
  auth: "subprotocol",
  merge: true,
});
const ranges = [];
let text = "";
let last = Infinity;
client.addEventListener("event", ({ detail: event }) => {
  ranges.push([event.from_sequence ?? event.sequence, event.sequence]);
  text += event.data.delta ?? "";
  if (event.sequence >= last) finish();
});
client.addEventListener("opened", ({ detail }) => {
  console.log(JSON.stringify({ merge: detail.ready.merge ?? false }));
  const input = createInterface({ input: process.stdin });
  input.once("line", (line) => {
    last = Number(line);
    input.close();
    if (client.position.sequence >= last) finish();
  });
  // Nothing at all is read as long as this thread sleeps.
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1_000);
});
client.start();

function finish() {
  client.close();
  // Node 20 keeps its process up for a socket that is closing.
  process.stdout.write(`${JSON.stringify({ ranges, text })}\n`, () => process.exit(0));
}
