// ONNX Runtime in WebAssembly, called as the scripts of onnxruntime-web call it, but without them.
//
// They copy every tensor into and out of WebAssembly's memory at every call. Here a tensor may stay
// there: it is a pointer then, else {type, dims, data}. They also wait while they hold a part of
// the stack, and two calls at once give it back in the wrong order, until it overwrites what lies
// below (onnxruntime-web 1.30). Here `run` waits for nothing.

const CODES = { float32: 1, int64: 7 }; // of TensorProto.DataType in ONNX
const ARRAYS = { 1: ["float32", Float32Array], 7: ["int64", BigInt64Array] };
const WARNING = 2; // and worse is logged
const CPU = 1; // where all tensors are

export class Runtime {
  // wasm: the response with the program; script: the address of what loads it.
  static async open(wasm, script, threads) {
    const [program, { default: start }] = await Promise.all([compile(wasm), import(script)]);
    const instantiateWasm = (imports, done) =>
      done(new WebAssembly.Instance(program, imports), program);
    const runtime = new Runtime();
    runtime.wasm = await start({ numThreads: threads, instantiateWasm });
    runtime.check(runtime.wasm._OrtInit(threads, WARNING));
    runtime.options = runtime.wasm._OrtCreateRunOptions(WARNING, 0, false, 0);
    return runtime;
  }

  // The graph of an .onnx file, as it is: no optimization. files: {name: bytes}, that it refers to.
  graph(bytes, files) {
    const { wasm } = this, buffer = this.copy(bytes);
    const options = wasm._OrtCreateSessionOptions(0, false, false, 0, false, 0, 0, WARNING, 0, 0);
    for (const [name, content] of Object.entries(files)) wasm.mountExternalData(name, content);
    try {
      const session = wasm._OrtCreateSession(buffer, bytes.length, options);
      this.check(session === 0);
      return new Graph(this, session);
    } finally {
      wasm.unmountExternalData();
      wasm._OrtReleaseSessionOptions(options);
      wasm._free(buffer);
    }
  }

  // All memory as bytes; a thread may have made it larger since the last call.
  bytes() {
    this.wasm.getValue(0, "i32"); // renews the views
    return this.wasm.HEAPU8;
  }

  // The 32-bit words at a pointer.
  wordsAt(pointer, count) {
    return new Uint32Array(this.bytes().buffer, pointer >>> 0, count);
  }

  // Bytes in WebAssembly's memory.
  copy({ buffer, byteOffset, byteLength }) {
    const pointer = this.wasm._malloc(byteLength);
    this.check(pointer === 0 && byteLength > 0, "out of memory");
    this.bytes().set(new Uint8Array(buffer, byteOffset, byteLength), pointer);
    return pointer;
  }

  // Do something with `count` words of the stack, all 0.
  withWords(count, work) {
    const { wasm } = this, stack = wasm.stackSave();
    try {
      const pointer = wasm.stackAlloc(4 * count);
      this.wordsAt(pointer, count).fill(0);
      return work(pointer);
    } finally {
      wasm.stackRestore(stack);
    }
  }

  // The tensor as [pointer, buffer], both of which are the caller's to free.
  upload({ type, dims, data }) {
    const buffer = this.copy(data);
    const pointer = this.withWords(dims.length, (shape) => {
      this.wordsAt(shape, dims.length).set(dims);
      const size = data.byteLength;
      return this.wasm._OrtCreateTensor(CODES[type], buffer, size, shape, dims.length, CPU);
    });
    this.check(pointer === 0);
    return [pointer, buffer];
  }

  // The tensor at a pointer, which is freed.
  download(pointer) {
    return this.withWords(4, (out) => {
      this.check(this.wasm._OrtGetTensorData(pointer, out, out + 4, out + 8, out + 12));
      const [code, at, shape, rank] = this.wordsAt(out, 4), dims = [...this.wordsAt(shape, rank)];
      const [type, Kind] = ARRAYS[code], size = dims.reduce((product, n) => product * n, 1);
      const data = new Kind(this.bytes().slice(at, at + size * Kind.BYTES_PER_ELEMENT).buffer);
      this.wasm._OrtFree(shape);
      this.free(pointer);
      return { type, dims, data };
    });
  }

  free(pointer) {
    this.wasm._OrtReleaseTensor(pointer);
  }

  // Throw what went wrong, if anything did.
  check(failed, problem) {
    if (!failed) return;
    const said = problem ?? this.withWords(2, (out) => {
      this.wasm._OrtGetLastError(out, out + 4);
      return this.wasm.UTF8ToString(this.wordsAt(out, 2)[1]);
    });
    throw new Error(`ONNX Runtime: ${said}; load the page again`);
  }
}

class Graph {
  constructor(runtime, session) {
    const { wasm } = runtime, names = [];
    const [inputs, outputs] = runtime.withWords(2, (out) => {
      runtime.check(wasm._OrtGetInputOutputCount(session, out, out + 4));
      return [...runtime.wordsAt(out, 2)];
    });
    for (let i = 0; i < inputs + outputs; i++) {
      names.push(runtime.withWords(2, (out) => {
        runtime.check(wasm._OrtGetInputOutputMetadata(session, i, out, out + 4));
        const [name, metadata] = runtime.wordsAt(out, 2);
        wasm._OrtFree(metadata);
        return name;
      }));
    }
    const pointers = runtime.copy(Uint32Array.from(names));
    const said = names.map((name) => wasm.UTF8ToString(name));
    const own = { inputs: said.slice(0, inputs), outputs: said.slice(inputs), pointers };
    Object.assign(this, { runtime, session, ...own });
  }

  // {name: tensor or pointer} -> {name: pointer}, which are the caller's to free.
  run(given) {
    const { runtime, session, inputs, outputs, pointers } = this, { wasm, options } = runtime;
    const uploaded = [];
    const pointerOf = (tensor) => {
      if (typeof tensor === "number") return tensor;
      uploaded.push(runtime.upload(tensor));
      return uploaded.at(-1)[0];
    };
    try {
      const values = inputs.map((name) => pointerOf(given[name])), size = inputs.length;
      return runtime.withWords(size + outputs.length, (at) => {
        runtime.wordsAt(at, size).set(values);
        const results = at + 4 * size, names = [pointers, pointers + 4 * size];
        const count = outputs.length;
        runtime.check(wasm._OrtRun(session, names[0], at, size, names[1], count, results, options));
        const made = [...runtime.wordsAt(results, count)];
        return Object.fromEntries(outputs.map((name, i) => [name, made[i]]));
      });
    } finally {
      for (const [pointer, buffer] of uploaded) {
        runtime.free(pointer);
        wasm._free(buffer);
      }
    }
  }
}

// Compiled while it arrives, which browsers only do if the type of the file is right.
async function compile(response) {
  const answer = await response, headers = { "content-type": "application/wasm" };
  const isRight = answer.headers.get("content-type") === headers["content-type"];
  return WebAssembly.compileStreaming(isRight ? answer : new Response(answer.body, { headers }));
}
