// Scores texts with an ONNX Runtime variant: node golden.mjs FOLDER [TEXT ...]
// Checks the golden rows, then prints the label and the score of each text. Exit status: 0, 1 if a
// golden row differs, 2 on any error.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";

const MIN_LENGTH = 2; // tokens; exported graphs do not support shorter rows
// Largest difference to the golden logits that rounding explains, relative to the largest of them.
const TOLERANCE = { fp32: 1e-3, fp16: 1e-2, bf16: 5e-2 };
const INT8_TOLERANCE = 1e-1;

const readJson = (folder, name) => JSON.parse(readFileSync(join(folder, name), "utf8"));
const largest = (logits) => logits.reduce((best, each, at) => (each > logits[best] ? at : best), 0);

/** Returns a function from a text to its token ids, at most `max_length` long. */
function readTokenizer(folder) {
  const settings = readJson(folder, "preprocessor.json");
  if (settings.kind !== "text") {
    throw new Error("this variant classifies images; this program takes texts only.");
  }
  const tokenizer = new Tokenizer(readJson(folder, "tokenizer.json"), {});
  const whole = (text) => tokenizer.encode(text).ids;
  const inner = (text) => tokenizer.encode(text, { add_special_tokens: false }).ids;
  const [before, after] = specialTokens(whole("a"), inner("a"));
  const room = settings.max_length - before.length - after.length;
  const space = whole(" ");
  const empty = space.length ? space : [settings.pad_id]; // a text without any token
  return (text) => {
    const ids = inner(text);
    const left = settings.truncation_side === "left";
    const kept = ids.length <= room ? ids : left ? ids.slice(ids.length - room) : ids.slice(0, room);
    const row = [...before, ...kept, ...after];
    return row.length ? row : [...empty];
  };
}

/** The special tokens before and after a row, from a row with and without them. */
function specialTokens(whole, inner) {
  for (let at = 0; at + inner.length <= whole.length; at++) {
    if (inner.every((id, index) => whole[at + index] === id)) {
      return [whole.slice(0, at), whole.slice(at + inner.length)];
    }
  }
  throw new Error("tokenizer.json adds special tokens inside a row. Use the Python package.");
}

/** Returns a function from a text to its logits. */
async function loadVariant(folder) {
  const manifest = readJson(folder, "manifest.json");
  if (manifest.format !== 1) {
    throw new Error("manifest.json is not of format 1. Export the variant again.");
  }
  if (manifest.runtime !== "onnxruntime") {
    const found = manifest.runtime;
    throw new Error(`the runtime of this variant is ${found}; give a folder of onnxruntime.`);
  }
  const encode = readTokenizer(folder);
  const { pad_id: pad, padding_side: side } = readJson(folder, "preprocessor.json");
  const session = await ort.InferenceSession.create(join(folder, "model.onnx"));
  const tensor = (row) => new ort.Tensor("int64", BigInt64Array.from(row, BigInt), [1, row.length]);
  const logits = async (text) => {
    const ids = encode(text);
    const mask = ids.map(() => 1);
    while (ids.length < MIN_LENGTH) {
      side === "left" ? ids.unshift(pad) : ids.push(pad);
      side === "left" ? mask.unshift(0) : mask.push(0);
    }
    const found = await session.run({ input_ids: tensor(ids), attention_mask: tensor(mask) });
    return Array.from(found.logits.data);
  };
  return { precision: manifest.precision, labels: readJson(folder, "labels.json"), logits };
}

/** Compares the golden rows; returns the number of those that differ. */
async function checkGoldenRows(variant, golden) {
  const { rows, logits: expected } = golden;
  const fits = expected.every((logits) => logits.length === variant.labels.length);
  if (!rows.length || rows.length !== expected.length || !fits) {
    throw new Error("golden.json needs a list of logits, one a class, per row. Export again.");
  }
  const scale = Math.max(...expected.flat().map(Math.abs));
  const allowed = (TOLERANCE[variant.precision] ?? INT8_TOLERANCE) * scale;
  let different = 0;
  let worst = 0;
  for (const [row, text] of rows.entries()) {
    const found = await variant.logits(text);
    const difference = Math.max(...found.map((each, at) => Math.abs(each - expected[row][at])));
    const [label, wanted] = [found, expected[row]].map((logits) => variant.labels[largest(logits)]);
    if (label !== wanted || !(difference <= allowed)) {
      different += 1;
      console.error(
        `golden row ${row + 1} differs: label ${label}, expected ${wanted}; ` +
          `logits differ by ${difference.toPrecision(3)}, allowed ${allowed.toPrecision(3)}`,
      );
    }
    worst = Math.max(worst, difference);
  }
  if (!different) {
    const figures = `logits differ by ${worst.toPrecision(3)}, allowed ${allowed.toPrecision(3)}`;
    console.log(`${rows.length} golden rows agree: ${figures}`);
  }
  return different;
}

async function main([folder, ...texts]) {
  if (!folder) {
    console.error("usage: node golden.mjs FOLDER [TEXT ...]");
    return 2;
  }
  const variant = await loadVariant(folder);
  if (await checkGoldenRows(variant, readJson(folder, "golden.json"))) return 1;
  for (const text of texts) {
    const logits = await variant.logits(text);
    const label = largest(logits);
    const sum = logits.reduce((total, each) => total + Math.exp(each - logits[label]), 0);
    console.log(`${variant.labels[label]}\t${(1 / sum).toFixed(6)}`);
  }
  return 0;
}

try {
  process.exitCode = await main(process.argv.slice(2));
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exitCode = 2;
}
