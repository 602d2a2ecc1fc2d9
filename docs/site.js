// What the theme leaves out for those who read by keyboard or by ear: boxes that scroll take the focus, the search has a name.
document$.subscribe(() => {
  for (const box of document.querySelectorAll(".md-typeset pre > code, .md-typeset__scrollwrap")) box.tabIndex = 0;
  document.querySelector(".md-search").setAttribute("aria-label", "Search");
});
