"""The style sheet of the HTML report."""

CSS = """
:root {
  color-scheme: light dark;
  --face: #f5f7f9; --card: #ffffff; --ink: #1c2530; --muted: #66717f; --line: #e1e5ea;
  --blue: #2b6cd4; --orange: #c95a12; --good: #148f6b; --bad: #c2364a;
  --tint-top: 93%; --tint-drop: 13%; --tint-rich: 92%;
}
@media (prefers-color-scheme: dark) {
  :root {
    --face: #0d1117; --card: #161b22; --ink: #e6eaf0; --muted: #98a3b0; --line: #2a313b;
    --blue: #6ea8ff; --orange: #ff9d52; --good: #4ccaa0; --bad: #ff7b86;
    --tint-top: 24%; --tint-drop: -14%; --tint-rich: 48%;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--face); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 14px; }
h3 { font-size: 14px; margin: 0; }
p { margin: 6px 0 14px; max-width: 75ch; }
.quiet { color: var(--muted); }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px;
}
.facts { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 24px; }
.fact { flex: 1 1 165px; }
.facts .hero { flex-basis: 100%; padding: 22px 24px; }
.fact .name { color: var(--muted); font-size: 13px; }
.fact .value { font-size: 23px; font-weight: 650; line-height: 1.35; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.hero .value { font-size: clamp(28px, 5vw, 46px); letter-spacing: -0.01em;
  white-space: normal; }
.fact .more { color: var(--muted); font-size: 13px; }
.gain { font-size: 0.5em; font-weight: 600; letter-spacing: 0; color: var(--good);
  margin-left: 0.7em; }
.gain.down { color: var(--bad); }
figure { margin: 0 0 18px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--muted); font-size: 13.5px; margin-top: 12px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr));
  gap: 14px; margin: 12px 0 30px; align-items: start; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.asked { border-left: 3px solid var(--line); padding: 2px 0 2px 14px; max-height: 220px;
  overflow: auto; }
.head { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: baseline;
  margin-bottom: 12px; }
.head .quiet { font-size: 13px; }
.mark { font-weight: 600; font-size: 13px; }
.mark.right { color: var(--good); }
.mark.wrong { color: var(--bad); }
.cells { display: flow-root; }
.t {
  display: inline-flex; flex-direction: column; align-items: center; vertical-align: top;
  margin: 0 2px 4px 0; padding: 1px 2px 0; min-width: 13px; border-radius: 3px; white-space: pre;
  max-width: 100%; overflow: hidden;
  font: 13px/1.4 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: hsl(calc(225 + 165 * var(--u)) var(--tint-rich)
    calc(var(--tint-top) - var(--tint-drop) * var(--u)));
}
.t b { font-weight: inherit; }
.t i { font: 8.5px/1.25 system-ui, sans-serif; opacity: 0.72; }
.t.filled { background: none; outline: 1px dashed var(--line); outline-offset: -1px; }
.ramp { display: inline-flex; align-items: center; gap: 8px; font-size: 13px;
  color: var(--muted); }
.ramp span { display: inline-flex; }
.ramp .t { margin: 0; width: 14px; height: 16px; border-radius: 0; }
.replay { position: absolute; opacity: 0; }
.replay + label { display: inline-block; margin-bottom: 8px; font-size: 13px;
  color: var(--blue); cursor: pointer; }
.replay:focus-visible + label { outline: 2px solid var(--blue); outline-offset: 2px; }
.replay:checked ~ .cells .t {
  animation: unmask 0.25s both; animation-delay: calc(var(--s) * var(--d));
}
@keyframes unmask { from { background: var(--line); color: transparent; } }
@media (prefers-reduced-motion: reduce) { .replay + label { display: none; } }
details { margin-bottom: 12px; }
summary { cursor: pointer; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; width: 100%; margin-top: 10px; }
th { text-align: left; color: var(--muted); font-weight: 500; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td code { font: 12.5px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
tr.set td code { font-weight: 700; color: var(--orange); }
footer { color: var(--muted); font-size: 13px; margin-top: 40px; }
"""
