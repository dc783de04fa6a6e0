// Runs a program for wasm32-wasip1 under Node's WASI: node wasi.mjs PROGRAM.wasm [ARGUMENT...]
// It sees the environment and the current folder, has one thread, and ends with the program's exit status; a trap is an error.
import { readFile } from "node:fs/promises";
import { WASI } from "node:wasi";

const args = process.argv.slice(2);
const wasi = new WASI({ version: "preview1", args, env: process.env, preopens: { ".": "." }, returnOnExit: true });
const module = await WebAssembly.compile(await readFile(args[0]));
process.exitCode = wasi.start(await WebAssembly.instantiate(module, wasi.getImportObject()));
