// The AI SDK with its default providers, and Anthropic's client for Node: base URL, key, model name, nothing else.
// Prints one JSON line a case, whose name is its client and its feature (docs/compatibility.md).
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, jsonSchema, streamText, tool } from "ai";
import OpenAI from "openai";

const { BESPOKE_URL: baseURL, BESPOKE_KEY: apiKey, BESPOKE_MODEL: model } = process.env;
globalThis.AI_SDK_LOG_WARNINGS = false;

const seen = [];
// What a provider sends and what it gets, to be looked at by a case.
const fetching = async (url, options) => {
  const answer = await fetch(url, options);
  seen.push({ url: `${url}`, body: JSON.parse(options.body), headers: answer.headers });
  return answer;
};
const settings = { baseURL, apiKey, fetch: fetching };
const openai = createOpenAI(settings), anthropic = createAnthropic(settings);
const prompt = "Hello", maxRetries = 0;
const schema = jsonSchema({
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
});
const tools = { weather: tool({ description: "The weather.", inputSchema: schema, execute: ({ city }) => `Rain in ${city}.` }) };

const text = async (result) => {
  let whole = "";
  for await (const piece of result.textStream) whole += piece;
  return whole;
};
const last = () => seen.at(-1);

const common = (client, feature, provider) => ({
  async [`${client}; ${feature}`]() {
    const asked = { model: provider(model), prompt, maxOutputTokens: 16, temperature: 0, maxRetries };
    const whole = await generateText(asked);
    assert.ok(whole.usage.outputTokens > 0);
    assert.equal(await text(streamText(asked)), whole.text);
  },
  async [`${client}; its own default length`]() {
    const whole = await generateText({ model: provider(model), prompt, maxRetries, stopSequences: ["e"] });
    assert.ok(whole.usage.inputTokens > 0);
  },
  async [`${client}; tools`]() {
    const asked = { model: provider(model), prompt, tools, maxOutputTokens: 120, temperature: 0, maxRetries };
    const first = await generateText({ ...asked, toolChoice: { type: "tool", toolName: "weather" } });
    assert.ok(["Paris", "Rome"].includes(first.toolCalls[0].input.city));
    const messages = [{ role: "user", content: prompt }, ...first.response.messages, { role: "user", content: "And?" }];
    const next = { ...asked, prompt: undefined, messages };
    assert.ok((await generateText(next)).usage.inputTokens > first.usage.inputTokens);
  },
});

const cases = {
  ...common("AI SDK (openai)", "Responses", openai),
  async "AI SDK (openai); a second turn by item_reference"() {
    const asked = { model: openai(model), maxOutputTokens: 16, temperature: 0, maxRetries };
    const first = await generateText({ ...asked, prompt });
    const messages = [
      { role: "user", content: prompt }, ...first.response.messages, { role: "user", content: "And now?" },
    ];
    const second = await generateText({ ...asked, messages });
    assert.ok(last().body.input.some((item) => item.type === "item_reference"), JSON.stringify(last().body.input));
    assert.ok(second.usage.inputTokens > first.usage.inputTokens);
    const unstored = { ...asked, messages, providerOptions: { openai: { store: false } } };
    assert.ok((await generateText(unstored)).usage.outputTokens > 0);
  },
  async "AI SDK (openai); hosted tools are left out and told"() {
    const asked = { model: openai(model), prompt, maxOutputTokens: 16, maxRetries };
    await generateText({ ...asked, tools: { web_search: openai.tools.webSearch({}) } });
    assert.match(last().headers.get("x-bespoke-ignored-tools"), /web_search/);
  },
  ...common("AI SDK (openai.chat)", "chat", openai.chat),
  ...common("AI SDK (anthropic)", "Messages", anthropic),
  async "AI SDK (anthropic); a length above the context is told"() {
    await generateText({ model: anthropic(model), prompt, maxRetries, stopSequences: ["e"] });
    assert.equal(last().body.max_tokens, 4096);
    assert.ok(Number(last().headers.get("x-bespoke-max-tokens")) < 4096);
  },
  async "Anthropic (Node); Messages"() {
    const client = new Anthropic({ baseURL: baseURL.replace(/\/v1$/, ""), apiKey, maxRetries: 0 });
    const asked = { model, max_tokens: 16, temperature: 0, messages: [{ role: "user", content: prompt }] };
    const whole = await client.messages.create(asked);
    assert.equal(await client.messages.stream(asked).finalText(), whole.content[0].text);
  },
  async "Anthropic (Node); token counts"() {
    const client = new Anthropic({ baseURL: baseURL.replace(/\/v1$/, ""), apiKey, maxRetries: 0 });
    const asked = { model, messages: [{ role: "user", content: prompt }] };
    const counted = await client.messages.countTokens(asked);
    const { usage } = await client.messages.create({ ...asked, max_tokens: 1 });
    assert.equal(counted.input_tokens, usage.input_tokens + usage.cache_read_input_tokens);
  },
  async "OpenAI (Node); token counts"() {
    const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
    const counted = await client.responses.inputTokens.count({ model, input: prompt });
    const { usage } = await client.responses.create({ model, input: prompt, max_output_tokens: 1 });
    assert.equal(counted.input_tokens, usage.input_tokens);
  },
  async "OpenAI (Node); uploads in parts"() {
    const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
    const upload = await client.uploads.create({ bytes: 6, filename: "a.jsonl", mime_type: "application/jsonl", purpose: "batch" });
    const ids = [];
    for (const piece of ["abc", "def"]) {
      const data = new File([piece], "blob");
      ids.push((await client.uploads.parts.create(upload.id, { data })).id);
    }
    const completed = await client.uploads.complete(upload.id, { part_ids: ids });
    assert.equal(completed.status, "completed");
    assert.equal(await (await client.files.content(completed.file.id)).text(), "abcdef");
    await client.files.delete(completed.file.id);
  },
};

for (const [name, run] of Object.entries(cases)) {
  let error = null;
  try {
    await run();
  } catch (caught) {
    error = `${caught?.stack ?? caught}\n${caught?.responseBody ?? ""}`;
  }
  console.log(JSON.stringify({ name, error }));
}
