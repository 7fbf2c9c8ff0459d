// The start of a page that holds all files: it gives each of them a data: address.
//
// Files are scripts that do not run, as base64, in an order in which modules come after those that
// they import. A page of file:// can give blob: addresses, too, but its worker may not read them.
{
  const element = document.getElementById("site"), site = JSON.parse(element.textContent);
  const decode = (text) =>
    new TextDecoder().decode(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
  const encode = (text) =>
    btoa(Array.from(new TextEncoder().encode(text), (byte) => String.fromCharCode(byte)).join(""));
  const withAddress = (text, [name, url]) => text.replaceAll(`"./${name}"`, `"${url}"`);
  const withAddresses = (text) => Object.entries(site.files).reduce(withAddress, text);
  for (const script of document.querySelectorAll("script[data-file]")) {
    const { file, type } = script.dataset, own = script.textContent;
    const text = type === "text/javascript" ? encode(withAddresses(decode(own))) : own;
    site.files[file] = `data:${type};base64,${text}`;
    script.remove();
  }
  site.worker = site.files["worker.js"];
  element.textContent = JSON.stringify(site);
}
