// The HTTP API as OpenAI's own client for JavaScript sees it.
//
// The server's address comes from LACUNA_URL; it serves nano and nano-ar. Run it by itself with
//
//     LACUNA_URL=http://127.0.0.1:8080 node tests/node/openai/chat.test.mjs

import assert from "node:assert/strict";
import test from "node:test";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.LACUNA_URL}/v1`, apiKey: "none", maxRetries: 0, timeout: 120_000 });
const TASK = "# Return the sum of the numbers in xs that are greater than 17.\ndef solve(xs):\n";
const ANSWER = "    return sum(x for x in xs if x > 17)\n";
const messages = [{ role: "user", content: TASK }];

test("a chat, whole", async () => {
  for (const model of ["nano", "nano-ar"]) {
    const chat = await client.chat.completions.create({ model, messages });
    assert.equal(chat.choices[0].message.content, ANSWER);
    assert.equal(chat.choices[0].finish_reason, "stop");
    assert.equal(chat.usage.prompt_tokens + chat.usage.completion_tokens, chat.usage.total_tokens);
    assert.ok(chat.usage.lacuna.tokens_per_forward > 0);
    assert.ok(chat._request_id);
  }
});

test("a chat, streamed", async () => {
  for (const model of ["nano", "nano-ar"]) {
    const stream = await client.chat.completions.create({
      model, messages, stream: true, stream_options: { include_usage: true },
    });
    let text = "", usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage ??= chunk.usage;
    }
    assert.equal(text, ANSWER);
    assert.ok(usage.completion_tokens > 10);
  }
});

test("a chat that the client itself puts together", async () => {
  const stream = client.chat.completions.stream({ model: "nano-ar", messages, logprobs: true });
  const chat = await stream.finalChatCompletion();
  assert.equal(chat.choices[0].message.content, ANSWER);
  assert.equal(chat.choices[0].logprobs.content.map((entry) => entry.token).join(""), ANSWER);
});

test("drafts", async () => {
  const stream = await client.chat.completions.create({
    model: "nano", messages, max_tokens: 32, stream: true, diffusing: true,
    lacuna: { diffusion: { steps: 8, block_length: 8 } },
  });
  const drafts = [];
  for await (const chunk of stream) drafts.push(chunk.choices[0].delta.content);
  assert.equal(drafts[0], "░".repeat(32));
  assert.equal(drafts.at(-1), ANSWER);
});

test("leaving in the middle", async () => {
  const stream = await client.chat.completions.create({
    model: "nano", messages, max_tokens: 200, stream: true,
    lacuna: { diffusion: { steps: 4000, block_length: 200, finish_early: false, suppress_end: true } },
  });
  for await (const _ of stream) break;
});

test("completions, streamed and not, and between two texts", async () => {
  const asked = { model: "nano-ar", prompt: TASK, stop: [" if"] };
  const whole = await client.completions.create(asked);
  assert.equal(whole.choices[0].text, "    return sum(x for x in xs");
  let text = "";
  for await (const chunk of await client.completions.create({ ...asked, stream: true })) text += chunk.choices[0].text;
  assert.equal(text, whole.choices[0].text);
  const gap = { model: "nano", prompt: `${TASK}    return sum(`, suffix: " if x > 17)\n", max_tokens: 5 };
  assert.equal((await client.completions.create(gap)).choices[0].text, "x for x in xs");
});

test("models", async () => {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.deepEqual(names, ["nano", "nano-ar"]);
});

test("errors", async () => {
  const wrong = (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature" && Boolean(error.requestID);
  await assert.rejects(client.chat.completions.create({ model: "nano", messages, temperature: 12 }), wrong);
  const unknown = (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found";
  await assert.rejects(client.completions.create({ model: "gpt-4o", prompt: TASK }), unknown);
  const tools = [{ type: "function", function: { name: "f", parameters: {} } }];
  await assert.rejects(client.chat.completions.create({ model: "nano", messages, tools }), (error) => error.param === "tools");
});
