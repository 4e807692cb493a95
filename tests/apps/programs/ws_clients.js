// `ws_clients.js URL CLIENTS MESSAGES SIZE`: each sends its messages one by one and checks what it
// gets from all. Prints the microseconds until its own came back, a line each.
'use strict';
const WebSocket = require('ws');

const url = process.argv[2];
const [clients, messages, size] = process.argv.slice(3).map(Number);
const taken = [];

function message(client, number) {
  const made = Buffer.alloc(8 + size);
  made.writeUInt32BE(client, 0);
  made.writeUInt32BE(number, 4);
  for (let at = 8; at + 4 <= made.length; at += 4) made.writeUInt32BE((at * 31 + number) >>> 0, at);
  return made;
}

function opened() {
  return new Promise((resolve, reject) => {
    const socket = new WebSocket(url, { perMessageDeflate: false, maxPayload: 1 << 26 });
    socket.on('open', () => resolve(socket));
    socket.on('error', reject);
  });
}

function run(socket, own) {
  const next = new Array(clients).fill(0);
  let left = clients * messages;
  let sent = 0;
  let start = 0;
  const send = () => {
    start = performance.now();
    socket.send(message(own, sent++));
  };
  return new Promise((resolve, reject) => {
    socket.on('message', (data) => {
      const from = data.readUInt32BE(0);
      if (!data.equals(message(from, next[from]))) {
        reject(new Error(`client ${own}: message ${next[from]} of ${from} is not right`));
        return;
      }
      next[from]++;
      if (from === own) {
        taken.push(((performance.now() - start) * 1000).toFixed(1));
        if (sent < messages) send();
      }
      if (--left === 0) resolve();
    });
    socket.on('close', () => reject(new Error(`client ${own}: closed with ${left} to come`)));
    send();
  });
}

async function main() {
  const sockets = await Promise.all(Array.from({ length: clients }, opened));
  await Promise.all(sockets.map(run));
  console.log(taken.join('\n'));
  process.exit(0);
}

main();
