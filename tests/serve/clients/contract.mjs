// The official openai client for Node against the running gateway. Prints one JSON line a case, whose name begins
// with its feature (docs/compatibility.md).
import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";

const { BESPOKE_URL: baseURL, BESPOKE_KEY: apiKey, BESPOKE_LIMITED_KEY: limitedKey } = process.env;
const { BESPOKE_MODEL: model, BESPOKE_ADAPTER: adapter } = process.env;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: "Hello" }];
const asked = { model, messages, max_tokens: 8, temperature: 0 };
const tools = [
  {
    type: "function",
    function: {
      name: "weather",
      parameters: {
        type: "object",
        properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
        required: ["city"],
        additionalProperties: false,
      },
    },
  },
];

const cases = {
  async "chat; a whole answer and a stream say the same"() {
    const whole = await client.chat.completions.create(asked);
    let text = "", usage;
    const stream = await client.chat.completions.create({
      ...asked, stream: true, stream_options: { include_usage: true },
    });
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
    assert.match(whole._request_id, /^req_/);
  },
  async "a customer's adapter; a customer's adapter answers under its own name"() {
    const answer = await client.chat.completions.create({ ...asked, model: adapter });
    assert.equal(answer.model, adapter);
  },
  async "text completions; text completions"() {
    const answer = await client.completions.create({ model, prompt: ["Once", "Two"], max_tokens: 3, echo: true });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1]);
    assert.ok(answer.choices[1].text.startsWith("Two"));
  },
  async "tools; a tool is called, whole and streamed"() {
    const request = { ...asked, max_tokens: 120, tools, tool_choice: "required" };
    const whole = await client.chat.completions.create(request);
    const [call] = whole.choices[0].message.tool_calls;
    assert.equal(call.function.name, "weather");
    assert.ok(["Paris", "Rome"].includes(JSON.parse(call.function.arguments).city));
    assert.equal(whole.choices[0].finish_reason, "tool_calls");
    const final = await client.chat.completions.stream(request).finalChatCompletion();
    assert.equal(final.choices[0].message.tool_calls[0].function.name, "weather");
    assert.equal(final.choices[0].finish_reason, "tool_calls");
  },
  async "structured output; structured output"() {
    const schema = { type: "object", properties: { sunny: { type: "boolean" } }, required: ["sunny"], additionalProperties: false };
    const answer = await client.chat.completions.parse({
      ...asked, max_tokens: 60,
      response_format: { type: "json_schema", json_schema: { name: "forecast", schema, strict: true } },
    });
    assert.equal(typeof answer.choices[0].message.parsed.sunny, "boolean");
  },
  async "log-probabilities; logprobs"() {
    const answer = await client.chat.completions.create({ ...asked, max_tokens: 2, logprobs: true, top_logprobs: 1 });
    assert.equal(answer.choices[0].logprobs.content.length, 2);
  },
  async "models; models"() {
    const names = [];
    for await (const one of client.models.list()) names.push(one.id);
    assert.ok(names.includes(model) && names.includes(adapter));
    assert.equal((await client.models.retrieve(adapter)).id, adapter);
  },
  async "the client's own errors; errors are the client's own classes"() {
    await assert.rejects(client.chat.completions.create({ ...asked, model: "nobody/nothing" }), OpenAI.NotFoundError);
    await assert.rejects(client.chat.completions.create({ ...asked, temperature: 9 }), (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.equal(error.param, "temperature");
      return true;
    });
    const stranger = new OpenAI({ baseURL, apiKey: "bsk-wrong", maxRetries: 0 });
    await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
    await assert.rejects(client.embeddings.create({ model, input: "Hello" }), OpenAI.BadRequestError);
  },
  async "retries of a 429; a 429 is retried until there is room"() {
    const patient = new OpenAI({ baseURL, apiKey: limitedKey, maxRetries: 8, timeout: 60_000 });
    const stream = await patient.chat.completions.create({ ...asked, max_tokens: 600, stream: true });
    await stream[Symbol.asyncIterator]().next();
    const hasty = new OpenAI({ baseURL, apiKey: limitedKey, maxRetries: 0 });
    await assert.rejects(hasty.chat.completions.create(asked), OpenAI.RateLimitError);
    setTimeout(() => stream.controller.abort(), 1000);
    assert.ok((await patient.chat.completions.create(asked)).choices.length);
  },
  async "leaving a stream; a stream that is left is left"() {
    const stream = await client.chat.completions.create({ ...asked, max_tokens: 600, stream: true });
    for await (const _ of stream) break;
  },
  async "Idempotency-Key; a retry with the same idempotency key gets the same answer"() {
    const options = { idempotencyKey: `node-${process.hrtime.bigint()}`, headers: {} };
    options.headers["Idempotency-Key"] = options.idempotencyKey;
    const first = await client.chat.completions.create({ ...asked, temperature: 1 }, options);
    const second = await client.chat.completions.create({ ...asked, temperature: 1 }, options);
    assert.equal(second.id, first.id);
  },
  async "batches; a batch from file to file"() {
    const line = { custom_id: "one", method: "POST", url: "/v1/chat/completions", body: asked };
    const file = await client.files.create({
      file: await toFile(Buffer.from(JSON.stringify(line)), "work.jsonl"), purpose: "batch",
    });
    let batch = await client.batches.create({
      input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h",
    });
    for (let tries = 0; tries < 240 && !["completed", "failed"].includes(batch.status); tries += 1) {
      await new Promise((resolve) => setTimeout(resolve, 250));
      batch = await client.batches.retrieve(batch.id);
    }
    assert.equal(batch.status, "completed");
    const text = await (await client.files.content(batch.output_file_id)).text();
    assert.equal(JSON.parse(text).response.status_code, 200);
  },
  async "Responses; responses, streamed and whole"() {
    const request = { model, input: "Hello", max_output_tokens: 16, temperature: 0 };
    const whole = await client.responses.create(request);
    const stream = await client.responses.create({ ...request, stream: true });
    let text = "";
    for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
    assert.equal(text, whole.output_text);
  },
};

for (const [name, run] of Object.entries(cases)) {
  let error = null;
  try {
    await run();
  } catch (caught) {
    error = `${caught?.stack ?? caught}`;
  }
  console.log(JSON.stringify({ name, error }));
}
