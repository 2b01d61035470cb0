// Socket.IO for Node: an event to one client at a time, as when each has its own.
import { createServer } from "node:http";
import { Server } from "socket.io";
import { serve } from "./orders.mjs";

const text = process.argv[2];
const server = createServer();
const io = new Server(server, { transports: ["websocket"], perMessageDeflate: false });
io.on("connection", (socket) => {
  socket.on("m", (data) => socket.emit("m", data));
});
serve(server, (burst) => {
  for (const socket of io.sockets.sockets.values()) {
    for (let n = 0; n < burst; n++) socket.emit("m", text);
  }
});
