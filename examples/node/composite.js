// Puts an object into a scene on a running server, with progress.
//
//   npm install
//   node composite.js localhost:50051 ../object.png ../scene.png 150,30,265,239 out.png

const fs = require("node:fs");
const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [address, reference, scene, box, output] = process.argv.slice(2);
if (!output) {
  console.error("usage: node composite.js ADDRESS REFERENCE SCENE X0,Y0,X1,Y1 OUTPUT");
  process.exit(2);
}

const folder = path.join(__dirname, "../../proto");
const definition = loader.loadSync("anydoor/v1/compositor.proto", {
  includeDirs: [folder],
  longs: String, // seeds have 64 bits
  defaults: true,
});
const { CompositorService } = grpc.loadPackageDefinition(definition).anydoor.v1;
// ANYDOOR_CA is the PEM file of the authority that signed the server's certificate, ANYDOOR_TOKEN a bearer token
const { ANYDOOR_CA, ANYDOOR_TOKEN } = process.env;
const credentials = ANYDOOR_CA
  ? grpc.credentials.createSsl(read(ANYDOOR_CA))
  : grpc.credentials.createInsecure();
const metadata = new grpc.Metadata();
if (ANYDOOR_TOKEN) metadata.set("authorization", `Bearer ${ANYDOOR_TOKEN}`);
const client = new CompositorService(address, credentials, {
  "grpc.max_receive_message_length": -1,
});

function read(file) {
  try {
    return fs.readFileSync(file);
  } catch (error) {
    console.error(`cannot read ${file}: ${error.code}`);
    process.exit(2);
  }
}

const [x0, y0, x1, y1] = box.split(",").map(Number);
const request = {
  scene: read(scene),
  placements: [{ reference: read(reference), box: { x0, y0, x1, y1 } }],
  sampling: { steps: 20 }, // what is not set is as the model's defaults say
  seed: 7,
};

const call = client.compositeStream({ request }, metadata, { deadline: Date.now() + 600_000 });
call.on("data", ({ queued, stepDone, result }) => {
  if (queued) console.log(`${queued.position} requests before this one`);
  if (stepDone) console.log(`step ${stepDone.done} of ${stepDone.total}`);
  if (result) {
    fs.writeFileSync(output, result.images[0].image);
    console.log(`${output} (seed ${result.images[0].seed}, request ${result.requestId})`);
  }
});
call.on("error", (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
