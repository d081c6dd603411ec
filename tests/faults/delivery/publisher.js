// A publisher that knows nothing of Forebay: raw RESP over a socket, and its own history.
//
//     node publisher.js PORT STREAM EVENTS HISTORY RATE
//
// It sends the events of a file in batches of different keys, and repeats, with the same ids and in
// order, what was not accepted. After a lost connection it also repeats what was accepted lately, as
// a careful publisher does whose server may have lost its last second.
"use strict";
const fs = require("fs");
const net = require("net");

const [port, stream, eventsPath, historyPath, rate] = process.argv.slice(2);
const BATCH = 16;
const PAUSE_MS = 50;
const REPLY_LIMIT_MS = 5_000;
const REPEATED = 100;
const REPEATED_MS = 5_000;
const GIVE_UP_MS = 180_000;

const lines = fs.readFileSync(eventsPath, "utf8").split("\n").filter((line) => line);
const events = lines.map((line) => JSON.parse(line));
const history = fs.openSync(historyPath, "a");
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
// Numbers above 2^53 are not exact in JavaScript: they are put into the JSON as digits.
const record = (fields) =>
  JSON.stringify(fields).replace("{", `{"t_ns":${process.hrtime.bigint()},`);

let socket = null;
let accepted = []; // the last events that were, with their times

function connect() {
  return new Promise((resolve, reject) => {
    const made = net.connect(Number(port), "127.0.0.1", () => resolve(made));
    made.once("error", reject);
    made.on("error", () => {});
  });
}

function command(raw) {
  const words = ["XADD", stream, "*", "event", raw];
  const parts = words.map((word) => `$${Buffer.byteLength(word)}\r\n${word}\r\n`);
  return `*${words.length}\r\n${parts.join("")}`;
}

// The replies that came; fewer than asked for if the connection ended. Each is a line; an id has two.
function exchange(batch) {
  return new Promise((resolve) => {
    const replies = [];
    let rest = "";
    const end = () => {
      clearTimeout(timer);
      socket.removeAllListeners("data");
      socket.removeListener("close", end);
      if (replies.length < batch.length) socket.destroy();
      resolve(replies);
    };
    const timer = setTimeout(end, REPLY_LIMIT_MS);
    socket.once("close", end);
    socket.on("data", (data) => {
      rest += data;
      for (;;) {
        const at = rest.indexOf("\r\n");
        const after = rest[0] === "$" ? rest.indexOf("\r\n", at + 2) : at;
        if (at < 0 || after < 0) break;
        replies.push(rest.slice(0, at));
        rest = rest.slice(after + 2);
      }
      if (replies.length >= batch.length) end();
    });
    socket.write(batch.map((event) => command(event.raw)).join(""));
  });
}

// Send each once; returns those that are to be sent again.
async function attempt(batch) {
  const sent = batch.map(({ event, key, seq, poison }) =>
    record({ type: "sent", event, key, seq, poison }));
  fs.writeSync(history, sent.join("\n") + "\n");
  const replies = await exchange(batch);
  const again = [];
  const answers = batch.map((event, index) => {
    const reply = replies[index];
    const ok = reply !== undefined && reply[0] === "$";
    const outcome = ok ? "accepted" : reply === undefined ? "unknown" : "refused";
    if (ok) accepted.push({ event, at: Date.now() });
    else again.push(event);
    return record({ type: "answered", event: event.event, outcome, why: ok ? "" : reply ?? "" });
  });
  fs.writeSync(history, answers.join("\n") + "\n");
  accepted = accepted.slice(-REPEATED);
  return again;
}

async function publish(batch) {
  const giveUpAt = Date.now() + GIVE_UP_MS;
  while (batch.length) {
    if (Date.now() > giveUpAt) throw new Error(`${batch.length} events are not accepted`);
    if (socket === null || socket.destroyed) {
      const first = socket === null;
      try {
        socket = await connect();
      } catch {
        await sleep(PAUSE_MS);
        continue;
      }
      const lately = accepted.filter((each) => each.at > Date.now() - REPEATED_MS);
      if (!first && lately.length) {
        accepted = [];
        const known = new Set(batch);
        const repeated = lately.map((each) => each.event).filter((event) => !known.has(event));
        batch = [...repeated, ...batch];
      }
    }
    // Of a key one event at a time, so that a refusal in between cannot turn two around.
    const now = [];
    const later = [];
    const keys = new Set();
    for (const event of batch) {
      (now.length < BATCH && !keys.has(event.key) ? now : later).push(event);
      keys.add(event.key);
    }
    const again = await attempt(now);
    batch = [...again, ...later];
    if (again.length) await sleep(PAUSE_MS);
  }
}

async function main() {
  let dueAt = Date.now();
  for (let from = 0; from < events.length; from += BATCH) {
    await sleep(Math.max(0, dueAt - Date.now()));
    const batch = events.slice(from, from + BATCH);
    await publish(batch);
    dueAt = Math.max(dueAt + (1000 * batch.length) / Number(rate), Date.now() - 1000);
  }
  socket.destroy();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
