// The contract's server (`httpd.js PORT`) with node:http.
'use strict';
const http = require('node:http');

function pattern(size) {
  const made = Buffer.alloc(Math.ceil(size / 4) * 4);
  for (let at = 0; at < made.length; at += 4) made.writeUInt32BE(at / 4, at);
  return made.subarray(0, size);
}

const made = new Map();

function answer(response, body) {
  response.writeHead(200, { 'Content-Length': body.length });
  response.end(body);
}

http.createServer((request, response) => {
  if (request.method === 'POST') {
    const parts = [];
    request.on('data', (part) => parts.push(part));
    request.on('end', () => answer(response, Buffer.concat(parts)));
    return;
  }
  const size = Number(request.url.split('/').pop());
  if (!made.has(size)) made.set(size, pattern(size));
  answer(response, made.get(size));
}).listen(Number(process.argv[2]), '0.0.0.0');

