// What every Node peer does: listen, print the port, obey the orders on stdin, end with it.
import { createInterface } from "node:readline";

// `push(burst)` sends so many frames to every client, one client after the other.
export function serve(server, push) {
  server.listen({ port: 0, host: "127.0.0.1", backlog: 4096 }, () => {
    console.log(`port ${server.address().port}`);
  });
  const orders = createInterface({ input: process.stdin });
  orders.on("line", async (line) => {
    const [word, turns, burst] = line.split(" ");
    if (word !== "push") process.exit(2);
    for (let turn = 0; turn < Number(turns); turn++) {
      push(Number(burst));
      await new Promise(setImmediate);
    }
    console.log("pushed");
  });
  orders.on("close", () => process.exit(0));
}
