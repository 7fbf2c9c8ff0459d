// The site without a network. The exporter writes VERSION and FILES above.
//
// All files but the page lie in a folder that is named by their hash, so that files of two exports
// are never mixed. The page itself comes from the network first: a new export is there on reload.

/* global VERSION, FILES */

const SCOPE = self.registration.scope; // caches of other sites of this host are theirs
const CACHE = `${SCOPE} ${VERSION}`;
const PAGES = [SCOPE, `${SCOPE}index.html`];
const URLS = FILES.map((name) => new URL(name, SCOPE).href);
const PATIENCE = 3000; // milliseconds until the kept page is shown on a slow network

async function install() {
  const cache = await caches.open(CACHE);
  const options = { cache: "no-cache", redirect: "error" }; // what is kept is the site's own
  await cache.addAll([SCOPE, ...URLS].map((url) => new Request(url, options)));
  await self.skipWaiting();
}

async function activate() {
  const names = await caches.keys();
  const old = names.filter((name) => name.startsWith(`${SCOPE} `) && name !== CACHE);
  await Promise.all(old.map((name) => caches.delete(name)));
  await self.clients.claim();
}

async function page() {
  try {
    const options = { cache: "no-cache", signal: AbortSignal.timeout(PATIENCE) };
    const answer = await fetch(SCOPE, options);
    if (answer.redirected) return Response.redirect(answer.url); // such as to a login
    if (answer.ok) return answer;
  } catch {
    // There is no network: the kept page does.
  }
  return (await kept(SCOPE)) ?? Response.error();
}

const kept = async (url) => (await caches.open(CACHE)).match(url);

const keptOrFetched = async (request, url) => (await kept(url)) ?? fetch(request);

self.addEventListener("install", (event) => event.waitUntil(install()));
self.addEventListener("activate", (event) => event.waitUntil(activate()));
self.addEventListener("fetch", (event) => {
  const { request } = event, url = request.url.replace(/[?#].*$/, "");
  if (request.method !== "GET") return;
  if (PAGES.includes(url)) event.respondWith(page());
  else if (URLS.includes(url)) event.respondWith(keptOrFetched(request, url));
});
