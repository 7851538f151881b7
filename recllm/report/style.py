"""The style sheet: system fonts, one column, boxes that scroll by themselves, and print."""

STYLE = """
:root { --ink: #1b1f24; --soft: #515a66; --line: #d9dde2; --wash: #f5f6f7; --accent: #0b5394;
  --good: #0a6b4c;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", "Palatino Linotype", Georgia, "DejaVu Serif",
  serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans",
  sans-serif; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 66rem; color: var(--ink); background: #fff;
  font: 1rem/1.55 var(--sans); overflow-wrap: anywhere; }
h1, h2, h3 { font-family: var(--serif); font-weight: 600; line-height: 1.2; text-wrap: balance; }
h1 { font-size: clamp(1.7rem, 1.2rem + 2.2vw, 2.7rem); margin: .15em 0 .5em; letter-spacing: -.01em; }
h2 { font-size: 1.5rem; margin: 0 0 .7em; padding-top: 1.1rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1.12rem; margin: 2rem 0 .5rem; }
p { margin: 0 0 .9em; max-width: 44rem; }
a { color: var(--accent); text-underline-offset: .15em; }
bdi { unicode-bidi: isolate; }
section { margin-top: 3.2rem; }
.kicker { margin: 0; color: var(--soft); font-size: .8rem; letter-spacing: .09em;
  text-transform: uppercase; }
.lead { font: 1.28rem/1.5 var(--serif); max-width: 46rem; margin-bottom: .7em; }
.lead strong { font-weight: 700; }
.byline, .note, .missing, figcaption, .caption { color: var(--soft); font-size: .875rem;
  line-height: 1.45; }
.note { max-width: 48rem; margin-bottom: .5em; }
.missing { border-left: 3px solid var(--line); padding: .2rem 0 .2rem .8rem; }
.warning { border-left: 3px solid #b45309; padding: .2rem 0 .2rem .8rem; font-size: .925rem; }
nav { margin: 1.8rem 0 0; padding: .85rem 0; border-top: 1px solid var(--line);
  border-bottom: 1px solid var(--line); }
nav ol { list-style: none; display: flex; flex-wrap: wrap; gap: .35rem 1.4rem; margin: 0; padding: 0;
  font-size: .9rem; }
nav a { display: inline-block; padding: .2rem 0; text-decoration: none; }
nav a:hover, nav a:focus-visible { text-decoration: underline; }
code { font: .86em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.6rem), 1fr));
  gap: .9rem 1.6rem;
  margin: 0 0 1.4rem; }
.facts div { border-top: 1px solid var(--line); padding-top: .4rem; min-width: 0; }
.facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 50%; }
.table { margin: 1rem 0 1.1rem; min-width: 0; }
.caption { margin: 0 0 .35rem; }
th, td { padding: .42rem .9rem .42rem 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
th:last-child, td:last-child { padding-right: .2rem; }
th { font-weight: 500; overflow-wrap: normal; }
thead th { border-bottom: 1.5px solid var(--ink); vertical-align: bottom; font-weight: 600;
  max-width: 14rem; }
tbody th, thead th:first-child { text-align: left; }
.wide, .text { width: 100%; }
.results td, .results th { white-space: nowrap; }
.results thead th { white-space: normal; overflow-wrap: anywhere; min-width: 6.5rem; }
.results thead th:first-child { min-width: 0; }
.results tbody th { position: sticky; left: 0; background: #fff; }
.interval { display: block; color: var(--soft); font-size: .88em; font-weight: 400; }
.best { font-weight: 700; color: var(--good); }
.text td, .text th { text-align: left; white-space: normal; }
.text td { min-width: 7rem; }
.text tbody th { white-space: nowrap; }
.beside { display: flex; flex-wrap: wrap; gap: 0 2.6rem; align-items: flex-start; }
.beside > .table { flex: 0 1 auto; max-width: 100%; }
.beside .caption { width: 0; min-width: 100%; }
.beside > .figures { flex: 1 1 22rem; margin-top: 1rem; min-width: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.6rem 2.2rem;
  align-items: end; margin: 1.2rem 0; }
figure { margin: 0; min-width: 0; max-width: 36rem; }
figure svg { display: block; width: 100%; height: auto; }
svg text { font-family: var(--sans) !important; }
figcaption { margin: 0 0 .5rem; }
figcaption b, .caption b { color: var(--ink); font-weight: 600; }
details { margin: .5rem 0 1rem; }
summary { cursor: pointer; color: var(--accent); font-size: .9rem; padding: .2rem 0; }
.example { border-top: 1px solid var(--line); padding-top: .3rem; margin-top: 2.4rem; }
.example h3 { margin-top: .8rem; }
.strip { display: flex; gap: .8rem; overflow-x: auto; list-style: none; margin: .4rem 0 1rem;
  padding: 0 0 .5rem; }
.strip li { flex: 0 0 5.6rem; hyphens: auto; font-size: .76rem; line-height: 1.3; color: var(--soft); }
.thumb { display: block; width: 5.6rem; height: 5.6rem; object-fit: contain; background: var(--wash);
  border-radius: 3px; }
.strip .thumb { margin-bottom: .3rem; }
span.thumb { display: flex; align-items: center; justify-content: center; text-align: center;
  font-size: .66rem;
  line-height: 1.2; color: var(--soft); padding: .2rem; }
.candidates .thumb { width: 2.75rem; height: 2.75rem; }
.candidates td, .candidates th { vertical-align: middle; }
.candidates th:first-child { width: 2.6rem; }
.candidates td:nth-child(2) { width: 3.6rem; }
.candidates td:nth-child(3), .candidates th:nth-child(3) { text-align: left; min-width: 11rem;
  white-space: normal; }
.candidates small { display: block; color: var(--soft); font-size: .78rem; line-height: 1.35;
  max-width: 40rem; }
.candidates tr.positive th, .candidates tr.positive td { background: #e9f4ef; }
.tag { display: inline-block; background: var(--good); color: #fff; font-size: .72rem; font-weight: 600;
  line-height: 1;
  padding: .25em .5em; border-radius: 2px; margin-left: .4em; white-space: nowrap; }
.bar { display: inline-block; vertical-align: middle; width: 5.5rem; height: .55rem;
  background: var(--wash); margin-left: .5rem;
  position: relative; }
.bar i { position: absolute; top: 0; bottom: 0; background: #7f9fbd; }
.bar::after { content: ""; position: absolute; left: 50%; top: -2px; bottom: -2px; width: 1px;
  background: var(--soft); }
.prompt { background: var(--wash); border-radius: 3px; padding: .7rem .9rem; font-size: .88rem;
  max-width: 48rem; margin: 0 0 1rem; }
.prompt p { margin: 0 0 .35rem; max-width: none; }
.prompt .role { color: var(--soft); font-size: .76rem; margin: .5rem 0 .1rem; }
.prompt .role:first-child { margin-top: 0; }
@media (max-width: 40rem) { body { padding: 1.4rem 1rem 3rem; } .lead { font-size: 1.12rem;
  } section { margin-top: 2.4rem; }
  .bar { display: none; } }
@media print {
  @page { margin: 16mm 14mm; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  nav { display: none; }
  section { margin-top: 1.6rem; }
  h2, h3, .caption, figcaption { break-after: avoid; }
  figure, tr, .facts div, .strip li, .prompt { break-inside: avoid; }
  .figures { grid-template-columns: 1fr 1fr; gap: 1rem; }
  .scroll, .strip { overflow: visible; flex-wrap: wrap; }
  .results tbody th { position: static; }
  .results thead th { min-width: 0; }
  .scroll th, .scroll td { white-space: normal; overflow-wrap: anywhere; padding-right: .6em; }
  table { font-size: 8pt; }
  thead { display: table-header-group; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
""".strip()
