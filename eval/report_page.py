"""The page that a report is shown as: one file, without scripts or fonts from elsewhere."""

from __future__ import annotations

from string import Template

PAGE = Template("""\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Quantization report: $name</title>
<style>
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1f2937; --soft: #5b6472; --line: #e3e6eb;
  --accent: #2563eb }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1319; --card: #181d26; --ink: #e5e9f0; --soft: #9aa4b2; --line: #2b323e; --accent: #7aa7ff } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 74rem; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.75rem; letter-spacing: -.02em } h2 { margin: 2.5rem 0 .75rem; font-size: 1.2rem }
h3 { margin: 1.25rem 0 0; font-size: 1rem } p, dt, caption { color: var(--soft) } p { margin: .25rem 0 .75rem }
.card { overflow-x: auto; padding: 1rem; border: 1px solid var(--line); border-radius: 12px; background: var(--card) }
table { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
caption { caption-side: bottom; padding-top: .75rem; text-align: left; font-size: .85rem }
th, td { padding: .5rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: baseline }
th, .num { white-space: nowrap } .num { text-align: right } .mark { color: var(--accent) } h3:first-child { margin: 0 }
tbody tr:hover { background: color-mix(in srgb, var(--accent) 8%, transparent) }
th button { padding: 0; border: 0; background: none; color: var(--soft); font: inherit; cursor: pointer }
[aria-sort=ascending] button::after { content: " ▲" } [aria-sort=descending] button::after { content: " ▼" }
img { display: block; width: 100%; max-width: 54rem; margin: auto; border-radius: 8px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.5rem; margin: 0 }
dd { margin: 0; overflow-wrap: anywhere } pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
</style>
</head><body>
<header><h1>Quantization report: $name</h1><p>$model</p></header>
<main>
<div class="card" tabindex="0" role="region" aria-label="Results"><table>
<caption>★ $front. Press a heading to sort.</caption>
<thead><tr>$head</tr></thead>
<tbody>$rows</tbody>
</table></div>
<h2>Size against quality</h2>
<div class="card"><img alt="Artifact size against perplexity, as in the table" src="data:image/png;base64,$chart"></div>
<h2>Protocol</h2><dl class="card">$protocol</dl>
<h2>How to reproduce</h2><div class="card">$commands</div>
<h2>Environment</h2><dl class="card">$environment</dl>
</main>
<script>
const heads = [...document.querySelectorAll("thead th")], body = document.querySelector("tbody");
heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1, key = row => row.cells[column].dataset.value;
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const compare = head.className ? (a, b) => a - b : (a, b) => a.localeCompare(b);
  // Rows without a value stay last whichever way the others are sorted.
  body.append(...[...body.rows].sort((a, b) => (key(a) === "") - (key(b) === "") || sign * compare(key(a), key(b))));
}));
</script>
</body></html>
""")
