// While a run is under way: a newer page takes the place of this one, but for what its reader opened or shut.
const chosen = history.state ?? {};
const named = (details) => details.querySelector("summary").textContent.split(/ [·(]/)[0];
const keepOpen = () => document.querySelectorAll("details").forEach((details) => {
  details.open = chosen[named(details)] ?? details.open;
});
document.addEventListener("click", ({ target }) => {
  const details = target.closest("summary")?.parentElement;
  if (details) history.replaceState(Object.assign(chosen, { [named(details)]: !details.open }), "");
});
const part = (page, name) => page.querySelector(name);
const look = async () => {
  if (location.protocol === "file:") return location.reload(); // a file may not read itself
  const status = part(document, "[role=status]");
  let next;
  try {
    const answer = await fetch(location.href, { cache: "no-store" });
    next = new DOMParser().parseFromString(await answer.text(), "text/html");
  } catch {
    status.textContent = "The server of this page has ended: this is what it said last.";
    return;
  }
  const said = part(next, "[role=status]");
  status.textContent = said?.textContent ?? "The run has ended.";
  if (part(next, "main").innerHTML !== shown) {
    shown = part(next, "main").innerHTML;
    const focused = named(document.activeElement.parentElement?.closest("details") ?? part(document, "details"));
    const focus = document.activeElement.tagName === "SUMMARY";
    for (const name of ["nav", "main"]) part(document, name).replaceWith(part(next, name));
    document.title = next.title;
    keepOpen();
    makeSortable();
    if (focus) [...document.querySelectorAll("details")].find((one) => named(one) === focused)?.firstElementChild.focus();
  }
  if (said?.dataset.live !== undefined) setTimeout(look, 2000);
};
let shown = part(document, "main").innerHTML;
keepOpen();
setTimeout(look, location.protocol === "file:" ? 5000 : 2000);
