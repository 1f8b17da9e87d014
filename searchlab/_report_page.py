"""The look of a report: its style sheet, and the policy that keeps the page to itself."""

from __future__ import annotations

__all__ = ["CSS", "POLICY"]

POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)
"""Content security policy: no scripts, nothing from outside."""

CSS = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c2630;--soft:#5c6873;--line:#d9dfe5;
--card:#f4f6f8;--win:#e8f1fc;--good:#1f7a3d;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--page:#14191e;--ink:#dde3e9;--soft:#98a4af;
--line:#323b44;--card:#1c232a;--win:#1b2f47;--good:#6cc789;--bad:#f08a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.2rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.2;margin:.4rem 0 .8rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .5rem;padding-top:.9rem;border-top:1px solid var(--line);
overflow-wrap:anywhere}
p{margin:.5rem 0;max-width:46rem;overflow-wrap:anywhere}
.verdict{font-size:1.08rem;padding:.7rem .9rem;border-left:4px solid #3b7dd8;
background:var(--card);max-width:none}
.note{color:var(--bad)}
.wide{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;margin:.6rem 0}
th{text-align:left;font-weight:600;color:var(--soft);vertical-align:bottom}
th,td{padding:.28rem .7rem .28rem 0;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{padding-left:.4rem}
td{vertical-align:top}
td.number,td.group{white-space:nowrap}
td.text{overflow-wrap:break-word}
td.what{min-width:12rem}
tr.winner td{background:var(--win);font-weight:600}
tr.first td{border-top:2px solid var(--line)}
.name{color:var(--soft);font-weight:400;overflow-wrap:anywhere}
.tag{white-space:nowrap;font-size:.8rem;font-weight:600}
.good{color:var(--good)}.bad{color:var(--bad)}.open{color:var(--soft)}
figure{margin:.6rem 0}
figure img{display:block;width:100%;max-width:48rem;min-width:30rem;height:auto}
figcaption{color:var(--soft);font-size:.86rem;max-width:46rem;margin-top:.3rem}
pre{font:.78rem/1.45 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;margin:.4rem 0;
padding:.7rem .9rem;background:var(--card);width:max-content;min-width:100%}
dl{display:grid;grid-template-columns:minmax(8rem,15rem) 1fr;gap:.2rem 1rem;font-size:.9rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;min-width:0}
dd ul{margin:0;padding-left:1.1rem}
@media (max-width:32rem){dl{grid-template-columns:1fr}
dt{margin-top:.4rem}main{padding:.8rem .7rem 3rem}}
@media print{.wide{overflow:visible}}
"""
"""Light and dark by the reader's setting; wide parts scroll on narrow screens."""
