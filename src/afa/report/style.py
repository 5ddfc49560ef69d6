"""The style sheet of report.html: light and dark by the reader's preference, from phone to wide screen."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2430; --muted: #5b6675; --rule: #dfe3e9; --grid: #e8ebf0;
  --seg: #2563eb; --propagated: #d9620a; --cam: #0d8f83; --cls: #7c3aed;
  --up: #15803d; --down: #b91c1c; --done: #dcf5e4; --open: #fdf0d3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11151b; --card: #1a2029; --ink: #e6eaf0; --muted: #9aa6b5; --rule: #2c3542; --grid: #262e39;
    --seg: #6ea0ff; --propagated: #ff9a4d; --cam: #3ccfc0; --cls: #b794ff;
    --up: #5dd28a; --down: #ff8a80; --done: #173d26; --open: #45360f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main, footer { max-width: 1200px; margin: 0 auto; padding: 32px 24px 8px; }
footer { padding: 8px 24px 32px; color: var(--muted); font-size: 13px; }
section {
  margin: 20px 0; padding: 20px;
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
}
h1 {
  display: flex; flex-wrap: wrap; align-items: center; gap: 6px 12px;
  margin: 2px 0 4px; font-size: 30px; line-height: 1.2; overflow-wrap: anywhere;
}
h2 { margin: 0 0 14px; font-size: 18px; }
h3 { margin: 0; font-size: 14px; font-weight: 600; }
ul { list-style: none; margin: 0; padding: 0; }
figure { margin: 0; min-width: 0; }
header p { margin: 0; max-width: 76ch; color: var(--muted); }
header .kind { font-size: 13px; letter-spacing: .06em; text-transform: uppercase; }
header .facts { margin-bottom: 6px; color: var(--ink); }
.badge { padding: 3px 10px; border-radius: 99px; font-size: 13px; font-weight: 600; white-space: nowrap; }
.done { background: var(--done); color: var(--up); }
.open { background: var(--open); }
.note { margin: 14px 0 0; max-width: 95ch; font-size: 13px; color: var(--muted); }
.missing { margin: 0 0 12px; padding: 10px 14px; border-radius: 8px; background: var(--open); }

.tiles { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 12px; margin: 22px 0; }
.tile { padding: 14px 16px; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile dt { font-size: 13px; color: var(--muted); }
.tile dd { margin: 2px 0 0; font-size: 28px; font-weight: 650; line-height: 1.2; }
.tile dd { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile dd.note { margin: 2px 0 0; font-size: 12.5px; font-weight: 400; line-height: 1.5; min-height: 1.5em; }
.tile small { font-size: 14px; font-weight: 500; color: var(--muted); }
.tile.text .value { padding: 5px 0 4px; font-size: 18px; line-height: 24px; }
.tile.lead { border-color: var(--seg); box-shadow: inset 4px 0 0 var(--seg); }
.tile.lead .value { color: var(--seg); }
.none { color: var(--muted); }

.pictures { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 8px; }
.pictures { align-items: start; }
.pictures figcaption { display: none; font-size: 12px; color: var(--muted); }
.pictures img { display: block; width: 100%; height: auto; border-radius: 4px; }
.head { margin-bottom: 2px; font-size: 13px; font-weight: 600; }
.hole { display: grid; place-items: center; aspect-ratio: 4 / 3; font-size: 12px; color: var(--muted); }
.hole { border: 1px dashed var(--rule); border-radius: 4px; }
.example { padding: 8px 0 6px; }
.example h3 { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 10px; margin-bottom: 6px; }
.example h3 { font-size: 13px; font-weight: 500; color: var(--muted); }
.tags { display: flex; flex-wrap: wrap; gap: 4px; }
.tags li { padding: 0 8px; border: 1px solid var(--rule); border-radius: 99px; }
.tags li { font-size: 12px; color: var(--ink); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; color: var(--muted); }
.legend i { display: inline-block; width: 11px; height: 11px; margin-right: 6px; border-radius: 3px; }
.legend i { vertical-align: -1px; }
.classes { margin-top: 14px; color: var(--ink); }
.classes i { width: 14px; height: 14px; vertical-align: -2px; }
.classes .hatched { border: 1px solid var(--muted); }
.classes .hatched { background: repeating-linear-gradient(135deg, #fff 0 2px, #b8bec8 2px 5px); }

.chart figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 18px; }
.chart figcaption { margin-bottom: 8px; font-size: 13px; color: var(--muted); }
.chart b { font-size: 14px; color: var(--ink); }
.plot { padding: 6px 14px 26px 52px; }
.plot.bars { padding-left: 116px; }
.plot > svg { display: block; width: 100%; overflow: visible; }
.plot > .lines { height: 150px; }
.wide .lines { height: 240px; }
.wide { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 14px 20px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 14px 20px; }
.panels { margin-top: 18px; }
svg text { font-size: 12px; fill: var(--muted); }
svg .name { font-size: 13px; fill: var(--ink); }
svg .mark { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
svg .grid { stroke: var(--grid); }
svg .boundary { stroke: var(--muted); stroke-dasharray: 4 4; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
svg .faint { stroke-width: 1; opacity: .35; }
svg .band { fill: var(--ink); fill-opacity: 0; }
svg .band:hover, g:hover > .band { fill-opacity: .07; }

.pair { display: grid; grid-template-columns: minmax(0, 6fr) minmax(0, 5fr); gap: 28px; align-items: start; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 8px; border-bottom: 1px solid var(--rule); text-align: right; }
th:first-child { text-align: left; font-weight: 500; }
thead th { font-weight: 500; color: var(--muted); vertical-align: bottom; }
.mean th, .mean td { border-top: 2px solid var(--muted); border-bottom: 0; font-weight: 700; }
.up { color: var(--up); }
.down { color: var(--down); }
.plain { width: auto; }
.plain th, .plain td { padding: 2px 16px 2px 0; border: 0; text-align: left; vertical-align: top; }
.plain th { font-weight: 400; color: var(--muted); }
.plain td { overflow-wrap: anywhere; }
details { margin-top: 16px; }
summary { cursor: pointer; font-size: 14px; font-weight: 600; }
.config { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 18px 28px; }
.config { margin-top: 14px; }
code { font: 12.5px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }

@media (max-width: 900px) {
  .pair { grid-template-columns: minmax(0, 1fr); }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
@media (max-width: 640px) {
  main { padding: 20px 12px 4px; }
  footer { padding: 8px 12px 24px; }
  section { padding: 14px; }
  h1 { font-size: 24px; }
  .tile { padding: 10px 12px; }
  .tile dd { font-size: 23px; }
  .pictures { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .pictures figcaption { display: block; }
  .pictures.head { display: none; }
  .wide, .panels, .config { grid-template-columns: minmax(0, 1fr); }
  .plot { padding-left: 46px; padding-right: 6px; }
  .plot.bars { padding-left: 104px; }
  .wide .lines { height: 200px; }
  th, td { padding: 4px 5px; }
}
@media print { section, .tile, .example { break-inside: avoid; } }
"""
