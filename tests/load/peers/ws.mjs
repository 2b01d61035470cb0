// `ws` for Node: what a Node program without a framework uses.
import { createServer } from "node:http";
import { WebSocketServer } from "ws";
import { serve } from "./orders.mjs";

const text = process.argv[2];
const server = createServer();
const sockets = new WebSocketServer({ server, perMessageDeflate: false });
sockets.on("connection", (socket) => {
  socket.on("message", (data) => socket.send(data, { binary: false }));
});
serve(server, (burst) => {
  for (const socket of sockets.clients) {
    for (let n = 0; n < burst; n++) socket.send(text);
  }
});
