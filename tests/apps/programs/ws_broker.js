// What a client sends goes to all of them: `ws_broker.js PORT`.
'use strict';
const { WebSocketServer } = require('ws');

const server = new WebSocketServer({
  host: '0.0.0.0',
  port: Number(process.argv[2]),
  perMessageDeflate: false,
  maxPayload: 1 << 26,
});
server.on('connection', (socket) => {
  socket.on('message', (message) => {
    for (const each of server.clients) each.send(message, { binary: true });
  });
});
