"""A compliance report as one HTML file: nothing is loaded from anywhere, and it prints well.

Light or dark as the reader's system is; always light on paper. Verdicts are words and signs, not
colours alone. Everything that came from outside is escaped.
"""

from collections.abc import Iterable
from html import escape
from itertools import groupby

from steward.cli.report.lines import Line, Report, Verdict, stamp

_CLASS = {Verdict.KEPT: "kept", Verdict.BROKEN: "broken", Verdict.NOT_CHECKED: "open"}
_SIGN = {Verdict.KEPT: "✓", Verdict.BROKEN: "✕", Verdict.NOT_CHECKED: "?"}
_HEADLINE = {
    Verdict.KEPT: "Everything that was promised is kept",
    Verdict.BROKEN: "Something is broken",
    Verdict.NOT_CHECKED: "Nothing is broken; not everything was checked",
}

_STYLE = """
:root { color-scheme: light dark;
  --paper: #f6f7f9; --card: #fff; --ink: #171a21; --soft: #5b6472; --line: #e2e6ec;
  --kept: #12703f; --kept-bg: #e3f5ea; --broken: #b3261e; --broken-bg: #fdeae8;
  --open: #6b5a16; --open-bg: #f8f0d4; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #12151b; --card: #1a1f27; --ink: #e8ebf1; --soft: #9aa5b5; --line: #2b323d;
  --kept: #6fd79c; --kept-bg: #14301f; --broken: #ff8f86; --broken-bg: #3a1714;
  --open: #e2c968; --open-bg: #332b10; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .2rem 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: .8rem; text-transform: uppercase; letter-spacing: .09em; color: var(--soft);
  margin: 2.2rem 0 .6rem; }
.over { color: var(--soft); margin: 0; font-size: .9rem; }
.sum { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.2rem 0 0; padding: 0;
  list-style: none; }
.sum li { padding: .35rem .8rem; border-radius: 999px; font-weight: 600; font-size: .9rem; }
dl.head { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem;
  margin: 1rem 0 0; font-size: .9rem; }
dl.head dt { color: var(--soft); } dl.head dd { margin: 0; overflow-wrap: anywhere; }
.lines { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  overflow: hidden; }
.row { display: grid; grid-template-columns: 8.2rem 1fr; gap: 0 1rem; padding: .9rem 1.1rem;
  border-top: 1px solid var(--line); break-inside: avoid; }
.row:first-child { border-top: 0; }
.row p { margin: 0; }
.what { font-weight: 600; }
.how, .at { color: var(--soft); font-size: .85rem; }
.row ul { margin: .45rem 0 0; padding-left: 1.1rem; font-size: .88rem; overflow-wrap: anywhere; }
.badge { display: inline-block; padding: .1rem .6rem; border-radius: 999px; font-weight: 600;
  font-size: .82rem; white-space: nowrap; }
.kept { color: var(--kept); background: var(--kept-bg); }
.broken { color: var(--broken); background: var(--broken-bg); }
.open { color: var(--open); background: var(--open-bg); }
.row.is-broken { box-shadow: inset 4px 0 0 var(--broken); }
footer { margin-top: 2.2rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 36rem) { .row { grid-template-columns: 1fr; gap: .35rem; } }
@media print { :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb;
    --kept: #0b5a31; --kept-bg: #fff; --broken: #a3150e; --broken-bg: #fff;
    --open: #574708; --open-bg: #fff; }
  main { max-width: none; padding: 0; } .badge, .sum li { border: 1px solid currentColor; }
  .lines { border-radius: 0; } }
"""


def render_page(report: Report) -> str:
    """The page."""
    verdict = report.verdict
    counts = "".join(
        f'<li class="{_CLASS[each]}">{report.count(each)} {each.value}</li>' for each in Verdict
    )
    facts = (
        ("Cluster", report.cluster),
        ("Registry", report.registry),
        ("Looked at", stamp(report.at_ms)),
        ("Steward", report.version),
    )
    head = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    parts = "".join(
        f'<h2>{escape(part.value)}</h2>\n<div class="lines">\n{_rows(lines)}</div>\n'
        for part, lines in groupby(report.lines, key=lambda line: line.part)
    )
    title = f"Compliance of {report.cluster}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}: {verdict.value}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<p class="over">Steward compliance report: one live manager per user</p>
<h1>{_HEADLINE[verdict]}</h1>
<dl class="head">{head}</dl>
<ul class="sum">{counts}</ul>
{parts}<footer>
<p>Each line was made by looking, at the time that it names. Not checked is neither kept nor broken.
The lines, how each is obtained and what turns it red are in docs/compliance.md. Honest limits: a
tool call that ran at a take-over may run twice unless it honours its idempotency key; the log is
the root of trust.</p>
</footer>
</main>
</body>
</html>
"""


def _rows(lines: Iterable[Line]) -> str:
    return "".join(_row(line) for line in lines)


def _row(line: Line) -> str:
    kind = _CLASS[line.verdict]
    evidence = "".join(f"<li>{escape(text)}</li>" for text in line.evidence)
    told = f"<ul>{evidence}</ul>" if evidence else ""
    return f"""<div class="row is-{kind}" id="{escape(line.id)}">
<p><span class="badge {kind}">{_SIGN[line.verdict]} {line.verdict.value}</span></p>
<div>
<p class="what">{escape(line.what)}</p>
<p class="how">{escape(line.how)}</p>
<p class="at">{stamp(line.at_ms)}</p>
{told}</div>
</div>
"""
