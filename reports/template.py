"""The page around the content: HTML skeleton, style sheet and the script that draws the figures.

The content security policy forbids every request, so a report cannot reach the network whatever stands in it.
"""

from __future__ import annotations

from string import Template

PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
<script>$plotly</script>
<script>$script</script>
</body>
</html>
"""
)

STYLE = """
:root {
  --page: #f5f6f8; --card: #ffffff; --ink: #17202b; --quiet: #55606e; --line: #e3e7ec; --soft: #f0f3f6;
  --accent: #0072b2; --good: #00714f; --good-soft: #e2f4ed; --warn: #8a5a00; --warn-soft: #fdf1d8;
  --bad: #a83f00; --bad-soft: #fdeae0;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #11151a; --card: #1a2028; --ink: #e8ecf1; --quiet: #a3aebb; --line: #2e3742; --soft: #222a34;
    --accent: #56b4e9; --good: #4fd1a5; --good-soft: #12352a; --warn: #f2c260; --warn-soft: #3a2d10;
    --bad: #ff9d6b; --bad-soft: #41210f;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink); line-height: 1.5; font-size: 15px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 4px; }
h3 { font-size: 14px; margin: 20px 0 6px; }
p { margin: 4px 0 12px; max-width: 92ch; overflow-wrap: anywhere; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; font-size: 13px; }
.quiet { color: var(--quiet); }
.head { display: flex; flex-wrap: wrap; gap: 10px 14px; align-items: center; }
.pill { font-size: 13px; font-weight: 600; border-radius: 999px; padding: 3px 12px; white-space: nowrap; }
.completed { color: var(--good); background: var(--good-soft); }
.interrupted, .warning { color: var(--warn); background: var(--warn-soft); }
.failed { color: var(--bad); background: var(--bad-soft); }
.about { color: var(--quiet); margin: 6px 0 0; max-width: none; }
.banner { border-radius: 10px; padding: 10px 16px; margin: 16px 0 0; max-width: none; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 18px 0 0; font-size: 14px; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); margin: 12px 0; }
.tiles.main { margin-top: 18px; }
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: 12px 16px 13px; }
.tile h3 { margin: 0; font-size: 13px; font-weight: 500; color: var(--quiet); }
.tile strong { display: block; font-size: 21px; line-height: 1.35; font-weight: 600; }
.main strong { font-size: 31px; line-height: 1.25; font-weight: 650; }
.tile span { display: block; font-size: 12.5px; line-height: 1.4; color: var(--quiet); }
section { padding: 20px 24px 22px; margin: 16px 0; scroll-margin-top: 12px; }
.grid { display: grid; gap: 8px 24px; grid-template-columns: repeat(auto-fit, minmax(min(310px, 100%), 1fr)); }
.halves { display: grid; gap: 12px 32px; grid-template-columns: repeat(auto-fit, minmax(min(430px, 100%), 1fr)); }
.halves > *, .grid > * { min-width: 0; }
figure { margin: 10px 0 0; }
figcaption { font-size: 14px; font-weight: 600; margin: 0 0 2px; }
.key { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; color: var(--quiet); margin: 6px 0 2px; }
.key i { display: inline-block; margin-right: 7px; vertical-align: middle; }
.key .line { width: 20px; border-top: 3px solid; }
.key .dash { width: 20px; border-top: 2px dashed; }
.key .dot { width: 20px; border-top: 2px dotted; }
.key .square { width: 11px; height: 11px; background: currentColor; border-radius: 2px; }
.key .circle { width: 11px; height: 11px; background: currentColor; border-radius: 50%; }
.key .diamond { width: 10px; height: 10px; background: currentColor; transform: rotate(45deg); }
.key .tick { width: 3px; height: 13px; background: currentColor; }
.key .faint { width: 9px; height: 9px; background: currentColor; border-radius: 50%; opacity: 0.45; }
.scroll { overflow: auto; max-height: 440px; border: 1px solid var(--line); border-radius: 8px; margin: 10px 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--quiet); font-size: 13px; background: var(--card);
  white-space: normal; overflow-wrap: break-word; max-width: 240px; vertical-align: bottom; line-height: 1.3; }
thead th { position: sticky; top: 0; z-index: 1; box-shadow: inset 0 -1px var(--line); }
tbody tr:last-child td { border-bottom: 0; }
tbody tr:hover td { background-color: var(--soft); }
th.text, td.text { text-align: left; }
td.text:first-child { font-weight: 500; min-width: 118px; max-width: 340px;
  white-space: normal; overflow-wrap: anywhere; }
td.wide { white-space: normal; color: var(--quiet); overflow-wrap: anywhere; }
td.value { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px;
  white-space: normal; overflow-wrap: anywhere; max-width: 340px; }
td b { color: var(--accent); }
tr.changed td.text:first-child { box-shadow: inset 3px 0 var(--accent); }
tr.changed td.value { color: var(--accent); font-weight: 600; }
tr.reference td { color: var(--quiet); }
table.even { table-layout: fixed; min-width: 560px; }
.even th:first-child { width: 25%; max-width: none; }
.pairs { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 14px; color: var(--quiet); }
.pairs b { font-weight: 500; color: var(--ink); }
.share { background-color: color-mix(in srgb, var(--accent) var(--share), transparent); }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--accent); font-size: 14px; }
pre { background: var(--soft); border-radius: 8px; padding: 12px 16px; margin: 8px 0; overflow-x: auto;
  user-select: all; }
footer { color: var(--quiet); font-size: 13px; margin-top: 20px; }
@media (max-width: 640px) {
  main { padding: 20px 12px 40px; }
  section { padding: 16px 14px; }
  .tiles { grid-template-columns: repeat(2, 1fr); gap: 8px; }
  .tile { padding: 10px 12px; }
}
@media print {
  body { background: #fff; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  figure, .tile, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { max-height: none; overflow: visible; }
}
"""

# Figures take their colours from the style sheet, again whenever the screen turns dark or light.
SCRIPT = """
const config = {displaylogo: false, responsive: true, displayModeBar: false};
function draw() {
  const style = getComputedStyle(document.documentElement);
  const color = name => style.getPropertyValue(name).trim();
  for (const box of document.querySelectorAll(".plot")) {
    const figure = JSON.parse(box.nextElementSibling.textContent);
    const look = figure.layout.template.layout;
    look.font.color = color("--quiet");
    look.hoverlabel.bgcolor = color("--card");
    look.hoverlabel.bordercolor = color("--line");
    look.hoverlabel.font.color = color("--ink");
    for (const axis of [look.xaxis, look.yaxis])
      axis.gridcolor = axis.linecolor = axis.tickcolor = color("--line");
    Plotly.react(box, figure.data, figure.layout, config);
  }
}
draw();
matchMedia("screen and (prefers-color-scheme: dark)").addEventListener("change", draw);
"""
