// Makes docs/studio.png: `npm run picture`, after `make browser`.

import { join } from "node:path";
import { drag, finished, launch, open, prepare, ROOT, serve } from "./studio.mjs";

const browser = await launch();
const server = await serve();
const { page } = await open(server.url, { viewport: { width: 1000, height: 800 } });
await prepare(page, "50");
await drag(page, [165, 75], [245, 215]);
await page.locator("#seed").fill("7");
await page.locator("#start").click();
await finished(page);
await page.evaluate(() => window.scrollTo(0, 0));
await page.screenshot({ path: join(ROOT, "docs/studio.png") });
await browser.close();
server.stop("SIGTERM");
