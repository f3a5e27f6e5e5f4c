// Before the page is painted: the reader's own choice of light or dark, kept in this browser.
const chosen = localStorage.getItem("theme");
if (chosen) document.documentElement.dataset.theme = chosen;
document.documentElement.classList.add("js");
