// What screen readers and keyboards need and the theme lacks: a name for the search dialog, and code
// and tables that can be scrolled without a mouse.
function complete() {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  for (const wide of document.querySelectorAll("pre > code, .md-typeset table")) {
    if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;
  }
}
complete();
addEventListener("resize", complete);
window.document$?.subscribe(complete); // each page of the navigation without loading
