// The contract's client with node:http and a keep-alive agent.
'use strict';
const http = require('node:http');

const [url, command, ...rest] = process.argv.slice(2);
const PASSES = 3;
const LASTING_MS = 700;
const LARGE = 1000000;
const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });

function pattern(size) {
  const made = Buffer.alloc(Math.ceil(size / 4) * 4);
  for (let at = 0; at < made.length; at += 4) made.writeUInt32BE(at / 4, at);
  return made.subarray(0, size);
}

function ask(method, path, body) {
  return new Promise((resolve, reject) => {
    const headers = body ? { 'Content-Length': body.length } : {};
    const request = http.request(url + path, { agent, method, headers }, (response) => {
      const parts = [];
      response.on('data', (part) => parts.push(part));
      response.on('end', () => {
        if (response.statusCode === 200) resolve(Buffer.concat(parts));
        else reject(new Error(`${method} ${path}: ${response.statusCode}`));
      });
      response.on('error', reject);
    });
    request.on('error', reject);
    request.end(body);
  });
}

async function check() {
  let checked = 0;
  const start = performance.now();
  for (let pass = 0; pass < PASSES || performance.now() - start < LASTING_MS; pass++) {
    for (const argument of rest) {
      const size = Number(argument.replace('echo=', ''));
      if (size >= LARGE && pass > 0) continue;
      const wanted = pattern(size);
      const got = argument.startsWith('echo=')
        ? await ask('POST', '/echo', wanted)
        : await ask('GET', `/bytes/${size}`);
      if (!got.equals(wanted)) throw new Error(`${got.length} of ${size} bytes, not the same`);
      checked++;
    }
  }
  console.log('checked', checked);
}

async function load(seconds, size) {
  const taken = [];
  const end = performance.now() + seconds * 1000;
  let now = performance.now();
  while (now < end) {
    await ask('GET', `/bytes/${size}`);
    const before = now;
    now = performance.now();
    taken.push(((now - before) * 1000).toFixed(1));
  }
  console.log(taken.join('\n'));
}

(command === 'check' ? check() : load(Number(rest[0]), rest[1])).then(() => agent.destroy());
